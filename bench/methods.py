"""Ways to retrieve, by name: what `--methods` takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tmm_engine.describing import DEFAULT_VIEWS
from tmm_engine.index.descriptors.layers import Layer
from tmm_engine.index.descriptors.views import MAX_VIEWS
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.options import RECOGNITION
from tmm_engine.rerank.settings import (
    PRESETS,
    GlobalRecipe,
    IndexTrigger,
    PatchTrigger,
    QueryTrigger,
    TmmConfig,
    canonical,
    preset,
)

BASELINE_SETTINGS = ("stretch", "recognition")
ROBUST, LAYER = "robust", "layer"


@dataclass(frozen=True, slots=True)
class DescriptorOptions:
    """Of mode robust: so many symmetric views, and what recognises copies; None is what does best.

    A rival ranks by one layer alone, whitened: that of the recogniser.
    """

    views: int
    recogniser: Layer | None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """A way to retrieve, by name.

    Attributes:
        name: As it was given: ``l2``, ``cosine``, ``cosine,stretch=true``, ``robust``, ``robust,views=1``,
            ``layer,recogniser=pixels`` (one layer alone, whitened), or a preset with settings, as
            ``paper,blend=added,score=logit``.
        metric: Of a baseline, else None.
        stretch: Whether a baseline compares images with their contrast stretched.
        recognition: Below which ratio of distances a baseline takes the query for a copy of an exemplar
            (`rerank.recognise`), and so for mode robust; None never.
        config: Of TMM-NN, else None.
        recipe: What its global trigger is made with, where it has one: ``fast,trigger.steps=50`` says it.
        described: Of mode robust, else None.
    """

    name: str
    metric: Metric | None = None
    stretch: bool = False
    recognition: float | None = None
    config: TmmConfig | None = None
    recipe: GlobalRecipe | None = None
    described: DescriptorOptions | None = None

    @classmethod
    def parse(cls, text: str) -> "Method":
        """From its name.

        Raises:
            InputError: neither a metric nor a preset, or settings that it does not have.
        """
        kind, *settings = text.split(",")
        if kind in list(Metric):
            if unknown := [setting for setting in settings if setting.partition("=")[0] not in BASELINE_SETTINGS]:
                raise InputError(
                    f"{text}: a baseline takes {' and '.join(BASELINE_SETTINGS)}, got {', '.join(unknown)}"
                )
            config = TmmConfig().with_settings(settings)
            return cls(text, Metric(kind), config.view.stretch, config.rank.recognition)
        if kind in (ROBUST, LAYER):
            return cls._described(text, settings, alone=kind == LAYER)
        if kind not in PRESETS:
            known = [*map(str, Metric), ROBUST, LAYER, *PRESETS]
            raise InputError(f"unknown method {kind!r}{nearest(kind, known)}; known: {', '.join(known)}")
        config, recipe = _with_recipe(preset(kind), settings)
        return cls(text, config=config, recipe=recipe)

    @classmethod
    def _described(cls, text: str, settings: Sequence[str], *, alone: bool) -> "Method":
        given = dict(setting.partition("=")[::2] for setting in settings)
        if unknown := given.keys() - {"views", "recogniser", "recognition"}:
            raise InputError(f"{text}: expected views, recogniser and recognition, got {', '.join(sorted(unknown))}")
        views = given.get("views", "1" if alone else str(DEFAULT_VIEWS))
        if not views.isdecimal() or not 1 <= int(views) <= MAX_VIEWS:
            raise InputError(f"{text}: views: expected 1 to {MAX_VIEWS}, got {views!r}")
        layer = Layer.parse(given["recogniser"]) if "recogniser" in given else None
        ratio = given.get("recognition", "none" if alone else str(RECOGNITION))
        threshold = TmmConfig().with_settings([f"recognition={ratio}"]).rank.recognition
        return cls(text, recognition=threshold, described=DescriptorOptions(int(views), layer, alone))

    def varied(self, *settings: str) -> "Method":
        """The same with other settings; what ends one kind of trigger and begins another keeps how it is optimised.

        Raises:
            InputError: a baseline, or a setting that it does not have.
        """
        if self.config is None:
            raise InputError(f"expected a preset to change settings of, got {self.name} (try --base paper)")
        config, recipe = self.config.with_settings(settings), self.recipe or GlobalRecipe.of(self.config)
        own = config.trigger
        if self.recipe is not None and isinstance(own, QueryTrigger | PatchTrigger):
            made = recipe.trigger
            config = replace(config, trigger=replace(own, steps=made.steps, lr=made.lr, tolerance=made.tolerance))
        recipe = replace(recipe, view=config.view, blending=config.blending)
        kept = recipe if isinstance(config.trigger, IndexTrigger) else None
        return replace(self, name=",".join((self.name, *settings)), config=config, recipe=kept)

    def settings(self) -> dict[str, Any]:
        """For the records."""
        if self.config is not None:
            return self.config.to_json() | (self.recipe.to_json() if self.recipe else {})
        recognition = {} if self.recognition is None else {"recognition": self.recognition}
        if self.described is not None:
            layer = self.described.recogniser
            return {"views": self.described.views, "recogniser": layer and str(layer)} | recognition
        return {"stretch": self.stretch} | recognition


def _with_recipe(config: TmmConfig, settings: Sequence[str]) -> tuple[TmmConfig, GlobalRecipe | None]:
    """The configuration with its settings, and the recipe with those that only the making of a trigger looks at."""
    names = {setting: canonical(setting.partition("=")[0]) for setting in settings}
    of_making = [setting for setting, name in names.items() if name == "seed" or name.startswith("trigger.")]
    searched = config.with_settings(setting for setting in settings if setting not in of_making)
    if not isinstance(searched.trigger, IndexTrigger):
        return config.with_settings(settings), None
    recipe = GlobalRecipe.of(searched).with_settings(of_making)
    return searched.with_seed(recipe.seed), recipe
