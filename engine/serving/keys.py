"""Keys: who may read, and who may also change an index."""

import hmac
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tmm_engine.index.errors import InputError

HEADER = "api-key"
WRITING, READING = "TMM_ENGINE_API_KEY", "TMM_ENGINE_READ_ONLY_API_KEY"
SHORTEST = 8


class Right(StrEnum):
    """What a key allows, as a file of keys spells it."""

    READ = "read-only"
    WRITE = "read-write"


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """The keys of a server; without any, everybody may do everything.

    Attributes:
        rights: By key.
    """

    rights: tuple[tuple[str, Right], ...] = ()

    @classmethod
    def given(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> "Keys":
        """Those of a file, with a line ``read-only KEY`` or ``read-write KEY`` for each, and of the environment.

        Raises:
            InputError: the file cannot be read, or a line or a key is of another form.
        """
        named = ((WRITING, Right.WRITE), (READING, Right.READ))
        found = [(environment[name], right, name) for name, right in named if environment.get(name)]
        found += [] if file is None else _listed(file)
        for key, _, where in found:
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"{where}: expected a key of at least {SHORTEST} letters, digits and signs without spaces; make "
                    f'one with python -c "import secrets; print(secrets.token_urlsafe())"'
                )
        return cls(tuple((key, right) for key, right, _ in found))

    def __bool__(self) -> bool:
        return bool(self.rights)

    def right_of(self, key: str | None) -> Right | None:
        """What a request with this key may do; None: nothing. Takes as long for every key that is wrong."""
        if not self.rights:
            return Right.WRITE
        given = (key or "").encode()
        found = [right for known, right in self.rights if hmac.compare_digest(known.encode(), given)]
        return max(found, key=[*Right].index, default=None)


def _listed(file: Path) -> Iterator[tuple[str, Right, str]]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"expected a file of keys, got {file} ({error})") from None
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] not in [*Right]:
            raise InputError(f"{file}, line {number}: expected 'read-only KEY' or 'read-write KEY'")
        yield words[1], Right(words[0]), f"{file}, line {number}"
