"""A calibration: how strange images look in their right class, and how far they are from what they are like."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from tmm_engine.classifying.conformal import p_values
from tmm_engine.index.errors import IndexStateError, InputError, nearest
from tmm_engine.index.files import replacing
from tmm_engine.options import Mode, SearchOptions

FOLDER = "calibrations"  # of an index; a calibration is no part of any version of it, but belongs to one
FORMAT = "tmm-engine calibration 1"
OWN = "leave-one-out"
NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Of one index, as it was, and one way to search it.

    Attributes:
        name: It is kept under; ``leave-one-out`` for the index's own exemplars.
        source: Where its images are from.
        own: Whether they are the index's own exemplars, each compared with all others.
        options: How the index was searched, as plain values.
        content: What the index held (`Manifest.content`); empty in memory.
        margins: A of the right class of each image, ascending (`classifying.conformal`).
        distances: Minus the score of the nearest class, of each image, ascending.
        notes: What should be known of it, in sentences.
    """

    name: str
    source: str
    own: bool
    options: dict[str, Any]
    content: str
    margins: Float64[np.ndarray, "n"]
    distances: Float64[np.ndarray, "n"]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.margins)

    def of_classes(self, margins: Float64[np.ndarray, "q classes"]) -> Float64[np.ndarray, "q classes"]:
        """p-values of classes."""
        return p_values(margins, self.margins)

    def familiarity(self, distances: Float64[np.ndarray, "q"]) -> Float64[np.ndarray, "q"]:
        """p-values of the distance to the nearest class: small for what is unlike everything."""
        return p_values(distances, self.distances)

    def guarantee(self, alpha: float) -> str:
        """What its sets promise, and what of that is worth how much, in a sentence or two."""
        share = f"{100 * (1 - alpha):g} of 100"
        if self.own:
            return (
                f"the set was made to hold the right class of {share} exemplars, each as if the others were the index; "
                f"new images are covered as often only if the model was not trained on the exemplars, else less often: "
                f"calibrate on labelled images that neither it nor the index has seen"
            )
        return (
            f"the set holds the right class of at least {share} images drawn like those of {self.source}, if neither "
            f"the model nor the index has learned from these; it promises nothing for others: darker, noisier, of "
            f"classes that the index does not have"
        )

    def check(self, options: SearchOptions, content: str) -> None:
        """Refuse searches that it was not made for.

        Raises:
            InputError: other options, or the index has changed.
        """
        asked = described(options)
        for name, before in self.options.items():
            if asked[name] != before:
                raise InputError(
                    f"the calibration {self.name!r} was made with {name} {before!r}, not {asked[name]!r}: ask for the "
                    f"same, or calibrate anew (`calibration=…`)"
                )
        if content != self.content:
            raise InputError(
                f"the calibration {self.name!r} was made when the index held other exemplars: calibrate anew "
                f"(`calibration=…`), or go without (`calibration='leave-one-out'`)"
            )

    def save(self, index: Path) -> None:
        """Write it into an index's folder, whole or not at all; one of the same name is replaced.

        Raises:
            IndexStateError: the folder cannot be written to.
        """
        text = self.to_text()
        sealed = {"format": FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest(), "calibration": text}
        try:
            (index / FOLDER).mkdir(exist_ok=True)
            with replacing(_path(index, self.name), durable=True) as written:
                written.write_text(json.dumps(sealed), encoding="utf-8")
        except OSError as error:
            raise IndexStateError(f"{index} cannot keep the calibration: {error.strerror or error}") from error

    @classmethod
    def load(cls, index: Path, name: str) -> "Calibration":
        """The inverse of `save`.

        Raises:
            InputError: there is none of this name.
            IndexStateError: it is damaged.
        """
        path = _path(index, name)
        if not path.is_file():
            known = names_of(index)
            raise InputError(
                f"{index} has no calibration {name!r}{nearest(name, known)}: it has {', '.join(known) or 'none'}"
            )
        try:
            sealed = json.loads(path.read_text(encoding="utf-8"))
            text = sealed["calibration"]
            if sealed["format"] != FORMAT or hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
                raise ValueError("its SHA-256 or its format is another")
            return cls.of_text(text)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise IndexStateError(f"{path}: damaged ({error}); delete it, and calibrate anew") from error

    def to_text(self) -> str:
        """Everything, as JSON."""
        arrays = {"margins": self.margins.tolist(), "distances": self.distances.tolist()}
        return json.dumps(asdict(self) | arrays)

    @classmethod
    def of_text(cls, text: str) -> "Calibration":
        """The inverse of `to_text`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        given = json.loads(text)
        arrays = {key: np.array(given[key], dtype=np.float64) for key in ("margins", "distances")}
        found = cls(**given | arrays | {"notes": tuple(given["notes"])})
        if not all(isinstance(text, str) for text in (found.name, found.source, *found.notes)) or not len(found):
            raise ValueError("its fields are of other kinds")
        return found


def described(options: SearchOptions) -> dict[str, Any]:
    """What of a search's options the scores depend on, as plain values."""
    told: dict[str, Any] = {
        "mode": str(options.mode),
        "k": options.k,
        "stretch": options.stretches,
        "recognition": options.threshold,
        "where": options.where,
    }
    if options.mode == Mode.TMM:
        prefilter = None if options.prefilter is None else str(options.prefilter)
        told |= {"candidates": options.candidates, "prefilter": prefilter, "config": options.tmm.to_json()}
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def check_name(name: str) -> str:
    """The name of a calibration that can be kept.

    Raises:
        InputError: it cannot be that of a file, or stands for something else.
    """
    if not NAME.fullmatch(name) or name == OWN:
        raise InputError(
            f"expected a calibration's name of letters, digits, '.', '-' and '_', other than {OWN!r}, got {name!r}"
        )
    return name


def names_of(index: Path) -> list[str]:
    """Of the calibrations that an index keeps."""
    return sorted(path.stem for path in (index / FOLDER).glob("*.json") if NAME.fullmatch(path.stem))


def _path(index: Path, name: str) -> Path:
    return index / FOLDER / f"{check_name(name)}.json"
