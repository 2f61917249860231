"""What a search is asked for: one set of options for the command line, Python and whoever answers."""

from dataclasses import dataclass, replace
from enum import StrEnum
from types import NoneType
from typing import Literal, TypedDict

import numpy as np

from tmm_engine.index.errors import InputError, member
from tmm_engine.rerank.settings import (
    DEFAULT_PRESET,
    ClosedForm,
    FixedPatch,
    IndexTrigger,
    Rank,
    TmmConfig,
    View,
    preset,
)


class Mode(StrEnum):
    """How exemplars are ranked: by descriptors that hold under noise, by TMM-NN, or by distance between features."""

    ROBUST = "robust"
    TMM = "tmm"
    L2 = "l2"
    COSINE = "cosine"


class Prefilter(StrEnum):
    """What chooses the candidates that TMM-NN scores."""

    L2 = "l2"
    COSINE = "cosine"
    UNION = "union"  # both rankings, taken in turn
    GLOBAL = "global"  # TMM-NN with the index's global trigger
    ROBUST = "robust"  # the index's descriptors


RECOGNITION = 0.7
"""The ratio of distances below which mode ``robust`` takes a query for a copy of an exemplar (Lowe, IJCV 2004)."""


OF_TMM = ("candidates", "prefilter", "config", "label", "together")
"""The options that mode ``tmm`` alone has."""


class SearchKeywords(TypedDict, total=False):
    """`SearchOptions` as keywords, for type checkers."""

    k: int
    mode: str | None
    candidates: int | None
    prefilter: str | None
    config: TmmConfig | str | None
    label: int | None
    together: bool
    stretch: bool | None
    recognition: float | Literal[False] | None
    where: str | None
    explain: bool
    alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """The options of `Engine.search`, the same for all its queries.

    Attributes:
        k: How many exemplars, at least 1; all are returned (and a note says so) where there are fewer.
        mode: ``robust``, ``tmm``, ``l2`` or ``cosine``. None: ``tmm`` where one of its own options is given
            (candidates, prefilter, config, label, together), else ``robust``.
        candidates: For ``tmm``: score only so many exemplars, at least 1, chosen by the prefilter. None scores all.
        prefilter: Of the candidates: ``l2``, ``cosine``, ``union`` of both; ``robust``, where the index has
            descriptors; or ``global``, where it has a global trigger. None is ``union``.
        config: For ``tmm``: a preset's name or a configuration. None is ``paper``.
        label: For ``tmm`` with a head tuned by steps: y_q; None takes the model's prediction.
        together: For ``tmm`` with triggers of the queries' own, and a list of them: optimise the triggers jointly,
            several times as fast. Without it each answer is bit for bit what it is alone; with it triggers differ
            slightly, since the optimisation amplifies rounding.
        stretch: Stretch each query's contrast to [0, 1] first, so that a darkened query is searched for as the original
            was. None: as the configuration says for ``tmm``, not for ``l2`` and ``cosine``; ``robust`` always does.
        recognition: Answer for a query as for the exemplar nearest to it, where that one's distance is a smaller part
            of the second nearest's than this, in (0, 1] (`rerank.recognise`). By the recogniser where the index has
            descriptors; else by what ranks, among candidates, if there are any. False: never. None: 0.7 for
            ``robust``, as the configuration says for ``tmm``, never for ``l2`` and ``cosine``. Where ``robust``
            recognises, the exemplar that the recogniser finds nearest may come first without being taken for the
            query: see `rerank.recognise.comes_first`.
        where: A filter in SQL over id, label, predicted class and metadata (`index.store.where`): exemplars outside
            are neither candidates nor scored nor tuned on, as if the index did not have them.
        explain: Also say why: the nearest exemplars of another class, prototypes, and the exemplars that pulled the
            decision most (`SearchResult.explanation`). Costs two scans over the stored features for all queries.
        alone: Pass each query of a list through the network alone: its answer is then bit for bit what it is without
            the others. By default those of ``robust``, ``l2`` and ``cosine`` pass together, several times as fast,
            and their features round otherwise, by about 1e-6 of the largest. (``tmm`` always passes each alone,
            unless `together` is given.)

    Raises:
        InputError: an unknown mode, prefilter or preset, an option out of range, or one that has no effect beside the
            others.
    """

    k: int = 10
    mode: str | None = None
    candidates: int | None = None
    prefilter: str | None = None
    config: TmmConfig | str | None = None
    label: int | None = None
    together: bool = False
    stretch: bool | None = None
    recognition: float | Literal[False] | None = None
    where: str | None = None
    explain: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        for name, (kinds, expected) in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (name == "label" and isinstance(value, bool)):
                raise InputError(f"{name}: expected {expected}, got {value!r}")
        object.__setattr__(self, "mode", self._mode())
        object.__setattr__(self, "k", _positive("k", self.k))
        if self.candidates is not None:
            object.__setattr__(self, "candidates", _positive("candidates", self.candidates))
        if self.prefilter is not None:
            object.__setattr__(self, "prefilter", member(Prefilter, self.prefilter))
        self._refuse_what_has_no_effect()
        Rank(recognition=self.threshold)  # its range

    def _mode(self) -> Mode:
        if self.mode is not None:
            return member(Mode, self.mode)
        return Mode.TMM if any(_given(getattr(self, name)) for name in OF_TMM) else Mode.ROBUST

    @property
    def tmm(self) -> TmmConfig:
        """The configuration of mode ``tmm``, with what these options say instead of it."""
        config = self._configured
        view = config.view if self.stretch is None else View(stretch=self.stretch)
        return replace(config, view=view, rank=replace(config.rank, recognition=self.threshold))

    @property
    def stretches(self) -> bool:
        """Whether queries and exemplars have their contrast stretched."""
        if self.stretch is None:
            return self.mode == Mode.ROBUST or (self.mode == Mode.TMM and self._configured.view.stretch)
        return self.stretch

    @property
    def threshold(self) -> float | None:
        """The ratio of recognition; None: no query is recognised."""
        if self.recognition is None:
            if self.mode == Mode.ROBUST:
                return RECOGNITION
            return self._configured.rank.recognition if self.mode == Mode.TMM else None
        return None if self.recognition is False else self.recognition

    @property
    def _configured(self) -> TmmConfig:
        config = DEFAULT_PRESET if self.config is None else self.config
        return preset(config) if isinstance(config, str) else config

    def _refuse_what_has_no_effect(self) -> None:
        if self.prefilter is not None and self.candidates is None:
            raise InputError("prefilter has no effect without candidates: say how many, or leave it out")
        if self.mode != Mode.TMM:
            for name in OF_TMM:
                if _given(getattr(self, name)):
                    raise InputError(f"{name} has no effect in mode {str(self.mode)!r}: leave it out, or search by tmm")
            if self.mode == Mode.ROBUST and self.stretch is False:
                raise InputError("stretch=False has no effect in mode 'robust', which always stretches: leave it out")
            return
        if self.alone:
            raise InputError("alone has no effect in mode 'tmm', which passes each query alone: leave it out")
        config = self._configured
        if self.together and isinstance(config.trigger, IndexTrigger | FixedPatch):
            raise InputError(
                f"together has no effect with trigger={config.trigger.kind}: nothing is optimised for a query; leave "
                f"it out, or search with the queries' own triggers (the preset 'paper', or trigger=query)"
            )
        if self.label is not None and isinstance(config.head, ClosedForm):
            raise InputError(
                "label has no effect with a head in closed form (head=discriminant), which looks at no labels; leave "
                "it out"
            )


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "config": ((TmmConfig, str, NoneType), "a preset's name or a TmmConfig"),
    "label": ((int, np.integer, NoneType), "a class index"),
    "alone": ((bool, np.bool_), "True or False"),
    "together": ((bool, np.bool_), "True or False"),
    "explain": ((bool, np.bool_), "True or False"),
    "stretch": ((bool, NoneType), "True, False or None"),
    "where": ((str, NoneType), "a condition in SQL"),
}


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)


def _given(value: object) -> bool:
    return value is not None and value is not False  # the label 0 is one
