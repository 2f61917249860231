"""What lies in a folder of images: images, sub-folders, and what is left out, counted."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.images import IMAGE_SUFFIXES

UNREAD_SUFFIXES = frozenset((
    ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".nef", ".orf",
    ".psd", ".raw", ".rw2", ".svg", ".tga", ".xcf",
))  # fmt: skip
"""Of pictures in formats that are not read: they count as images that cannot be read."""

LEFTOVERS = frozenset(("__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"))
"""Folders that systems and archives leave behind, in lower case: they are never classes."""

_SPLIT = re.compile(
    r"(?:(train|training)|(test|testing)|(val|valid|validation|dev|eval|evaluation))"
    r"(?:[-_ ]?(?:set|data|images|split|\d{4}))?"
)


@dataclass(frozen=True, slots=True)
class Listing:
    """One folder, or one with all below it.

    Attributes:
        folders: Sub-folders in order of name, without hidden ones and leftovers.
        images: Files with a suffix of images, in order; those of `UNREAD_SUFFIXES` and dangling links among them.
        left_out: Everything else: what it is -> how many.
    """

    folders: list[Path]
    images: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, folder: Path) -> "Listing":
        """What lies directly in the folder.

        Raises:
            InputError: it may not be listed.
        """
        listing = cls([], [])
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    listing._sort_in(folder / entry.name, is_folder=entry.is_dir())
        except OSError as error:
            raise InputError(
                f"{folder}: expected a folder that can be listed, got {error.strerror}; allow it, or move it away"
            ) from error
        return listing

    @classmethod
    def below(cls, folder: Path, *, around: Sequence[Path]) -> "Listing":
        """All images below the folder, a folder's own before those of its sub-folders.

        Args:
            folder: Where to look.
            around: The folders that it lies in; a link to one of them is left out.

        Raises:
            InputError: a folder may not be listed.
        """
        listing = cls.of(folder)
        around = (*around, folder)
        for sub in listing.folders:
            if sub.is_symlink() and any(map(sub.samefile, around)):
                listing.left_out["circular link"] += 1
                continue
            inner = cls.below(sub, around=around)
            listing.images.extend(inner.images)
            listing.left_out.update(inner.left_out)
        return listing

    def _sort_in(self, path: Path, *, is_folder: bool) -> None:
        suffix = path.suffix.lower()
        if is_folder and path.name.lower() in LEFTOVERS:
            self.left_out[f"folder {path.name}"] += 1
        elif path.name.startswith("."):
            if is_folder or suffix in IMAGE_SUFFIXES:
                self.left_out["hidden"] += 1
        elif is_folder:
            self.folders.append(path)
        elif suffix in IMAGE_SUFFIXES or suffix in UNREAD_SUFFIXES:
            self.images.append(path)
        else:
            self.left_out[suffix or "without suffix"] += 1


def counted(what: Counter[str]) -> str:
    """As in `5 .heic, 1 .txt`, the commonest first."""
    return ", ".join(f"{count:,} {name}" for name, count in what.most_common())


def split_names(names: Iterable[str]) -> list[str]:
    """Those of the names that are splits of a data set; none where the names are those of classes.

    They are splits if there is nothing else, or at least two kinds of them: ``train`` beside ``bus`` is a class.
    """
    names = list(names)
    matches = {name: match for name in names if (match := _SPLIT.fullmatch(name.lower()))}
    kinds = {tuple(map(bool, match.group(1, 2, 3))) for match in matches.values()}
    return list(matches) if len(matches) == len(names) or len(kinds) > 1 else []
