from .rank import Ranking
from .settings import DEFAULT_PRESET, PRESETS, GlobalRecipe, TmmConfig, preset
from .tmm import TmmNN

__all__ = ["DEFAULT_PRESET", "PRESETS", "GlobalRecipe", "Ranking", "TmmConfig", "TmmNN", "preset"]
