"""The source of images that a name, a path or rows in Python mean."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

from tmm_engine.index.arguments import checked, how_to_collect
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.datasets import DATASET_ROOT, DATASETS, TorchvisionSource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.hugging_face import DatasetSource, SavedDatasetSource, from_hugging_face, is_saved
from tmm_engine.index.sources.listing import Listing
from tmm_engine.index.sources.lists import ListSource
from tmm_engine.index.sources.pairs import PairSource, Rows
from tmm_engine.index.sources.parquet import ParquetSource
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.sources.shards import shard_files
from tmm_engine.index.sources.text_tables import TEXT_TABLES
from tmm_engine.index.sources.webdataset import WebDatasetSource, is_tar

SourceLike = ImageSource | str | Path | Rows
"""Whatever exemplars can come from: a source, a name or a path, or rows in Python."""


@checked
def open_source(
    source: SourceLike,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """The source that a name or a path means, or rows in Python.

    Args:
        source: A data set's name as a string (``mnist``, ``cifar10``, ``svhn``, ``gtsrb``; case, hyphens and
            underscores do not matter; write ``./mnist`` for a folder of that name), a folder of class folders, a flat
            folder of images, one image file, a Parquet file, a folder of Parquet shards, a folder that `datasets`
            wrote (`save_to_disk`), tar shards of WebDataset, or a list of paths and labels (CSV, JSON Lines); in a
            folder with images Parquet and tar files are left out. Or a `datasets.Dataset`, an array or a tensor of
            images, a torch `Dataset` or a list of (image, label).
        split: Of a data set ``train`` (default) or ``test``; of Parquet shards the first part of their names; of a
            folder whose sub-folders are splits the name of one.
        root: Where data sets by name are, or are downloaded to. Default: DATASET_ROOT.
        limit: Only the first so many images.
        image_column: Of a table, the images' column, where it has to be said.
        label_column: Of a table, the labels' column, where it has to be said.

    Raises:
        InputError: Nothing is there, or it cannot be used as a source of images.
    """
    if limit is not None and limit < 1:
        raise InputError(f"expected a limit of at least 1 image, got {limit}")
    columns = {"image_column": image_column, "label_column": label_column}
    if not isinstance(source, str | Path):
        return _rows_source(source, split=split, root=root, limit=limit, columns=columns)
    name = re.sub(r"[-_]", "", str(source).lower())
    if isinstance(source, str) and name in DATASETS:
        return TorchvisionSource(name, root=Path(root or DATASET_ROOT), split=split or "train", limit=limit)
    if root is not None:
        raise InputError(f"expected a root only with a data set's name ({', '.join(DATASETS)}), got it with {source}")
    path = Path(source)
    table = _table_kind(path)
    if table is not None:
        return table(path, split=split, limit=limit, **columns)
    _refuse_given(columns, "only of a table", str(source))
    if path.exists():
        return FolderSource(path, split=split, limit=limit)
    raise InputError(
        f"expected a path or a data set's name ({', '.join(DATASETS)}), got {source}{nearest(name, DATASETS)}"
    )


TableKind = type[ParquetSource | SavedDatasetSource | ListSource | WebDatasetSource]


def _table_kind(path: Path) -> TableKind | None:
    """What reads a path that is a table of images; None where it is none."""
    if not path.is_dir():
        if path.suffix.lower() in TEXT_TABLES:
            return ListSource
        if is_tar(path):
            return WebDatasetSource
        return ParquetSource if path.suffix.lower() == ".parquet" else None
    if is_saved(path):
        return SavedDatasetSource
    for suffix, kind in ((".parquet", ParquetSource), (".tar", WebDatasetSource)):
        files = shard_files(path, suffix)
        if files and not _has_images(path, depth=2 if files[0].parent == path else 1):
            return kind
    return None


def _has_images(folder: Path, *, depth: int) -> bool:
    """Whether there are images in the folder, or in its sub-folders so deep."""
    top = Listing.of(folder)
    return bool(top.images) or (depth > 0 and any(_has_images(sub, depth=depth - 1) for sub in top.folders))


def _rows_source(
    source: ImageSource | Rows,
    *,
    split: str | None,
    root: str | Path | None,
    limit: int | None,
    columns: Mapping[str, str | None],
) -> ImageSource:
    """A source as it is, or the one of rows in Python."""
    _refuse_given({"root": root}, "only with a data set's name", type(source).__name__)
    if isinstance(source, IterableDataset):
        raise InputError(f"expected rows with numbers, got {type(source).__name__}, a stream; {how_to_collect(source)}")
    dataset = from_hugging_face(source, split)
    if dataset is not None:
        return DatasetSource(dataset, limit=limit, **columns)
    _refuse_given({"split": split, **columns}, "only of a path or of Hugging Face's data sets", type(source).__name__)
    if isinstance(source, ImageSource):
        _refuse_given({"limit": limit}, "only of what is opened here", type(source).__name__)
        return source
    if isinstance(source, np.ndarray | torch.Tensor):
        return ArraySource(source[:limit])
    return PairSource(source, limit=limit)


def _refuse_given(options: Mapping[str, object], when: str, source: str) -> None:
    if given := next((name for name, value in options.items() if value is not None), None):
        raise InputError(f"expected `{given}=…` {when}, got it with {source}; leave it out")


def as_source(source: SourceLike) -> ImageSource:
    """A source as it is; what anything else means, as `open_source`."""
    return source if isinstance(source, ImageSource) else open_source(source)
