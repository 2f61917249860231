"""Exemplars from image files: class folders, a flat folder, or one file."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError, nearest, printable
from tmm_engine.index.sources.images import IMAGE_SUFFIXES
from tmm_engine.index.sources.listing import Listing, counted, split_names
from tmm_engine.index.sources.metadata_csv import METADATA_FILES, MetadataTable
from tmm_engine.index.sources.records import Encoded, EncodedSource, Metadata
from tmm_engine.index.wording import some


class FolderSource(EncodedSource):
    """Image files: class folders, a flat folder, or one file.

    Class folders are read as torchvision's ImageFolder does: the sub-folders' sorted names are the classes, each is
    searched recursively; one without images stays a class. A flat folder or a single file has no labels. Ids are paths
    relative to the folder; metadata: ``path``, and the columns of a ``metadata.csv``, ``.jsonl`` or ``.parquet`` in it
    (see `MetadataTable`). Hidden files, folders that systems leave behind (`LEFTOVERS`) and files without a suffix of
    images are left out; pictures in formats that are not read (`UNREAD_SUFFIXES`) are images that cannot be read.
    `remarks` counts both.

    Args:
        path: The folder or file.
        split: The sub-folder to take where the sub-folders are splits.
        limit: Only the first so many images.

    Raises:
        InputError: No images, images beside class folders, a folder that may not be listed, sub-folders that are splits
            of which none is chosen, or whose name is not UTF-8, one folder around others, or a table of metadata that
            does not fit.
    """

    @checked
    def __init__(self, path: str | Path, *, split: str | None = None, limit: int | None = None) -> None:
        path = Path(path)
        top = Listing([], [path]) if path.is_file() else Listing.of(path)
        splits = split_names(folder.name for folder in top.folders)
        if splits or split is not None:
            self._remark(*_beside(top, splits, split))
            path = _split_folder(path, splits, split)
            top = Listing.of(path)
        self.name = printable(path)
        self._folder = path.parent if path.is_file() else path
        classes = {folder.name: Listing.below(folder, around=[path]) for folder in top.folders}
        flat = any(map(_readable, top.images))
        self._check_classes(classes, top.images[0] if flat else None)
        self.labelled = not flat
        self.class_names = None if flat else tuple(classes)
        files: list[tuple[Path, int | None]] = [(file, None) for file in top.images]
        if not flat:
            files = [(file, label) for label, listing in enumerate(classes.values()) for file in listing.images]
        self._files = files[:limit]
        self.limited = limit is not None
        left_out = sum((listing.left_out for listing in classes.values()), top.left_out)
        left_out += Counter() if flat else _suffixes(top.images)
        if not any(_readable(file) for file, _ in files):
            found = counted(left_out + _suffixes(file for file, _ in files))
            raise InputError(
                f"{path}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none{found and f' but {found}'}"
            )
        self.metadata_types: Mapping[str, type] = {"path": str}
        self._table = None
        tables = [path / name for name in METADATA_FILES if path.is_dir() and (path / name).is_file()]
        if len(tables) > 1:
            got = " and ".join(file.name for file in tables)
            raise InputError(f"{path}: expected one table of metadata, got {got}; keep one")
        for file in tables:
            left_out[file.suffix] -= 1
            table = MetadataTable.read(file, taken=self.metadata_types)
            self._table = table.matched(self._id(image) for image, _ in files)
            self.metadata_types = {"path": str, **self._table.types}
            self._remark(*table.remarks)
        empty = [name for name, listing in classes.items() if not any(map(_readable, listing.images))]
        self._remark(*_remarks(files, empty, left_out))

    def __len__(self) -> int:
        return len(self._files)

    def _check_classes(self, classes: Mapping[str, Listing], image: Path | None) -> None:
        """Refuse class folders beside an image, names that are no text, and one folder around the class folders."""
        if image is not None and (filled := [name for name, listing in classes.items() if listing.images]):
            raise InputError(
                f"{self.name}: expected either images or class folders, got both ({image.name} and "
                f"{filled[0]}{os.sep}); move the images into class folders or open one folder at a time"
            )
        if odd := [name for name in classes if name != printable(name)]:
            raise InputError(f"{self.name}: expected folders with names in UTF-8, got {odd[0]!r}; rename it")
        if len(classes) == 1 and image is None:
            [(name, listing)] = classes.items()
            inside = self._folder / name
            if listing.images and not (own := Listing.of(inside)).images:
                raise InputError(
                    f"{self.name}: expected class folders, got one folder, {name}, in which there are only folders "
                    f"({some(folder.name for folder in own.folders)}); open {inside}, or put its images into one folder"
                )

    def _encoded(self) -> Iterator[Encoded]:
        for file, label in self._files:
            metadata: Metadata = {"path": str(file)}
            if self._table is not None:
                metadata |= self._table.of(self._id(file))
            yield Encoded(self._id(file), file, label, metadata)

    def _id(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()


def _split_folder(path: Path, splits: list[str], split: str | None) -> Path:
    """The sub-folder of a split.

    Raises:
        InputError: there is none of this name, or none is chosen.
    """
    if split in splits:
        return path / split
    if not splits:
        raise InputError(f"{path}: got the split {split!r}, but its sub-folders are no splits; leave it out")
    got = f"{split!r}{nearest(split, splits)}" if split else "none"
    raise InputError(
        f"{path}: expected class folders, got splits; open one of them ({', '.join(splits)}), as in "
        f"{path / splits[0]}, or say which (`split=…`): got {got}"
    )


def _beside(top: Listing, splits: Sequence[str], split: str | None) -> Iterator[str]:
    """What a user should know of what is not in the split."""
    others = [folder.name for folder in top.folders if folder.name not in splits]
    images = f"{len(top.images):,} image{'s' * (len(top.images) > 1)}" if top.images else None
    if split in splits and (left := [*others, *filter(None, [images, counted(top.left_out)])]):
        yield f"only the folder of the split {split!r} is read; left out beside it: {some(left)}"


def _readable(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _suffixes(files: Iterable[Path]) -> Counter[str]:
    return Counter(file.suffix.lower() for file in files)


def _remarks(files: Sequence[tuple[Path, int | None]], empty: Sequence[str], left_out: Counter[str]) -> Iterator[str]:
    """What a user should know of a folder."""
    if unread := _suffixes(file for file, _ in files if not _readable(file)):
        yield f"formats that are not read: {counted(unread)}; convert these images to PNG or JPEG"
    if empty:
        yield f"folders without images that can be read: {some(empty)}" + (
            "" if files[0][1] is None else " (each is a class all the same)"
        )
    if +left_out:
        yield f"left out: {counted(+left_out)}"
