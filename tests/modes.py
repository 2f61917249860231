"""The modes of a search, and what tests ask for in each."""

from typing import Any

from tmm_engine.rerank.settings import TmmConfig, preset

MODES = ("tmm", "l2", "cosine")  # whose answers do not depend on which exemplars the index was calibrated on


def quick(*, trigger_steps: int, head_steps: int) -> TmmConfig:
    """The preset paper in few steps."""
    return preset("paper").with_settings([f"trigger.steps={trigger_steps}", f"head.min_steps={head_steps}"])


def in_mode(mode: str, config: TmmConfig) -> dict[str, Any]:
    """Keywords of a search in that mode: a configuration goes with tmm alone."""
    return {"mode": mode} | ({"config": config} if mode == "tmm" else {})
