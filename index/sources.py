"""Where exemplars come from: folders, Parquet files, torchvision's data sets, arrays -> a stream of checked images."""

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from PIL import Image

from index.errors import InputError, nearest
from index.images import IMAGE_SUFFIXES, Shape, channels_first, to_numpy, to_uint8
from index.metadata_csv import METADATA_CSV, MetadataTable
from index.parquet import ParquetSource
from index.records import (
    Encoded,
    EncodedSource,
    ImageRecord,
    ImageSource,
    Metadata,
    UnreadableImage,
    free_name,
    printable,
    python_type,
)

__all__ = [
    "ArraySource",
    "FolderSource",
    "ImageRecord",
    "ImageSource",
    "Metadata",
    "ParquetSource",
    "TorchvisionSource",
    "UnreadableImage",
    "open_source",
]

DATASET_ROOT = Path("~/.cache/tmm-engine/datasets")
DATASETS = {
    "mnist": "MNIST/raw/*-ubyte",
    "cifar10": "cifar-10-batches-py/",
    "svhn": "*_32x32.mat",
    "gtsrb": "gtsrb/GTSRB/",
}
"""Data sets by name, and where below their root torchvision expects them."""

SPLIT_NAMES = frozenset(("train", "test", "val", "validation"))

_BATCH = 1024  # array rows converted at a time


def open_source(
    source: str | Path, *, split: str | None = None, root: Path | None = None, limit: int | None = None
) -> ImageSource:
    """The source that a name or a path means.

    Args:
        source: A data set's name as a string (``mnist``, ``cifar10``, ``svhn``, ``gtsrb``; case, hyphens and
            underscores do not matter; write ``./mnist`` for a folder of that name), a folder of class folders, a flat
            folder of images, one image file, a Parquet file, or a folder of Parquet shards.
        split: Of a data set ``train`` (default) or ``test``; of Parquet shards the first part of their names.
        root: Where data sets by name are, or are downloaded to. Default: DATASET_ROOT.
        limit: Only the first so many images.

    Raises:
        InputError: Nothing is there, or it cannot be used as a source of images.
    """
    if limit is not None and limit < 1:
        raise InputError(f"expected a limit of at least 1 image, got {limit}")
    name = re.sub(r"[-_]", "", str(source).lower())
    if isinstance(source, str) and name in DATASETS:
        return TorchvisionSource(name, root=root or DATASET_ROOT, split=split or "train", limit=limit)
    if root is not None:
        raise InputError(f"expected a root only with a data set's name ({', '.join(DATASETS)}), got it with {source}")
    path = Path(source)
    if path.suffix.lower() == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return ParquetSource(path, split=split, limit=limit)
    if split is not None:
        raise InputError(f"expected a split only with a data set's name or with Parquet, got it with {source}")
    if path.exists():
        return FolderSource(path, limit=limit)
    raise InputError(
        f"expected a path or a data set's name ({', '.join(DATASETS)}), got {source}{nearest(name, DATASETS)}"
    )


class FolderSource(EncodedSource):
    """Image files: class folders, a flat folder, or one file.

    Class folders are read as torchvision's ImageFolder does: the sub-folders' sorted names are the classes, each is
    searched recursively. A flat folder or a single file has no labels. Ids are paths relative to the folder;
    metadata: ``path``, and the columns of ``metadata.csv`` in the folder, if there is one (`index.metadata_csv`).
    Hidden files and files without one of IMAGE_SUFFIXES are ignored.

    Raises:
        InputError: No images, images beside class folders, sub-folders that are splits rather than classes, or whose
            name is not UTF-8, or a ``metadata.csv`` that does not fit.
    """

    def __init__(self, path: Path, *, limit: int | None = None) -> None:
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
            self._table = MetadataTable.read(path / METADATA_CSV, taken=self.metadata_types)
            self._table.check(self._id(file) for file, _ in (*((image, None) for image in images), *labelled))
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


class TorchvisionSource(EncodedSource):
    """A data set that torchvision knows, fetched to `root` if it is not there.

    Ids are ``<split>/<row>``. MNIST, CIFAR-10 and SVHN come as arrays and have no metadata; images of another shape
    than the one asked for are resized as files are. GTSRB comes as files; metadata: ``path``.

    Raises:
        InputError: An unknown name or split, or files that are neither there nor to be fetched.
    """

    def __init__(self, name: str, *, root: Path = DATASET_ROOT, split: str = "train", limit: int | None = None) -> None:
        if split not in ("train", "test"):
            raise InputError(f"{name}: expected the split train or test, got {split!r}")
        images, labels, class_names = _fetched(name, root.expanduser(), split)
        self.name = f"{name} ({split})"
        self.class_names = class_names
        self.labelled = True
        self._labels = [int(label) for label in labels[:limit]]
        self._ids = [f"{split}/{row:08d}" for row in range(len(self._labels))]
        self._files = images[:limit] if isinstance(images, list) else None
        self._arrays = None if isinstance(images, list) else ArraySource(images[:limit], self._labels, ids=self._ids)
        self.metadata_types = {} if self._files is None else {"path": str}

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, shape: Shape) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order."""
        if self._arrays is not None and self._arrays.natural_shape() == shape:
            return self._arrays.read(shape)
        return super().read(shape)

    def _encoded(self) -> Iterator[Encoded]:
        if self._arrays is not None:
            for record in self._arrays.read(self._arrays.natural_shape()):
                grey = len(record.image) == 1
                pixels = record.image[0] if grey else record.image.transpose(1, 2, 0)
                yield Encoded(record.id, Image.fromarray(pixels), record.label, record.metadata)
        for id_, file, label in zip(self._ids, self._files or (), self._labels, strict=self._files is not None):
            yield Encoded(id_, file, label, {"path": str(file)})


def _fetched(
    name: str, root: Path, split: str
) -> tuple[np.ndarray | list[Path], Sequence[int] | np.ndarray, tuple[str, ...]]:
    """The data set's images (an array of them, or files), its labels and its class names."""
    from torchvision import datasets

    train = split == "train"
    try:
        # torchvision prints its progress, and unpickles CIFAR-10: after checking its MD5, but NumPy 2.4 warns of it
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=np.exceptions.VisibleDeprecationWarning)
            match name:
                case "mnist":
                    mnist = datasets.MNIST(root, train=train, download=True)
                    return mnist.data.numpy(), mnist.targets.numpy(), tuple(mnist.classes)
                case "cifar10":
                    cifar = datasets.CIFAR10(root, train=train, download=True)
                    return cifar.data, cifar.targets, tuple(cifar.classes)
                case "svhn":
                    svhn = datasets.SVHN(root, split=split, download=True)
                    return svhn.data, svhn.labels, tuple("0123456789")
                case "gtsrb":
                    # `_samples`, as indexing the data set would decode its images, and without our checks
                    files, labels = zip(*datasets.GTSRB(root, split=split, download=True)._samples, strict=True)
                    return [Path(file) for file in files], labels, tuple(str(label) for label in range(43))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{name}: expected {root / DATASETS[name]}, or a connection to fetch it, got {error}; put the data set's "
            "original files there, or name another root"
        ) from error
    raise InputError(f"expected a data set of {', '.join(DATASETS)}, got {name!r}{nearest(name, DATASETS)}")


class ArraySource:
    """Images held in memory. They are never resized: their own shape, whatever its size, is the only one they have.

    Args:
        images: (n, c, h, w), (n, h, w, c) or (n, h, w); uint8 or floating point in [0, 1]. Not copied if uint8.
        labels: n integers, 0 or more.
        ids: n different strings. Default: the row in eight digits.
        class_names: In label order.
        metadata: Column -> n strings, integers, floats or booleans, or None; renamed as in `ParquetSource`.
        name: What an index records as its origin.

    Raises:
        InputError: Other shapes, types, lengths or ranges.
    """

    def __init__(
        self,
        images: np.ndarray | torch.Tensor,
        labels: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        *,
        ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
        name: str = "arrays",
    ) -> None:
        self.name = name
        self.class_names: tuple[str, ...] | None = None if class_names is None else tuple(class_names)
        self.labelled = labels is not None
        self._images = channels_first(to_numpy(images))
        if len(self) == 0:
            raise InputError("expected at least one image, got none")
        if self._images.dtype != np.uint8:
            self._images = np.concatenate([to_uint8(batch) for batch in self._batches()])
        self._labels = [None] * len(self) if labels is None else self._checked_labels(labels)
        self._ids = [f"{row:08d}" for row in range(len(self))] if ids is None else list(ids)
        self._expect_one_each("ids", self._ids)
        if len(set(self._ids)) != len(self):
            raise InputError(f"expected {len(self)} different ids, got {len(set(self._ids))}; make them unique")
        self.metadata_types: Mapping[str, type]
        self.metadata_types, self._columns = self._typed_columns(metadata or {})

    def __len__(self) -> int:
        return len(self._images)

    def natural_shape(self) -> Shape:
        """The arrays' shape."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def read(self, shape: Shape) -> Iterator[ImageRecord]:
        """All images in order; raises InputError for another shape than the arrays' own."""
        if shape != self.natural_shape():
            raise InputError(f"expected arrays of shape {shape}, got {self.natural_shape()}; resize them first")
        return self._records()

    def _records(self) -> Iterator[ImageRecord]:
        for row, image in enumerate(chain.from_iterable(map(to_uint8, self._batches()))):
            metadata = {name: values[row] for name, values in self._columns.items()}
            yield ImageRecord(self._ids[row], image, self._labels[row], metadata)

    def _batches(self) -> Iterator[Shaped[np.ndarray, "batch c h w"]]:
        for start in range(0, len(self), _BATCH):
            yield self._images[start : start + _BATCH]

    def _expect_one_each(self, what: str, values: Sized) -> None:
        if len(values) != len(self):
            raise InputError(f"expected {len(self)} {what}, one per image, got {len(values)}")

    def _checked_labels(self, labels: Sequence[int] | np.ndarray | torch.Tensor) -> list[int]:
        array = np.asarray(labels)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(f"expected labels as one row of integers, got {array.dtype} of shape {array.shape}")
        self._expect_one_each("labels", array)
        classes = len(self.class_names) if self.class_names is not None else np.inf
        if array.min() < 0 or array.max() >= classes:
            expected = "0 or more" if self.class_names is None else f"0 to {classes - 1}, as there are class names"
            raise InputError(f"expected labels of {expected}, got {array.min()} to {array.max()}")
        numbers: list[int] = array.tolist()
        return numbers

    def _typed_columns(
        self, metadata: Mapping[str, Sequence[Any]]
    ) -> tuple[dict[str, type], dict[str, list[str | int | float | bool | None]]]:
        import pyarrow as pa

        types: dict[str, type] = {}
        columns: dict[str, list[str | int | float | bool | None]] = {}
        for original, values in metadata.items():
            self._expect_one_each(f"values of {original!r}", values)
            try:
                column = pa.array(values)
            except (pa.ArrowException, OverflowError) as error:
                raise InputError(f"expected metadata {original!r} to be of one type, got {error}") from error
            kind = python_type(column.type)
            if kind is None:
                raise InputError(
                    f"expected metadata {original!r} as strings, integers, floats or booleans, got {column.type}"
                )
            name = free_name(original, types)
            types[name], columns[name] = kind, column.to_pylist()
        return types, columns
