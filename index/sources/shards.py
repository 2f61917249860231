"""Files that are the shards of a data set, and the splits that their names and folders tell."""

import re
from collections.abc import Sequence
from pathlib import Path

from tmm_engine.index.errors import InputError, nearest

_NUMBERED = re.compile(r"-\d+-of-\d+(-[0-9a-f]{8,})?$")
_ANONYMOUS = re.compile(r"\d*|(part|data|shard)[-_]?\d.*")
_DEEPEST = 2  # folders below the one that is given


def shard_files(path: Path, suffix: str) -> list[Path]:
    """The files of this suffix in a folder, or a few folders deeper where there are none; hidden ones left out."""
    for depth in range(_DEEPEST + 1):
        found = sorted(path.glob("/".join(["[!._]*"] * depth + [f"[!.]*{suffix}"])))
        if found:
            return found
    return []


def split_shards(path: Path, suffix: str, split: str | None, *, numbers: str = "") -> tuple[str, list[Path]]:
    """What ids begin with, and the split's files in name order.

    A split is the first part of the files' names (``train-00000-of-00002.parquet``), or the folder that they lie in
    where they are only numbered (``train/0000.parquet``), with the folders above, but for ``data``, where those differ.

    Args:
        path: A file, or a folder.
        suffix: Of files in a folder, as ``.parquet``.
        split: Which; None where there is one.
        numbers: A pattern of what else numbers a file, at the end of its name.

    Raises:
        InputError: no files, no such split, or several and none chosen.
    """
    files = [path] if path.is_file() else shard_files(path, suffix)
    if not files:
        raise InputError(f"{path}: expected a file or a folder with {suffix} files, found none; check the path")
    found: dict[tuple[str, ...], list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file, path, numbers), []).append(file)
    splits = _named(list(found.items()))
    if split is None and len(splits) == 1:
        return (path.stem, files) if path.is_file() else next(iter(splits.items()))
    if split not in splits:
        got = f"{split!r}{nearest(split, splits)}" if split else "none"
        raise InputError(f"{path}: expected one of the splits {', '.join(splits)}, got {got} (`split=…`)")
    return split, splits[split]


def _split_of(file: Path, path: Path, numbers: str) -> tuple[str, ...]:
    """The folders that tell a file's configuration, and its split."""
    folders = [] if file == path else [name for name in file.relative_to(path).parts[:-1] if name != "data"]
    name = _NUMBERED.sub("", file.stem)
    name = re.sub(numbers, "", name) if numbers else name
    if _ANONYMOUS.fullmatch(name):
        name = folders.pop() if folders else file.resolve().parent.name
    return (*folders, name)


def _named(found: Sequence[tuple[tuple[str, ...], list[Path]]]) -> dict[str, list[Path]]:
    """The splits by their names, with the folders above where these differ."""
    one = len({key[:-1] for key, _ in found}) == 1
    return {key[-1] if one else "/".join(key): files for key, files in found}
