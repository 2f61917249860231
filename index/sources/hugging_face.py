"""Exemplars from Hugging Face `datasets`: a folder that `save_to_disk` wrote, or a data set in Python."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmm_engine.index.arguments import checked, how_to_collect
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.sources.records import UnreadableImage
from tmm_engine.index.sources.tables import ROWS, TableSource

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

DICT_FILE = "dataset_dict.json"
STATE_FILE = "state.json"
INFO_FILE = "dataset_info.json"


class SavedDatasetSource(TableSource):
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; the package `datasets` is not needed.

    Ids are ``<split>/<row>``; see `TableSource`.

    Args:
        path: The folder.
        split: Of a DatasetDict, which.
        limit: Only the first so many rows.
        image_column: As for `ParquetSource`.
        label_column: As for `ParquetSource`.

    Raises:
        InputError: no such split, several and none chosen, damage, or as `TableSource`.
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
        folder = _saved_split(Path(path), split)
        state = _read_json(folder / STATE_FILE)
        own = str(state.get("_split") or folder.resolve().name)
        if split not in (None, own, folder.name):
            raise InputError(f"{path}: expected the split {own}, the only one it has, got {split!r}; leave it out")
        files = [folder / Path(each["filename"]).name for each in state.get("_data_files", [])]
        super().__init__(
            f"{Path(path).resolve().name} ({own})",
            own,
            [_arrow_shard(file) for file in files],
            image_column=image_column,
            label_column=label_column,
            limit=limit,
            folder=folder,
        )


class DatasetSource(TableSource):
    """A `datasets.Dataset`: its rows, as they were selected, shuffled or filtered; see `TableSource`.

    Args:
        dataset: The rows; images that are files are read from where they are.
        limit: Only the first so many rows.
        image_column: As for `ParquetSource`.
        label_column: As for `ParquetSource`.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        *,
        limit: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        split = str(dataset.split or "dataset")
        name = dataset.info.dataset_name or "dataset"
        super().__init__(
            f"{name} ({split})",
            split,
            [DatasetShard(dataset)],
            image_column=image_column,
            label_column=label_column,
            limit=limit,
            folder=Path(),
        )
        if dataset.format["type"] == "custom":
            self._remark(
                "the transform of the data set (with_transform, set_transform) is ignored: images are taken as they "
                "are stored; to apply it, pass a list of (image, label)"
            )


class ArrowShard:
    """A file of Arrow's stream format.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.format = path, path.name, "Arrow"
        self.rows = 0
        for batch in self._read():
            self.rows, self.schema = self.rows + len(batch), batch.schema
        if not self.rows:
            import pyarrow as pa

            with pa.memory_map(str(path)) as file:
                self.schema = pa.ipc.open_stream(file).schema

    def batches(self, columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
        """Batch by batch."""
        for batch in self._read():
            chosen = batch.select(list(columns))
            for start in range(0, len(chosen), ROWS):
                yield chosen.slice(start, ROWS)

    def _read(self) -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa

        with pa.memory_map(str(self.path)) as file:
            yield from pa.ipc.open_stream(file)


class DatasetShard:
    """A `datasets.Dataset` in memory or mapped from disk.

    Args:
        dataset: Whose rows it is.
    """

    def __init__(self, dataset: "datasets.Dataset") -> None:
        self._dataset = dataset.with_format("arrow")
        self.name, self.format = "the data set", "rows"
        self.rows: int = len(dataset)
        self.schema: pa.Schema = dataset.features.arrow_schema

    def batches(self, columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
        """Batch by batch."""
        for table in self._dataset.select_columns(list(columns)).iter(ROWS):
            yield from table.to_batches()


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return (path / DICT_FILE).is_file() or all((path / file).is_file() for file in (STATE_FILE, INFO_FILE))


def from_hugging_face(source: Any, split: str | None) -> "datasets.Dataset | None":
    """The `datasets.Dataset` that is meant; None where the source is nothing of that package.

    Raises:
        InputError: of a DatasetDict no split is chosen, or one that it does not have.
    """
    package = sys.modules.get("datasets")
    if package is None:
        return None
    if isinstance(source, package.IterableDatasetDict):
        raise InputError(
            f"expected a data set, got an IterableDatasetDict of the streams {', '.join(map(str, source))}; choose "
            f"one, and {how_to_collect(source)}"
        )
    if isinstance(source, package.DatasetDict):
        return source[_chosen(list(source), split, "the DatasetDict")]
    if not isinstance(source, package.Dataset):
        return None
    if split not in (None, str(source.split)):
        raise InputError(f"expected a split only of a DatasetDict, got {split!r} with a Dataset; leave it out")
    return source


def _saved_split(path: Path, split: str | None) -> Path:
    if not (path / DICT_FILE).is_file():
        return path
    chosen = _chosen([str(name) for name in _read_json(path / DICT_FILE).get("splits", [])], split, str(path))
    if Path(chosen).name != chosen or chosen == "..":
        raise InputError(f"{path / DICT_FILE}: expected splits that are folders beside it, got {chosen!r}")
    return path / chosen


def _chosen(splits: list[str], split: str | None, where: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        got = f"{split!r}{nearest(split, splits)}" if split else "none"
        raise InputError(f"{where}: expected one of the splits {', '.join(splits)}, got {got} (`split=…`)")
    return split


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected what `save_to_disk` writes, got {error}; save the data set again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected what `save_to_disk` writes, got a {type(content).__name__}; save it again")
    return content


def _arrow_shard(path: Path) -> ArrowShard | UnreadableImage:
    import pyarrow as pa

    try:
        return ArrowShard(path)
    except (pa.ArrowException, OSError) as error:
        reason = f"expected readable Arrow, got {error}; save the data set again"
        return UnreadableImage(path.name, reason, is_shard=True)
