"""Hostile uploads: damaged and forged images in every form of a request; the server answers, soon, and lives."""

import base64
import io
import random
import struct
import time
from typing import Any

import httpx
from PIL import Image

from tmm_engine.bench.reliability.hostile import damaged
from tmm_engine.bench.serving.process import Served
from tmm_engine.index.progress import Progress

SECONDS = 10.0
MODES = ("1", "L", "RGB", "RGBA", "P", "CMYK", "I;16", "F", "LA")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
ODD = ("", "cat' OR 1=1 --", "label" + " + 1" * 3000 + " = 1", "x" * 10**5, "id = '\0'", "))((", "é<script>")


def measure_hostile(server: Served, name: str, *, cases: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """A record for every case; ``failed`` where the server crashed, hung, or did not know what to answer.

    Args:
        server: That is asked.
        name: Of its collection.
        cases: How many.
        seed: Of what is generated.
        progress: Told of each.
    """
    records = []
    with httpx.Client(base_url=server.address, timeout=6 * SECONDS) as client:
        for number in range(cases):
            generator = random.Random(seed + number)
            request, began = _request(generator, name), time.perf_counter()
            try:
                outcome = str(client.send(client.build_request(**request)).status_code)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            seconds = time.perf_counter() - began
            failed = not outcome.isdigit() or outcome.startswith("5") or seconds > SECONDS or not server.alive
            records.append(
                {
                    "part": "hostile",
                    "number": number,
                    "outcome": outcome,
                    "seconds": round(seconds, 3),
                    "failed": failed,
                }
            )
            progress("hostile requests", number + 1, cases)
    return records


def hostile_image(generator: random.Random) -> bytes:
    """A file of some format and mode, damaged; or one whose header claims an enormous size: as for files."""
    picture = Image.effect_noise((generator.randint(1, 40), generator.randint(1, 40)), 80)
    stream = io.BytesIO()
    try:
        picture.convert(generator.choice(MODES)).save(stream, generator.choice(FORMATS))
    except (OSError, ValueError):
        picture.save(stream, "PNG")
    raw = damaged(generator, stream.getvalue())
    if generator.random() < 0.15:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        raw = stream.getvalue()[:16] + struct.pack(">II", 50_000, 50_000) + stream.getvalue()[24:]
    return raw


def _request(generator: random.Random, name: str) -> dict[str, Any]:
    """An image, or other bytes, in one of the forms that a request may have, or in none."""
    raw = hostile_image(generator)
    address, text = f"/collections/{name}/search", base64.b64encode(raw).decode()
    where = generator.choice((None, None, None, *ODD))
    odd = _post(address, json={"query": {"id": generator.choice(ODD)}, "k": generator.choice((1, 10**9, -1))})
    kind = generator.choice(("application/json", "multipart/form-data; boundary=x", "multipart/form-data"))
    put = _post(f"/collections/{name}/exemplars/%00{generator.random()}", content=damaged(generator, raw))
    forms: tuple[dict[str, Any], ...] = (
        _post(address, content=raw, headers={"content-type": generator.choice(("image/png", "image/x", ""))}),
        _post(address, files={"image": ("<b>.png", raw)}, data={} if where is None else {"where": where}),
        _post(address, json={"query": {"image": text}, "where": where}),
        _post(address, json={"query": [{"image": text}] * generator.choice((2, 65))}),
        _post(address, content=b"--x\r\n" + raw, headers={"content-type": kind}),
        put | {"method": "PUT", "headers": {"content-type": "image/png"}},
        odd,
    )
    return generator.choice(forms)


def _post(address: str, **request: Any) -> dict[str, Any]:
    return {"method": "POST", "url": address, **request}
