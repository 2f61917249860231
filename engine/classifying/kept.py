"""The calibrations of an index: in its folder, or in memory."""

from tmm_engine.classifying.calibration import OWN, Calibration, check_name, names_of
from tmm_engine.index.errors import InputError
from tmm_engine.options import SearchOptions
from tmm_engine.snapshot import Snapshot


class KeptCalibrations:
    """By name; those of an index on disk are files in it, which other processes see."""

    def __init__(self) -> None:
        self._in_memory: dict[str, Calibration] = {}

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

    def _names(self, snapshot: Snapshot) -> list[str]:
        return [*self._in_memory] if snapshot.path is None else names_of(snapshot.path)

    def _named(self, name: str, snapshot: Snapshot) -> Calibration:
        if snapshot.path is not None:
            return Calibration.load(snapshot.path, name)
        if name not in self._in_memory:
            raise InputError(f"no calibration {name!r}: there are {', '.join(self._in_memory) or 'none'}")
        return self._in_memory[name]
