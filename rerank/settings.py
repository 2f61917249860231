"""Every choice TMM-NN leaves open, named; and the presets. A result always carries the configuration that made it."""

import math
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from tmm_engine.index.errors import InputError, member, nearest

MAX_SEED = 2**63 - 1  # what torch and NumPy both take
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

    QUERY = "query"  # optimised for the query, every pixel      Eq. 8
    GLOBAL = "global"  # the index's, optimised once for all exemplars             Eq. 2
    FIXED_PATCH = "fixed-patch"  # T1: a white 3×3 patch at the top-left   §4.8.1
    PATCH = "patch"  # T2: the same patch, its pixels optimised            §4.8.1


class Tuning(StrEnum):
    """How the dummy class's row of the head is found."""

    ADAM = "adam"  # the whole head, by steps on Eq. 3                        §4.3.1
    DISCRIMINANT = "discriminant"  # that row alone, in closed form: see rerank.discriminant


class Score(StrEnum):
    """What exemplars are ranked by, where the head was tuned by steps."""

    LOG_ODDS = "log-odds"  # z_C − logsumexp(z_0..C−1): ranks as P(dummy) does, without its ties  Eq. 4
    LOGIT = "logit"  # z_C


@dataclass(frozen=True, slots=True, kw_only=True)
class TmmConfig:
    """One reading of TMM-NN. The defaults are the preset ``paper``: Algorithm 1 as printed, clamped.

    Attributes:
        blend: How image and trigger are combined.
        clamp: Whether a triggered image is clamped to the pixel range [0, 1].
        trigger: Where the trigger comes from.
        stretch: Whether the query's contrast is stretched to [0, 1] first (`rerank.contrast`).
        tuning: How the dummy class's row of the head is found.
        score: What exemplars are ranked by; with `Tuning.DISCRIMINANT` always the decorrelated similarity.
        fusion: Above 0, exemplars are ranked by confidence + fusion · cosine similarity of clean features.
        recognition: In (0, 1]: where the nearest exemplar's distance is a smaller part of the second nearest's than
            this, the query is answered for as that exemplar (`rerank.recognise`); None never does so.
        intensity: ω in [0, 1]; None takes the standard deviation of the query's pixels (§4.3.2).
        trigger_steps: At most so many Adam steps on Eq. 8.
        trigger_lr: Adam's learning rate for the trigger, in pixel units.
        trigger_tolerance: Stop once the best loss of Eq. 8 has fallen by less than this fraction in the last 10 steps.
        tuning_epochs: Passes over the tuning exemplars.
        tuning_min_steps: Never fewer steps than this: 235 is one epoch of 60,000, and far fewer make retrieval fail.
        tuning_lr: Adam's learning rate for the head.
        tuning_batch: Exemplars in a step; both query terms are in every step.
        ewc_lambda: λ of the EWC penalty.
        shrinkage: Added to every variance of the discriminant, as a share of the mean variance.
        max_tuning_exemplars: Above it a seeded random sample tunes the head; all are still scored.
        candidate_companions: With a candidate set, so many random other exemplars join it for the tuning.
        seed: Of the trigger's start, the batches and the samples; at most 2⁶³−1.
    """

    blend: Blend = Blend.PRINTED
    clamp: bool = True
    trigger: Trigger = Trigger.QUERY
    stretch: bool = False
    tuning: Tuning = Tuning.ADAM
    score: Score = Score.LOG_ODDS
    fusion: float = 0.0
    recognition: float | None = None
    intensity: float | None = None
    trigger_steps: int = 300
    trigger_lr: float = 0.015
    trigger_tolerance: float = 0.04
    tuning_epochs: int = 1
    tuning_min_steps: int = 235
    tuning_lr: float = 1e-3
    tuning_batch: int = 256
    ewc_lambda: float = 1.0
    shrinkage: float = 0.1
    max_tuning_exemplars: int = 60_000
    candidate_companions: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("blend", Blend), ("trigger", Trigger), ("tuning", Tuning), ("score", Score)):
            object.__setattr__(self, name, member(kind, getattr(self, name)))
        for name in ("clamp", "stretch"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("trigger_steps", "tuning_epochs", "candidate_companions"):
            _require(name, getattr(self, name), minimum=0)
        _require("seed", self.seed, minimum=0, maximum=MAX_SEED)
        for name in ("tuning_min_steps", "tuning_batch", "max_tuning_exemplars"):
            _require(name, getattr(self, name), minimum=1)
        for name in ("trigger_lr", "trigger_tolerance", "tuning_lr", "ewc_lambda", "fusion"):
            _require(name, getattr(self, name), minimum=0.0)
        _require("shrinkage", self.shrinkage, minimum=1e-6)
        if self.intensity is not None:
            _require("intensity", self.intensity, minimum=0.0, maximum=1.0)
        if self.recognition is not None:
            _require("recognition", self.recognition, minimum=MIN_RECOGNITION, maximum=1.0)

    def with_settings(self, settings: list[str]) -> "TmmConfig":
        """This configuration with 'name=value' strings applied, as the command line takes them.

        Raises:
            InputError: an unknown name, or a value that is not of the setting's type or range.
        """
        known = {field.name: field.type for field in fields(self)}
        changes: dict[str, Any] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            name = name.strip().replace("-", "_")
            if name not in known:
                raise InputError(f"unknown TMM setting {name!r}{nearest(name, known)}; known: {', '.join(known)}")
            changes[name] = _parse(name, text.strip(), known[name])
        return replace(self, **changes)

    @property
    def before_tuning(self) -> tuple[Any, ...]:
        """What the triggered features of a query's exemplars depend on: configurations with the same share them."""
        return (
            self.stretch,
            self.blend,
            self.clamp,
            self.trigger,
            self.intensity,
            self.trigger_steps,
            self.trigger_lr,
            self.trigger_tolerance,
            self.max_tuning_exemplars,
            self.candidate_companions,
            self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the attributes."""
        return {name: str(value) if isinstance(value, StrEnum) else value for name, value in asdict(self).items()}


def _require(name: str, value: int | float, *, minimum: int | float, maximum: int | float = math.inf) -> None:
    whole = isinstance(minimum, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise InputError(f"{name}: expected a {'whole ' if whole else ''}number, got {value!r}")
    if not minimum <= value <= maximum or value == math.inf:
        raise InputError(f"{name}: expected a finite value in [{minimum:g}, {maximum:g}], got {value!r}")


def _parse(name: str, text: str, kind: Any) -> Any:
    if kind in (Blend, Trigger, Tuning, Score):
        return member(kind, text)
    try:
        if kind is bool:
            return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        if kind in (float, float | None):
            return None if text.lower() == "none" and kind is not float else float(text)
    except (KeyError, ValueError):
        raise InputError(f"{name}: cannot read {text!r} as {getattr(kind, '__name__', kind)}") from None
    raise AssertionError(f"no way to read a {kind}")


PRESETS = {
    "paper": TmmConfig(),
    "robust": TmmConfig(  # what the study in docs/REPRODUCTION.md found best
        stretch=True,
        trigger=Trigger.GLOBAL,
        intensity=0.1,
        tuning=Tuning.DISCRIMINANT,
        shrinkage=1.0,
        fusion=4.0,
        recognition=0.8,
    ),
}
DEFAULT_PRESET = "robust"


def preset(name: str) -> TmmConfig:
    """The named configuration.

    Raises:
        InputError: no such preset.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
