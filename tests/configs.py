"""Configurations of TMM-NN in few words, and any configuration for properties."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from tmm_engine.rerank.settings import (
    MAX_SEED,
    MIN_RECOGNITION,
    Blend,
    Blending,
    ClosedForm,
    FixedPatch,
    GlobalRecipe,
    IndexTrigger,
    PatchTrigger,
    QueryTrigger,
    Rank,
    Sample,
    Score,
    TmmConfig,
    TunedHead,
    View,
)


def changed(config: TmmConfig, **settings: Any) -> TmmConfig:
    """The configuration with these settings, by names that are one word (``trigger_steps``, ``tuning``).

    Raises:
        InputError: as `TmmConfig.with_settings`: a setting without effect is refused.
    """
    return config.with_settings(f"{name}={value}" for name, value in settings.items())


def flat(**settings: Any) -> TmmConfig:
    """Algorithm 1 as printed, with these settings."""
    return changed(TmmConfig(), **settings)


positive = st.floats(0.0, 1e6)
optimised = {"steps": st.integers(0, 1000), "lr": positive, "tolerance": st.floats(0.0, 1.0)}
triggers = st.one_of(
    st.builds(QueryTrigger, **optimised),
    st.builds(PatchTrigger, **optimised),
    st.just(FixedPatch()),
    st.just(IndexTrigger()),
)
heads = st.one_of(
    st.builds(
        TunedHead,
        epochs=st.integers(0, 100),
        min_steps=st.integers(1, 1000),
        lr=positive,
        batch=st.integers(1, 10_000),
        ewc_lambda=positive,
        score=st.sampled_from(Score),
    ),
    st.builds(ClosedForm, shrinkage=st.floats(1e-6, 1e6)),
)
blendings = st.builds(
    Blending, formula=st.sampled_from(Blend), clamp=st.booleans(), intensity=st.none() | st.floats(0.0, 1.0)
)
ranks = st.builds(Rank, fusion=positive, recognition=st.none() | st.floats(MIN_RECOGNITION, 1.0))
samples = st.builds(Sample, max_exemplars=st.integers(1, 10**9), companions=st.integers(0, 10**6))
views = st.builds(View, stretch=st.booleans())
seeds = st.integers(0, MAX_SEED)


@st.composite
def configs(draw: st.DrawFn) -> TmmConfig:
    """Any configuration."""
    config = TmmConfig(
        view=draw(views), trigger=draw(triggers), blending=draw(blendings), head=draw(heads), rank=draw(ranks)
    )
    return replace(config, sample=draw(samples), seed=draw(seeds)) if config.draws else config


recipes = st.builds(
    GlobalRecipe, view=views, trigger=st.builds(QueryTrigger, **optimised), blending=blendings, seed=seeds
)
