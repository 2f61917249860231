"""What `Engine.search` is asked for: its options, as they are written and as they were checked."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, TypedDict

import numpy as np

from tmm_engine.index.errors import InputError, member
from tmm_engine.index.progress import Progress
from tmm_engine.rerank.settings import TmmConfig, preset


class Mode(StrEnum):
    """How exemplars are ranked: by TMM-NN, or by distance between features."""

    TMM = "tmm"
    L2 = "l2"
    COSINE = "cosine"


class Prefilter(StrEnum):
    """What chooses the candidates that TMM-NN scores."""

    L2 = "l2"
    COSINE = "cosine"
    UNION = "union"  # both rankings, taken in turn
    GLOBAL = "global"  # TMM-NN with the index's global trigger


class SearchOptions(TypedDict, total=False):
    """The options of `Engine.search`, for type checkers."""

    k: int
    mode: str
    candidates: int | None
    prefilter: str
    config: TmmConfig | str
    label: int | None
    together: bool
    stretch: bool | None
    recognition: float | Literal[False] | None
    where: str | None
    progress: Progress


@dataclass(frozen=True, slots=True)
class Request:
    """Checked options of a search, the same for all its queries; see `Engine.search` for what they mean.

    Attributes:
        k: At least 1.
        mode: How exemplars are ranked.
        candidates: At least 1; None is all.
        prefilter: What chooses the candidates.
        config: Its `stretch` and `recognition` are what this search does, in every mode.
        label: y_q; None is the model's prediction.
        together: Whether triggers are optimised jointly.
    """

    k: int
    mode: Mode
    candidates: int | None
    prefilter: Prefilter
    config: TmmConfig
    label: int | None
    together: bool

    @classmethod
    def checked(
        cls,
        *,
        k: int,
        mode: str,
        candidates: int | None,
        prefilter: str,
        config: TmmConfig | str,
        label: int | None,
        together: bool,
        stretch: bool | None,
        recognition: float | Literal[False] | None,
    ) -> "Request":
        """From the options of `Engine.search`.

        Raises:
            InputError: an unknown mode, prefilter or preset, or an option out of range.
        """
        chosen, config = member(Mode, mode), preset(config) if isinstance(config, str) else config
        if stretch is None:
            stretch = chosen is Mode.TMM and config.stretch
        if recognition is None:
            recognition = config.recognition if chosen is Mode.TMM else False
        return cls(
            k=_positive("k", k),
            mode=chosen,
            candidates=None if candidates is None else _positive("candidates", candidates),
            prefilter=member(Prefilter, prefilter),
            config=replace(config, stretch=stretch, recognition=None if recognition is False else recognition),
            label=label,
            together=together,
        )


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)
