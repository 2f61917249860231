"""Hostile input, generated from seeds: files and texts that somebody else made, damaged or forged."""

import io
import json
import random
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from tmm_engine.index.errors import TmmEngineError
from tmm_engine.index.models.checkpoints import load_state_dict
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.images import decode_image
from tmm_engine.index.sources.metadata_csv import MetadataTable
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.store.manifest import MANIFEST, Manifest, sealed
from tmm_engine.index.store.where import check_where

SECONDS = 10.0
MEMORY = 1 << 30  # bytes beyond what the process has when it starts
SHAPE = (3, 8, 8)


def images(generator: random.Random, folder: Path) -> None:
    """An image file of some format and mode, damaged; or one whose header claims an enormous size."""
    mode = generator.choice(("1", "L", "RGB", "RGBA", "P", "CMYK", "I;16", "F", "LA"))
    kind = generator.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"))
    picture = Image.effect_noise((generator.randint(1, 40), generator.randint(1, 40)), 80)
    stream = io.BytesIO()
    try:
        picture.convert(mode).save(stream, kind)
    except (OSError, ValueError):
        picture.save(stream, "PNG")
    raw = damaged(generator, stream.getvalue())
    if generator.random() < 0.15:  # a bomb: 50,000 × 50,000 in the header of a PNG
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        raw = stream.getvalue()[:16] + struct.pack(">II", 50_000, 50_000) + stream.getvalue()[24:]
    path = folder / generator.choice(("x.png", "x.jpg", "x.tif", "x.gif"))
    path.write_bytes(raw)
    decode_image(path, shape=SHAPE)


def parquet(generator: random.Random, folder: Path) -> None:
    """A Parquet file with wrong types, missing columns or damage, read as a source."""
    n = generator.randint(1, 6)
    values = {
        "text": ["x" * generator.choice((1, 10**6)) + "<script>\n" for _ in range(n)],
        "number": list(range(n)),
        "null": [None] * n,
        "image": [{"bytes": generator.randbytes(generator.randint(0, 90)), "path": "p\n<b>"} for _ in range(n)],
        "floats": [float("nan")] * n,
        "bytes": [b"\xff"] * n,
    }
    columns = {
        name: values[generator.choice(list(values))]
        for name in generator.sample(("image", "label", "id", "x.y", ""), 3)
    }
    path = folder / "x.parquet"
    pq.write_table(pa.table(columns), path)
    if generator.random() < 0.6:
        path.write_bytes(damaged(generator, path.read_bytes()))
    for _ in open_source(path).read(SHAPE):
        pass


def manifests(generator: random.Random, folder: Path) -> None:
    """An `index.json` whose values are forged and whose SHA-256 was made to fit; or a damaged one."""
    odd: tuple[Any, ...] = (
        0,
        -1,
        10**30,
        1e308,
        "",
        "/etc/passwd",
        "../../x",
        [],
        {},
        None,
        True,
        "x" * 10**6,
        [[[]]],
        2**63,
    )
    content = json.loads(_GOOD_MANIFEST)
    for _ in range(generator.randint(1, 3)):
        place = content
        while True:
            key = generator.choice(list(place))
            if not (isinstance(place[key], dict) and place[key] and generator.random() < 0.7):
                break
            place = place[key]
        place[key if generator.random() < 0.9 else "../x"] = generator.choice(odd)
    raw = json.dumps(sealed(content)).encode()
    (folder / MANIFEST).write_bytes(damaged(generator, raw) if generator.random() < 0.3 else raw)
    manifest = Manifest.read(folder)
    manifest.check_sizes(folder)
    manifest.check_digests(folder)


def weights(generator: random.Random, folder: Path) -> None:
    """A safetensors file with a lying header, or a damaged PyTorch file; read as weights and as a classifier."""
    path = folder / generator.choice(("x.safetensors", "x.pt"))
    raw = save(
        {"a": torch.ones(3, 4), "b": torch.zeros(2)}, {"tmm_engine": generator.choice(("{}", "[", '{"spec": 1}'))}
    )
    if generator.random() < 0.6:
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        tensor = header[generator.choice(("a", "b"))]
        tensor[generator.choice(list(tensor))] = generator.choice(
            ([0, 2**60], [-1, 4], "F64", [2**40, 2**40], None, [])
        )
        text = json.dumps(header).encode()
        raw = struct.pack("<Q", generator.choice((len(text), 2**62, 0, len(text) * 2))) + text + raw[-56:]
    elif path.suffix == ".pt":
        stream = io.BytesIO()
        torch.save({"a": torch.ones(3)}, stream)
        raw = stream.getvalue()
    path.write_bytes(damaged(generator, raw) if generator.random() < 0.5 else raw)
    generator.choice((load_state_dict, Classifier.load))(path)


def pickles(generator: random.Random, folder: Path) -> None:
    """A checkpoint that would write a file if it were unpickled; `run_cases` looks for that file."""
    canary = folder / "canary"
    code = f"cbuiltins\nexec\n(Vopen({str(canary)!r}, 'w')\ntR."
    path = folder / generator.choice(("x.pt", "x.pth", "x.bin", "x.safetensors"))
    path.write_bytes(code.encode() + generator.randbytes(generator.randint(0, 9)))
    try:
        load_state_dict(path)
    finally:
        assert not canary.exists(), "a pickle ran"


def filters(generator: random.Random, folder: Path) -> None:
    """A filter made of what filters are made of, run over an index in memory."""
    import lance

    from tmm_engine.index.labels import Vocabulary
    from tmm_engine.index.store.where import matching_positions

    parts = (
        "label", "id", "=", "(", ")", "'x'", "1", "AND", "OR", "NOT", "+", "IS NULL", "IN (1, 2)", "::", "--", ";", "`",
        '"', "LIKE", "''", "\n", "\0", "é", "CASE", "cast(", "1e999", "-", "||", "<script>", "<>",
    )  # fmt: skip
    where = " ".join(generator.choice(parts) for _ in range(generator.choice((1, 3, 5, 9, 40, 3000))))
    where = generator.choice((where, "label = 1 AND " + where, "label" + " + 1" * generator.randint(1, 3000) + " = 1"))
    check_where(where)
    nowhere = lance.write_dataset(pa.table({"id": ["a", "b"], "label": [1, 2]}), f"memory://{generator.random()}")
    matching_positions(nowhere, where, Vocabulary(("a", "b")))


def tables(generator: random.Random, folder: Path) -> None:
    """A `metadata.csv` with damage, quotes that never end, and long lines."""
    rows = [
        ",".join(generator.choice(("a", "1", '"', "\xff", "x" * 10**5, "", "<b>")) for _ in range(3)) for _ in range(5)
    ]
    text = "\n".join([generator.choice(("file_name,a,b", "a,b,c", "file_name,file_name,x", "")), *rows])
    (folder / "metadata.csv").write_bytes(damaged(generator, text.encode("latin-1")))
    MetadataTable.read(folder / "metadata.csv", taken=())


def damaged(generator: random.Random, raw: bytes) -> bytes:
    """Cut short, with bytes changed, removed, doubled, or as it was."""
    content = bytearray(raw)
    for _ in range(generator.choice((0, 1, 1, 3, 20))):
        if not content:
            break
        place = generator.randrange(len(content))
        match generator.choice(("flip", "flip", "cut", "drop", "double", "zero")):
            case "flip":
                content[place] ^= 1 << generator.randrange(8)
            case "cut":
                del content[place:]
            case "drop":
                del content[place : place + generator.randint(1, 8)]
            case "double":
                content[place:place] = content[place : place + 16]
            case _:
                content[place : place + 8] = bytes(len(content[place : place + 8]))
    return bytes(content)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "images": images, "parquet": parquet, "manifests": manifests, "weights": weights, "pickles": pickles,
    "filters": filters, "tables": tables,
}  # fmt: skip


def run_cases(kind: str, start: int, stop: int, progress: Connection) -> None:
    """Cases by seed: after each, what it came to, its seconds, and the memory it took at most."""
    torch.set_num_threads(1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for seed in range(start, stop):
        begun = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                KINDS[kind](random.Random(seed), Path(folder))
            outcome = "accepted"
        except TmmEngineError as error:
            outcome = (
                "refused" if str(error) and len(str(error)) < 5000 else f"a message of {len(str(error))} characters"
            )
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        seconds = time.perf_counter() - begun
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
        if seconds > SECONDS:
            outcome = f"took {seconds:.0f} s"
        if grown > MEMORY:
            outcome = f"took {grown >> 20} MiB"
        progress.send((seed, outcome))


def _good_manifest() -> str:
    from tmm_engine.index.models.architectures import ModelSpec
    from tmm_engine.index.store.manifest import FileDigest

    return Manifest(
        version=1, change="", created="", source="s", exemplars=1, skipped=0, image_shape=SHAPE, columns={"feature": 4},
        class_names=("a", "b"), labels_predicted=False,
        model=ModelSpec("resnet18", 2, 3, False, (8, 8), (0.0,) * 3, (1.0,) * 3, "fc"), fingerprint="f",
        neighbours="Flat", backend_speeds={}, lance_version=1,
        files={"model.safetensors": FileDigest(1, "0")},
    ).text()  # fmt: skip


_GOOD_MANIFEST = _good_manifest()
