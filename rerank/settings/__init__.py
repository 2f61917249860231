"""Every choice TMM-NN leaves open, named, stage by stage; and the presets. A result always carries those that made it.

A stage owns its settings, and where there are several ways to do it, each way is a class with the settings of that way
alone. What would have no effect cannot be written down. Nothing heavy is imported here: `engine search --help` lists
all settings.
"""

from tmm_engine.rerank.settings.config import GlobalRecipe, TmmConfig, canonical, described
from tmm_engine.rerank.settings.fields import MAX_SEED, Setting
from tmm_engine.rerank.settings.presets import DEFAULT_PRESET, GLOBAL_PRESET, PRESETS, preset
from tmm_engine.rerank.settings.stages import (
    MIN_RECOGNITION,
    AnyHead,
    AnyTrigger,
    Blend,
    Blending,
    ClosedForm,
    FixedPatch,
    IndexTrigger,
    PatchTrigger,
    QueryTrigger,
    Rank,
    Sample,
    Score,
    Trigger,
    TunedHead,
    Tuning,
    View,
)

__all__ = [
    "DEFAULT_PRESET",
    "GLOBAL_PRESET",
    "MAX_SEED",
    "MIN_RECOGNITION",
    "PRESETS",
    "AnyHead",
    "AnyTrigger",
    "Blend",
    "Blending",
    "ClosedForm",
    "FixedPatch",
    "GlobalRecipe",
    "IndexTrigger",
    "PatchTrigger",
    "QueryTrigger",
    "Rank",
    "Sample",
    "Score",
    "Setting",
    "TmmConfig",
    "Trigger",
    "TunedHead",
    "Tuning",
    "View",
    "canonical",
    "described",
    "preset",
]
