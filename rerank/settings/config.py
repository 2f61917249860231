"""One reading of TMM-NN as a whole, stage by stage; what a global trigger is made with; the presets."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields, replace
from enum import StrEnum
from typing import Any, TypeVar

from tmm_engine.index.errors import InputError, member, nearest
from tmm_engine.rerank.settings.fields import MAX_SEED, Setting, checked, described_field, parsed, setting
from tmm_engine.rerank.settings.stages import (
    KINDS,
    STAGES,
    AnyHead,
    AnyTrigger,
    Blending,
    ClosedForm,
    IndexTrigger,
    PatchTrigger,
    QueryTrigger,
    Rank,
    Sample,
    TunedHead,
    View,
)

OTHER_SPELLINGS = {
    "tuning": "head",
    "trigger_steps": "trigger.steps",
    "trigger_lr": "trigger.lr",
    "trigger_tolerance": "trigger.tolerance",
    "tuning_epochs": "head.epochs",
    "tuning_min_steps": "head.min_steps",
    "tuning_lr": "head.lr",
    "tuning_batch": "head.batch",
    "ewc_lambda": "head.ewc_lambda",
    "score": "head.score",
    "shrinkage": "head.shrinkage",
    "max_tuning_exemplars": "sample.max_exemplars",
    "candidate_companions": "sample.companions",
}
"""What settings were called before they belonged to stages, in scripts and in records."""


_FIELDS = {
    each.metadata["name"]: (stage, each) for stage, ways in STAGES.items() for way in ways for each in way.settings()
}
_NAMES = tuple(dict.fromkeys((*KINDS, *_FIELDS, "seed")))


@dataclass(frozen=True, slots=True, kw_only=True)
class TmmConfig:
    """One reading of TMM-NN. The defaults are the preset ``paper``: Algorithm 1 as printed, clamped.

    Attributes:
        view: How query and exemplars are looked at.
        trigger: Where τ comes from.
        blending: How it is put into an image.
        head: How the dummy class's row is found, and what that ranks by.
        rank: What is made of the scores.
        sample: Which exemplars the head is found on.
        seed: Of the trigger's start, the batches and the samples; at most 2⁶³−1.

    Raises:
        InputError: a value out of its range, or one that has no effect beside the others.
    """

    view: View = View()
    trigger: AnyTrigger = QueryTrigger()
    blending: Blending = Blending()
    head: AnyHead = TunedHead()
    rank: Rank = Rank()
    sample: Sample = Sample()
    seed: int = setting("seed", 0, "of the trigger's start, the batches and the samples", low=0, high=MAX_SEED)

    def __post_init__(self) -> None:
        for name, ways in STAGES.items():
            if not isinstance(getattr(self, name), ways):
                expected = " or ".join(way.__name__ for way in ways)
                raise InputError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        checked(_field("seed"), self.seed)
        if not self.draws:
            for name, default in (("seed", 0), ("sample", Sample())):
                if getattr(self, name) != default:
                    raise InputError(
                        f"{name} has no effect with trigger={self.trigger.kind} and head={self.head.kind}: nothing is "
                        f"drawn, the head is found on all exemplars; leave it out"
                    )

    @property
    def draws(self) -> bool:
        """Whether anything is drawn. With the index's trigger the closed form is of all exemplars, and nothing is."""
        return _draws(self.trigger, self.head)

    @property
    def triggering(self) -> tuple[Any, ...]:
        """What the triggered features of a query's exemplars depend on: configurations with the same share them."""
        return self.view, self.trigger, self.blending, self.sample, self.seed

    def with_seed(self, seed: int) -> "TmmConfig":
        """The same with another seed; the very same where nothing is drawn."""
        return replace(self, seed=seed) if self.draws else self

    def with_settings(self, settings: Iterable[str]) -> "TmmConfig":
        """This configuration with 'name=value' strings applied, as the command line takes them; the last counts.

        Raises:
            InputError: an unknown name, a value that is not of the setting's type or range, or a setting without
                effect in this configuration.
        """
        return _with_settings(self, settings)

    def to_json(self) -> dict[str, Any]:
        """The settings that have an effect, by name, as plain values: `from_json` takes them, and so does `--set`."""
        values = _plain(self)
        return values if self.draws else {name: values[name] for name in values if not _is_drawn(name)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TmmConfig":
        """The inverse of `to_json`; settings that are missing have their defaults.

        Records from before settings belonged to stages are understood: other spellings, and settings without effect,
        which are dropped.

        Raises:
            InputError: an unknown name, or a value out of range.
        """
        known = {canonical(name): value for name, value in values.items()}
        config = _of_kinds(cls(), {stage: known[stage] for stage in KINDS if stage in known})
        kept = {name: value for name, value in known.items() if name not in KINDS and _place(config, name)}
        if not config.draws:
            kept = {name: value for name, value in kept.items() if not _is_drawn(name)}
        return _changed(config, {name: checked(_field(name), value) for name, value in kept.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalRecipe:
    """What a global trigger is made with when an index is built (Eq. 2), and how its features are.

    Attributes:
        view: Of the images that it is blended into.
        trigger: Of the optimisation.
        blending: How it is put into the exemplars; the intensity None is the mean over exemplars of the standard
            deviation of their pixels.
        seed: Of its start, the sample and the batches.
    """

    view: View = View()
    trigger: QueryTrigger = QueryTrigger()
    blending: Blending = Blending()
    seed: int = setting("seed", 0, "of its start, the sample and the batches", low=0, high=MAX_SEED)

    def __post_init__(self) -> None:
        checked(_field("seed"), self.seed)
        if not isinstance(self.trigger, QueryTrigger):
            raise InputError(f"a global trigger is optimised: expected a QueryTrigger, got {self.trigger}")

    @classmethod
    def of(cls, config: "TmmConfig | GlobalRecipe") -> "GlobalRecipe":
        """That whose features a configuration can be searched with."""
        if isinstance(config, GlobalRecipe):
            return config
        own, trigger = config.trigger, QueryTrigger()
        if isinstance(own, QueryTrigger | PatchTrigger):
            trigger = QueryTrigger(steps=own.steps, lr=own.lr, tolerance=own.tolerance)
        return cls(view=config.view, trigger=trigger, blending=config.blending, seed=config.seed)

    def with_settings(self, settings: Iterable[str]) -> "GlobalRecipe":
        """As `TmmConfig.with_settings`; other stages' settings have no effect on a global trigger."""
        return _with_settings(self, settings)

    def to_json(self) -> dict[str, Any]:
        """All settings by name, as plain values."""
        return _plain(self)


def described() -> list[Setting]:
    """Every setting of a configuration, stage by stage."""
    found: dict[str, Setting] = {}
    for stage, ways in STAGES.items():
        if stage in KINDS:
            about = "where τ comes from" if stage == "trigger" else "how the dummy class's row of the head is found"
            source = "Eqs. 2, 8, §4.8.1" if stage == "trigger" else "§4.3.1"
            found[stage] = Setting(stage, about, ", ".join(KINDS[stage]), str(_kind(ways[0])), source)
        for way in ways:
            for each in way.settings():
                name, goes_with = each.metadata["name"], (f"{stage}={_kind(way)}",) if stage in KINDS else ()
                before = found[name].goes_with if name in found else ()
                found[name] = described_field(each, (*before, *goes_with))
    found["seed"] = described_field(_field("seed"), ())
    drawn = ("trigger or head otherwise than global and discriminant",)
    return [replace(each, goes_with=drawn) if _is_drawn(name) else each for name, each in found.items()]


def canonical(name: str) -> str:
    """A setting's name from any of its spellings.

    Raises:
        InputError: no setting is called that.
    """
    plain = name.strip().replace("-", "_")
    plain = OTHER_SPELLINGS.get(plain, plain)
    if plain not in _NAMES:
        raise InputError(f"unknown TMM setting {name!r}{nearest(plain, _NAMES)}; known: {', '.join(_NAMES)}")
    return plain


# ------------------------------------------------------------------------------------------------ how settings are set


Staged = TypeVar("Staged", TmmConfig, GlobalRecipe)


def _with_settings(owner: Staged, settings: Iterable[str]) -> Staged:
    texts = {}
    for name, equals, text in (each.partition("=") for each in settings):
        known = canonical(name)
        if not equals:
            raise InputError(f"{known}: expected {known}=VALUE, got no value")
        texts[known] = text.strip()
    if isinstance(owner, TmmConfig):
        owner = _of_kinds(owner, {stage: texts.pop(stage) for stage in KINDS if stage in texts})
    for name in texts:
        if not _place(owner, name):
            raise InputError(f"{name} has no effect {_why(owner, name)}")
    return _changed(owner, {name: parsed(_field(name), text) for name, text in texts.items()})


def _of_kinds(config: TmmConfig, kinds: Mapping[str, str]) -> TmmConfig:
    """The configuration with other ways to do its stages; what the old and the new way have in common stays."""
    changed: dict[str, Any] = {}
    for stage, kind in kinds.items():
        chosen, old = member(KINDS[stage], kind, name=stage), getattr(config, stage)
        way = next(way for way in STAGES[stage] if _kind(way) is chosen)
        names = [each.name for each in way.settings()]
        changed[stage] = way(**{name: getattr(old, name) for name in names if hasattr(old, name)})
    # All in one step, with what no longer has an effect: what is between them may be no configuration.
    if not _draws(changed.get("trigger", config.trigger), changed.get("head", config.head)):
        changed |= {"seed": 0, "sample": Sample()}
    return replace(config, **changed)


def _changed(owner: Staged, values: Mapping[str, Any]) -> Staged:
    """With these values of settings that it has."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name != "seed":
            stage, each = _FIELDS[name]
            changes.setdefault(stage, {})[each.name] = value
    stages: dict[str, Any] = {stage: replace(getattr(owner, stage), **change) for stage, change in changes.items()}
    return replace(owner, **stages, **({"seed": values["seed"]} if "seed" in values else {}))


def _place(owner: TmmConfig | GlobalRecipe, name: str) -> bool:
    """Whether a setting has a place in a configuration as it is."""
    if name in KINDS or name == "seed":
        return name == "seed" or isinstance(owner, TmmConfig)
    stage, each = _FIELDS[name]
    return hasattr(getattr(owner, stage, None), each.name)


def _why(owner: TmmConfig | GlobalRecipe, name: str) -> str:
    """Why a setting has no place."""
    if isinstance(owner, GlobalRecipe):
        return "on a global trigger; leave it out"
    stage, each = _FIELDS[name]
    kinds = [f"{stage}={_kind(way)}" for way in STAGES[stage] if each.name in {one.name for one in way.settings()}]
    return f"with {stage}={_kind(getattr(owner, stage))}: leave it out, or add {' or '.join(kinds)}"


def _draws(trigger: AnyTrigger, head: AnyHead) -> bool:
    return not (isinstance(trigger, IndexTrigger) and isinstance(head, ClosedForm))


def _is_drawn(name: str) -> bool:
    return name == "seed" or name.startswith("sample.")


def _plain(owner: TmmConfig | GlobalRecipe) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for stage in (each.name for each in fields(owner) if each.name in STAGES):
        chosen = getattr(owner, stage)
        if stage in KINDS and isinstance(owner, TmmConfig):
            values[stage] = str(_kind(chosen))
        for each in chosen.settings():
            value = getattr(chosen, each.name)
            values[each.metadata["name"]] = str(value) if isinstance(value, StrEnum) else value
    return values | {"seed": owner.seed}


def _field(name: str) -> Field[Any]:
    """The field that a setting is; of a stage that is done in one of several ways, of the last that has it."""
    if name == "seed":
        return next(each for each in fields(TmmConfig) if each.name == name)
    return _FIELDS[name][1]


def _kind(way: Any) -> StrEnum:
    kind: StrEnum = way.kind
    return kind
