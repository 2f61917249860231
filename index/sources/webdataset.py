"""Exemplars from the tar shards of WebDataset: `0001.jpg` beside `0001.cls` or `0001.json`."""

import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from lzma import LZMAError
from pathlib import Path
from typing import Any

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError
from tmm_engine.index.limits import MAX_MEMBER_BYTES
from tmm_engine.index.sources.images import IMAGE_SUFFIXES
from tmm_engine.index.sources.labels import Labels
from tmm_engine.index.sources.records import Encoded, EncodedSource, Metadata, UnreadableImage, free_name, python_type
from tmm_engine.index.sources.roles import LABEL_NAMES
from tmm_engine.index.sources.shards import split_shards
from tmm_engine.index.sources.text_tables import json_column

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LABEL_FILE, _JSON_FILE, _TEXT_FILE = "cls", "json", "txt"
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What is known of a sample before its image is read: its key, its image's extension, and its fields."""

    key: str
    image: str
    fields: Mapping[str, Any]


class WebDatasetSource(EncodedSource):
    """Tar shards: a sample is the files that follow each other and share the name before the first dot.

    Its image is the file with a suffix of images, its label the file ``cls``, or the field ``label`` of the file
    ``json``: integers or names. Metadata: the other fields of ``json`` that are text, numbers or booleans, and ``txt``.
    Ids are ``<shard>/<name>``. All but the images is read when the source is opened. Nothing is ever unpacked.

    Args:
        path: A tar file (`TAR_SUFFIXES`), or a folder of ``.tar`` files; see `split_shards`.
        split: Which of several.
        limit: Only the first so many samples.
        image_column: The extension of the image, where a sample has several, as in ``left.png``.
        label_column: The field, or the extension, that is the label.

    Raises:
        InputError: no such split, several and none chosen, no samples with an image, none that can be read, fields that
            could be several, or labels that cannot be used.
    """

    @checked
    def __init__(
        self,
        path: str | Path,
        *,
        split: str | None = None,
        limit: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        path = Path(path)
        prefix, self._files = split_shards(path, ".tar", split, numbers=r"[-_]?\d+$")
        self.name = path.name if path.is_file() else f"{path.resolve().name} ({prefix})"
        self._image = image_column
        self._shards = [_read_samples(file, image_column, self.name) for file in self._files]
        samples = [sample for shard in self._shards if not isinstance(shard, UnreadableImage) for sample in shard]
        if not samples:
            reasons = [shard.reason for shard in self._shards if isinstance(shard, UnreadableImage)]
            raise InputError(f"{self.name}: {reasons[0] if reasons else 'expected samples with an image, found none'}")
        self._length = min(len(samples), limit or len(samples))
        self.limited = limit is not None
        fields = dict.fromkeys(name for sample in samples for name in sample.fields)
        self._label = _label_field(self.name, list(fields), label_column)
        self._values = {name: json_column([sample.fields.get(name) for sample in samples]) for name in fields}
        self.class_names, self._labels = self._read_labels(samples)
        self.labelled = self._labels is not None
        self.metadata_types, self._columns = self._metadata()

    def __len__(self) -> int:
        return self._length + sum(isinstance(shard, UnreadableImage) for shard in self._shards)

    def _read_labels(self, samples: Sequence[_Sample]) -> tuple[tuple[str, ...] | None, list[int | None] | None]:
        """The class names, where there are some, and every sample's label, where they have one."""
        import pyarrow as pa

        if self._label is None:
            self._remark("the samples have no labels (a file cls, or a field of json: `label_column=…`)")
            return None, None
        if self._label not in (_LABEL_FILE, "label"):
            self._remark(f"labels are {self._label!r} (`label_column=…`)")
        column = json_column(_numbers([sample.fields.get(self._label) for sample in samples]))
        numbering = Labels.read(self.name, pa.chunked_array([column]), None, rows=self._length)
        if numbering is None:
            return None, None
        self.label_values = numbering.values
        return numbering.class_names, [numbering.of(value) for value in column.to_pylist()[: self._length]]

    def _metadata(self) -> tuple[dict[str, type], dict[str, list[Any]]]:
        """The types and the values of the columns of metadata."""
        types, columns, left_out = dict[str, type](), dict[str, list[Any]](), list[str]()
        for field, values in self._values.items():
            kind = python_type(values.type)
            if field == self._label:
                continue
            if kind is None:
                left_out.append(field)
                continue
            name = free_name(field, types)
            types[name], columns[name] = kind, values.to_pylist()
        if left_out:
            self._remark(f"fields left out: {', '.join(left_out)}")
        return types, columns

    def _encoded(self) -> Iterator[Encoded | UnreadableImage]:
        before = 0
        for file, shard in zip(self._files, self._shards, strict=True):
            if isinstance(shard, UnreadableImage):
                yield shard
                continue
            numbers = {f"{each.key}.{each.image}": before + place for place, each in enumerate(shard)}
            before += len(shard)
            try:
                with tarfile.open(file) as tar:
                    for member in tar:
                        number = numbers.get(member.name, self._length)
                        if number < self._length:
                            key = _split(member.name)[0].removeprefix("./")
                            yield self._one(f"{_stem(file)}/{key}", number, _content(tar, member))
            except _DAMAGE as error:
                yield _damaged(file, error)
            if before >= self._length:
                return

    def _one(self, id_: str, number: int, content: bytes | None) -> Encoded:
        metadata: Metadata = {name: values[number] for name, values in self._columns.items()}
        return Encoded(id_, content, self._labels[number] if self._labels else None, metadata)


def is_tar(path: Path) -> bool:
    """Whether a name is one of a tar file that is read."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def _read_samples(file: Path, image: str | None, source: str) -> list[_Sample] | UnreadableImage:
    """The samples of a shard that have an image.

    Raises:
        InputError: a sample has several images.
    """
    samples = []
    try:
        with tarfile.open(file) as tar:
            members = ((*_split(member.name), member) for member in tar if member.isfile())
            for key, group in groupby(members, key=lambda each: each[0]):
                files = {extension: _field(tar, member) for _, extension, member in group if key}
                images = [name for name in files if f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES]
                chosen = images if image is None else [name for name in files if name == image]
                if len(chosen) > 1:
                    raise InputError(
                        f"{source}: expected one image in a sample, got {', '.join(chosen)} in {key}; say which "
                        f"(`image_column=…`)"
                    )
                fields = {name: value for name, value in files.items() if name not in images and value is not None}
                samples += [_Sample(key, name, _flat(fields)) for name in chosen]
    except _DAMAGE as error:
        return _damaged(file, error)
    return samples


def _split(name: str) -> tuple[str, str]:
    """A member's key and extension: before and after the first dot of its last part; hidden ones have no key.

    What is no image has its last suffix in lower case.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    rest, dot, kind = extension.rpartition(".")
    if kind.lower() in (_LABEL_FILE, _JSON_FILE, _TEXT_FILE):
        extension = f"{rest}{dot}{kind.lower()}"
    return (f"{folder}{slash}{stem}" if stem else "", extension)


def _field(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    """The content of a label, JSON or text; None for anything else."""
    kind = member.name.rpartition(".")[2].lower()
    if kind not in (_LABEL_FILE, _JSON_FILE, _TEXT_FILE):
        return None
    content = (_content(tar, member) or b"").decode("utf-8", "backslashreplace")
    if kind != _JSON_FILE:
        return content.strip()
    try:
        return json.loads(content)
    except ValueError:
        return None


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of JSON objects beside the files."""
    flat = {name: value for name, value in fields.items() if not isinstance(value, dict)}
    for value in fields.values():
        flat |= value if isinstance(value, dict) else {}
    return flat


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """What a member holds; None where it is too large."""
    if member.size > MAX_MEMBER_BYTES or (opened := tar.extractfile(member)) is None:
        return None
    return opened.read()


def _numbers(values: Sequence[Any]) -> list[Any]:
    """Labels as integers, where all that are text are written as integers are; empty ones are none."""
    values = [None if value == "" else value for value in values]
    texts = [value for value in values if isinstance(value, str)]
    if not all(re.fullmatch(r"0|-?[1-9]\d*", text) for text in texts):
        return list(values)
    return [int(value) if isinstance(value, str) else value for value in values]


def _label_field(source: str, fields: Sequence[str], chosen: str | None) -> str | None:
    if chosen is not None:
        if chosen not in fields:
            raise InputError(f"{source}: expected a field {chosen!r} in the samples, got {', '.join(fields) or 'none'}")
        return chosen
    for names in ([_LABEL_FILE], ["label"], [name for name in fields if name.lower() in LABEL_NAMES]):
        found = [name for name in names if name in fields]
        if len(found) > 1:
            raise InputError(f"{source}: the labels could be {', '.join(found)}; say which (`label_column=…`)")
        if found:
            return found[0]
    return None


def _stem(file: Path) -> str:
    return next(file.name[: -len(suffix)] for suffix in TAR_SUFFIXES if file.name.lower().endswith(suffix))


def _damaged(file: Path, error: Exception) -> UnreadableImage:
    return UnreadableImage(file.name, f"expected a readable tar file, got {error}; fetch it again", is_shard=True)
