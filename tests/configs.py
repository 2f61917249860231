"""Configurations of TMM-NN in few words."""

from typing import Any

from tmm_engine.rerank import TmmConfig


def changed(config: TmmConfig, **settings: Any) -> TmmConfig:
    """The configuration with these settings, by names that are one word (``trigger_steps``, ``tuning``).

    Raises:
        InputError: as `TmmConfig.with_settings`: a setting without effect is refused.
    """
    return config.with_settings(f"{name}={value}" for name, value in settings.items())


def flat(**settings: Any) -> TmmConfig:
    """Algorithm 1 as printed, with these settings."""
    return changed(TmmConfig(), **settings)
