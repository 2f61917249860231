"""The calibrations of an index: in its folder, or in memory."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tmm_engine.classifying.calibrating import calibrate_on_itself
from tmm_engine.classifying.calibration import OWN, Calibration, check_name, described, names_of
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.cache import KeptFiles
from tmm_engine.index.store.manifest import CACHE
from tmm_engine.options import SearchOptions
from tmm_engine.snapshot import Snapshot

REMEMBERED = 32  # calibrations on the index itself, of the last options


@dataclass(frozen=True, slots=True)
class OwnCalibrations(KeptFiles):
    """Calibrations of one version of an index on itself."""

    suffix = ".calibration"

    def load(self, options: str) -> Calibration | None:
        """The one for these options; None if there is none, or it is of other content, or damaged."""
        content = self.read(_file_name(options))
        try:
            return None if content is None else Calibration.of_text(json.loads(content)["calibration"])
        except (KeyError, TypeError, ValueError):
            return None

    def save(self, options: str, calibration: Calibration, exemplars: int) -> None:
        """Keep one."""
        text = json.dumps({"exemplars": exemplars, "calibration": calibration.to_text()})

        def writer(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        self.write(_file_name(options), writer)

    def count(self, file: BinaryIO) -> int:
        """Of how many exemplars a file is."""
        return int(json.loads(file.read())["exemplars"])


class KeptCalibrations:
    """By name; those of an index on disk are files in it, which other processes see.

    Calibrations on the index itself are remembered by options, and those without a filter are kept among its caches.
    """

    def __init__(self) -> None:
        self._in_memory: dict[str, Calibration] = {}
        self._own: dict[tuple[str, str], Calibration] = {}

    def keep(self, calibration: Calibration, snapshot: Snapshot) -> None:
        """Under its name, in place of one that was.

        Raises:
            IndexStateError: the index's folder cannot be written to.
        """
        if snapshot.path is None:
            self._in_memory[calibration.name] = calibration
        else:
            calibration.save(snapshot.path)

    def asked_for(
        self, calibration: Calibration | str | None, options: SearchOptions, snapshot: Snapshot
    ) -> Calibration | None:
        """What `Engine.classify` is given, found and checked; None: the exemplars themselves.

        Raises:
            InputError: there is none of this name, or it was made for another search.
            IndexStateError: it is damaged.
        """
        if not isinstance(calibration, Calibration | str | None):
            raise InputError(f"calibration: expected a name or what `calibrate` returned, got {calibration!r}")
        if calibration == OWN:
            return None
        if not isinstance(calibration, Calibration):
            name = check_name(str(options.mode) if calibration is None else calibration)
            if calibration is None and name not in self._names(snapshot):
                return None
            calibration = self._named(name, snapshot)
        calibration.check(options, snapshot.manifest.content if snapshot.manifest else "")
        return calibration

    def of_itself(self, current: Snapshot, options: SearchOptions, snapshot: Snapshot) -> Calibration:
        """That of the exemplars, each left out in turn, computed once for each version of the index and options.

        Args:
            current: What is searched.
            options: How.
            snapshot: What the engine shows, which a filter of the options may have narrowed.

        Raises:
            InputError: as `calibrate_on_itself`.
        """
        content, asked = snapshot.manifest.content if snapshot.manifest else "", json.dumps(described(options))
        found = self._own.get((content, asked))
        if found is None:
            found = _of_itself(current, options, asked)
            while len(self._own) >= REMEMBERED:
                self._own.pop(next(iter(self._own)), None)
            self._own[content, asked] = found
        return found

    def _names(self, snapshot: Snapshot) -> list[str]:
        return [*self._in_memory] if snapshot.path is None else names_of(snapshot.path)

    def _named(self, name: str, snapshot: Snapshot) -> Calibration:
        if snapshot.path is not None:
            return Calibration.load(snapshot.path, name)
        if name not in self._in_memory:
            raise InputError(f"no calibration {name!r}: there are {', '.join(self._in_memory) or 'none'}")
        return self._in_memory[name]


def _of_itself(current: Snapshot, options: SearchOptions, asked: str) -> Calibration:
    """From the index's cache, or computed and put there; what a filter leaves is not kept."""
    if current.path is None or current.manifest is None or current.where is not None:
        return calibrate_on_itself(current, options)
    cache = OwnCalibrations(current.path / CACHE, current.manifest.content)
    found = cache.load(asked)
    if found is None:
        found = calibrate_on_itself(current, options)
        cache.save(asked, found, len(current.store))
    return found


def _file_name(options: str) -> str:
    return f"{OWN} {hashlib.sha256(options.encode()).hexdigest()[:16]}"
