"""The source of images that a name or a path means."""

import re
from pathlib import Path

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.sources.datasets import DATASET_ROOT, DATASETS, TorchvisionSource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.parquet import ParquetSource
from tmm_engine.index.sources.records import ImageSource


@checked
def open_source(
    source: str | Path, *, split: str | None = None, root: str | Path | None = None, limit: int | None = None
) -> ImageSource:
    """The source that a name or a path means.

    Args:
        source: A data set's name as a string (``mnist``, ``cifar10``, ``svhn``, ``gtsrb``; case, hyphens and
            underscores do not matter; write ``./mnist`` for a folder of that name), a folder of class folders, a flat
            folder of images, one image file, a Parquet file, or a folder of Parquet shards.
        split: Of a data set ``train`` (default) or ``test``; of Parquet shards the first part of their names; of a
            folder whose sub-folders are splits the name of one.
        root: Where data sets by name are, or are downloaded to. Default: DATASET_ROOT.
        limit: Only the first so many images.

    Raises:
        InputError: Nothing is there, or it cannot be used as a source of images.
    """
    if limit is not None and limit < 1:
        raise InputError(f"expected a limit of at least 1 image, got {limit}")
    name = re.sub(r"[-_]", "", str(source).lower())
    if isinstance(source, str) and name in DATASETS:
        return TorchvisionSource(name, root=Path(root or DATASET_ROOT), split=split or "train", limit=limit)
    if root is not None:
        raise InputError(f"expected a root only with a data set's name ({', '.join(DATASETS)}), got it with {source}")
    path = Path(source)
    if path.suffix.lower() == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return ParquetSource(path, split=split, limit=limit)
    if path.exists():
        return FolderSource(path, split=split, limit=limit)
    raise InputError(
        f"expected a path or a data set's name ({', '.join(DATASETS)}), got {source}{nearest(name, DATASETS)}"
    )


def as_source(source: ImageSource | str | Path) -> ImageSource:
    """A source as it is; what a name or a path means, as `open_source`."""
    return open_source(source) if isinstance(source, str | Path) else source
