"""The presets: configurations by name."""

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.rerank.settings.config import TmmConfig
from tmm_engine.rerank.settings.stages import Blending, ClosedForm, IndexTrigger, Rank, View

PRESETS = {
    "paper": TmmConfig(),
    "fast": TmmConfig(  # one trigger for all, a head in closed form: a search needs no pass over the exemplars
        view=View(stretch=True),
        trigger=IndexTrigger(),
        blending=Blending(intensity=0.1),
        head=ClosedForm(shrinkage=1.0),
        rank=Rank(fusion=4.0, recognition=0.8),
    ),
}
DEFAULT_PRESET = "paper"
GLOBAL_PRESET = "fast"
"""What an index's global trigger is made for, where nothing else is said."""


def preset(name: str) -> TmmConfig:
    """The named configuration.

    Raises:
        InputError: no such preset.
    """
    if name == "robust":  # what "fast" was called
        raise InputError("'robust' is a mode now, not a preset: search with mode='robust'; the preset is called 'fast'")
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
