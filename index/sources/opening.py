"""The source of images that a name or a path means."""

import re
from pathlib import Path

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.sources.datasets import DATASET_ROOT, DATASETS, TorchvisionSource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.hugging_face import SavedDatasetSource, is_saved
from tmm_engine.index.sources.lists import ListSource
from tmm_engine.index.sources.parquet import ParquetSource
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.sources.shards import shard_files
from tmm_engine.index.sources.text_tables import TEXT_TABLES


@checked
def open_source(
    source: str | Path,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """The source that a name or a path means.

    Args:
        source: A data set's name as a string (``mnist``, ``cifar10``, ``svhn``, ``gtsrb``; case, hyphens and
            underscores do not matter; write ``./mnist`` for a folder of that name), a folder of class folders, a flat
            folder of images, one image file, a Parquet file, a folder of Parquet shards, a folder that `datasets`
            wrote (`save_to_disk`), or a list of paths and labels (CSV, JSON Lines).
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
    name = re.sub(r"[-_]", "", str(source).lower())
    if isinstance(source, str) and name in DATASETS:
        return TorchvisionSource(name, root=Path(root or DATASET_ROOT), split=split or "train", limit=limit)
    if root is not None:
        raise InputError(f"expected a root only with a data set's name ({', '.join(DATASETS)}), got it with {source}")
    path, columns = Path(source), {"image_column": image_column, "label_column": label_column}
    table = _table_kind(path)
    if table is not None:
        return table(path, split=split, limit=limit, **columns)
    if column := next((name for name, value in columns.items() if value is not None), None):
        raise InputError(f"expected a column (`{column}=…`) only of a table, got it with {source}")
    if path.exists():
        return FolderSource(path, split=split, limit=limit)
    raise InputError(
        f"expected a path or a data set's name ({', '.join(DATASETS)}), got {source}{nearest(name, DATASETS)}"
    )


def _table_kind(path: Path) -> "type[ParquetSource | SavedDatasetSource | ListSource] | None":
    """What reads a path that is a table of images; None where it is none."""
    suffix = path.suffix.lower()
    if path.is_dir():
        if is_saved(path):
            return SavedDatasetSource
        return ParquetSource if shard_files(path, ".parquet") else None
    if suffix in TEXT_TABLES:
        return ListSource
    return ParquetSource if suffix == ".parquet" else None


def as_source(source: ImageSource | str | Path) -> ImageSource:
    """A source as it is; what a name or a path means, as `open_source`."""
    return open_source(source) if isinstance(source, str | Path) else source
