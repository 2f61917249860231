"""Exemplars from image files: class folders, a flat folder, or one file."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.images import IMAGE_SUFFIXES
from tmm_engine.index.sources.metadata_csv import METADATA_CSV, MetadataTable
from tmm_engine.index.sources.records import Encoded, EncodedSource, Metadata, printable

SPLIT_NAMES = frozenset(("train", "test", "val", "validation"))


class FolderSource(EncodedSource):
    """Image files: class folders, a flat folder, or one file.

    Class folders are read as torchvision's ImageFolder does: the sub-folders' sorted names are the classes, each is
    searched recursively. A flat folder or a single file has no labels. Ids are paths relative to the folder;
    metadata: ``path``, and the columns of ``metadata.csv`` in the folder, if there is one (see `MetadataTable`).
    Hidden files and files without one of IMAGE_SUFFIXES are ignored.

    Raises:
        InputError: No images, images beside class folders, sub-folders that are splits rather than classes, or whose
            name is not UTF-8, or a ``metadata.csv`` that does not fit.
    """

    @checked
    def __init__(self, path: str | Path, *, limit: int | None = None) -> None:
        path = Path(path)
        self.name = printable(path)
        folders, images = ([], [path]) if path.is_file() else _listed(path)
        classes = [(folder.name, _found(folder)) for folder in folders]
        if images and any(files for _, files in classes):
            raise InputError(
                f"{path}: expected either images or class folders, got both ({images[0].name} and "
                f"{folders[0].name}{os.sep}); move the images into class folders or open one folder at a time"
            )
        if folders and SPLIT_NAMES.issuperset(name.lower() for name, _ in classes):
            raise InputError(f"{path}: expected class folders, got splits; open one of them, as in {folders[0]}")
        if odd := [name for name, _ in classes if name != printable(name)]:
            raise InputError(f"{self.name}: expected folders with names in UTF-8, got {odd[0]!r}; rename it")
        self.labelled = not images
        self.class_names = tuple(name for name, _ in classes) if self.labelled else None
        labelled = [(file, label) for label, (_, files) in enumerate(classes) for file in files]
        self._files: list[tuple[Path, int | None]] = [*((file, None) for file in images), *labelled][:limit]
        if not self._files or (path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES):
            raise InputError(f"{path}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
        self._folder = path.parent if path.is_file() else path
        self.metadata_types: Mapping[str, type] = {"path": str}
        self._table = None
        if path.is_dir() and (path / METADATA_CSV).is_file():
            table = MetadataTable.read(path / METADATA_CSV, taken=self.metadata_types)
            self._table = table.matched(self._id(file) for file, _ in (*((image, None) for image in images), *labelled))
            self.metadata_types = {"path": str, **self._table.types}

    def __len__(self) -> int:
        return len(self._files)

    def _encoded(self) -> Iterator[Encoded]:
        for file, label in self._files:
            metadata: Metadata = {"path": str(file)}
            if self._table is not None:
                metadata |= self._table.of(self._id(file))
            yield Encoded(self._id(file), file, label, metadata)

    def _id(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sub-folders and the images directly inside, hidden ones left out, sorted by name."""
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    images = [entry for entry in visible if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
    return [entry for entry in visible if entry.is_dir()], images


def _found(folder: Path) -> list[Path]:
    """All images below the folder, a folder's own before those of its sub-folders."""
    folders, images = _listed(folder)
    return [*images, *(image for sub in folders for image in _found(sub))]
