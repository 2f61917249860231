from .settings import DEFAULT_PRESET, PRESETS, Blend, Score, TmmConfig, Trigger, preset
from .tmm import Ranking, TmmNN

__all__ = ["DEFAULT_PRESET", "PRESETS", "Blend", "Ranking", "Score", "TmmConfig", "TmmNN", "Trigger", "preset"]
