"""The presets: configurations by name."""

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.rerank.settings.config import TmmConfig
from tmm_engine.rerank.settings.stages import Blending, ClosedForm, IndexTrigger, Rank, View

PRESETS = {
    "paper": TmmConfig(),
    "robust": TmmConfig(  # what the study in docs/REPRODUCTION.md found best
        view=View(stretch=True),
        trigger=IndexTrigger(),
        blending=Blending(intensity=0.1),
        head=ClosedForm(shrinkage=1.0),
        rank=Rank(fusion=4.0, recognition=0.8),
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
