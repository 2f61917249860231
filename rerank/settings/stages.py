"""The stages of TMM-NN, the ways there are to do each, and the settings of each way alone."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from tmm_engine.rerank.settings.fields import Stage, setting

MIN_RECOGNITION = 0.01  # below it even a copy's rounding decides


class Blend(StrEnum):
    """How an image x and the trigger τ become x^t.

    The paper says it three ways; the authors' code agrees with PRINTED, clamped.
    """

    PRINTED = "printed"  # x·ω + τ·(1−ω)     Algorithm 1, line 2
    SWAPPED = "swapped"  # x·(1−ω) + τ·ω     "trigger intensity ω"
    SCALED = "scaled"  # x + ω·τ             §3.5, "modulate its magnitude with a factor ω"
    ADDED = "added"  # x + τ                 Eqs. 1–3, 8

    def weights(self, intensity: float) -> tuple[float, float]:
        """(weight of the image, weight of the trigger) at intensity ω."""
        match self:
            case Blend.PRINTED:
                return intensity, 1.0 - intensity
            case Blend.SWAPPED:
                return 1.0 - intensity, intensity
            case Blend.SCALED:
                return 1.0, intensity
            case Blend.ADDED:
                return 1.0, 1.0


class Trigger(StrEnum):
    """Where τ comes from."""

    QUERY = "query"
    GLOBAL = "global"
    FIXED_PATCH = "fixed-patch"
    PATCH = "patch"


class Tuning(StrEnum):
    """How the dummy class's row of the head is found."""

    ADAM = "adam"
    DISCRIMINANT = "discriminant"


class Score(StrEnum):
    """What exemplars are ranked by, where the head was tuned by steps."""

    LOG_ODDS = "log-odds"  # z_C − logsumexp(z_0..C−1): ranks as P(dummy) does, without its ties  Eq. 4
    LOGIT = "logit"  # z_C


@dataclass(frozen=True, slots=True, kw_only=True)
class View(Stage):
    """How query and exemplars are looked at."""

    stretch: bool = setting("stretch", False, "stretch the contrast of query and exemplars to [0, 1] first")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Optimised(Stage):
    """τ found by Adam on Eq. 8."""

    steps: int = setting("trigger.steps", 300, "at most so many Adam steps on Eq. 8", low=0, source="Eq. 8")
    lr: float = setting("trigger.lr", 0.015, "Adam's learning rate, in pixel units", low=0.0, source="Eq. 8")
    tolerance: float = setting(
        "trigger.tolerance", 0.04, "stop once the best loss fell by less than this share in ten steps", low=0.0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTrigger(_Optimised):
    """τ optimised for the query, every pixel (Eq. 8)."""

    kind: ClassVar[Trigger] = Trigger.QUERY


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchTrigger(_Optimised):
    """T2: a 3×3 patch at the top-left, its pixels optimised for the query (§4.8.1)."""

    kind: ClassVar[Trigger] = Trigger.PATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPatch(Stage):
    """T1: a white 3×3 patch at the top-left (§4.8.1)."""

    kind: ClassVar[Trigger] = Trigger.FIXED_PATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexTrigger(Stage):
    """The index's global trigger, optimised once for all exemplars when it was built (Eq. 2); see `GlobalRecipe`."""

    kind: ClassVar[Trigger] = Trigger.GLOBAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Blending(Stage):
    """How the trigger is put into an image."""

    formula: Blend = setting("blend", Blend.PRINTED, "how image and trigger are combined", source="Alg. 1, Eqs. 1–3")
    clamp: bool = setting("clamp", True, "clamp a triggered image to [0, 1]")
    intensity: float | None = setting(
        "intensity", None, "ω; none: the standard deviation of the query's pixels", low=0.0, high=1.0, source="§4.3.2"
    )

    def weights(self, intensity: float) -> tuple[float, float]:
        """(weight of the image, weight of the trigger) at intensity ω."""
        return self.formula.weights(intensity)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedHead(Stage):
    """The whole head, tuned by Adam's steps on Eq. 3 (§4.3.1)."""

    kind: ClassVar[Tuning] = Tuning.ADAM
    epochs: int = setting("head.epochs", 1, "passes over the tuning exemplars", low=0, source="§4.3.1")
    min_steps: int = setting(
        "head.min_steps", 235, "never fewer steps than this: 235 is one epoch of 60,000", low=1, source="§4.3.1"
    )
    lr: float = setting("head.lr", 1e-3, "Adam's learning rate for the head", low=0.0, source="§4.3.1")
    batch: int = setting("head.batch", 256, "exemplars in a step; both query terms are in every one", low=1)
    ewc_lambda: float = setting("head.ewc_lambda", 1.0, "λ of the EWC penalty", low=0.0, source="Eq. 3")
    score: Score = setting("head.score", Score.LOG_ODDS, "what exemplars are ranked by", source="Eq. 4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm(Stage):
    """The dummy class's row alone, in closed form (`rerank.discriminant`)."""

    kind: ClassVar[Tuning] = Tuning.DISCRIMINANT
    shrinkage: float = setting(
        "head.shrinkage", 0.1, "added to every variance, as a share of the mean variance", low=1e-6
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank(Stage):
    """What is made of the scores."""

    fusion: float = setting(
        "fusion", 0.0, "above 0: rank by confidence + fusion · cosine similarity of clean features", low=0.0
    )
    recognition: float | None = setting(
        "recognition",
        None,
        "below this ratio of the nearest distance to the second nearest the query is answered for as the nearest "
        "exemplar; none: never",
        low=MIN_RECOGNITION,
        high=1.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Stage):
    """Which exemplars the head is found on; all are scored, or all candidates."""

    max_exemplars: int = setting(
        "sample.max_exemplars",
        60_000,
        "above it a seeded random sample",
        low=1,
    )
    companions: int = setting(
        "sample.companions", 1_000, "with candidates: so many random other exemplars beside them", low=0
    )


AnyTrigger = QueryTrigger | PatchTrigger | FixedPatch | IndexTrigger
AnyHead = TunedHead | ClosedForm

STAGES: dict[str, tuple[type[Stage], ...]] = {
    "view": (View,),
    "trigger": (QueryTrigger, PatchTrigger, FixedPatch, IndexTrigger),
    "blending": (Blending,),
    "head": (TunedHead, ClosedForm),
    "rank": (Rank,),
    "sample": (Sample,),
}
"""The stages of a configuration, in order, and the ways there are to do each."""

KINDS = {"trigger": Trigger, "head": Tuning}
"""Stages of which one way is chosen, by a setting of the stage's own name."""
