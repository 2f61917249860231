"""Fields of settings: values of other types and out of range, and what is told of each for people."""

import dataclasses
from pathlib import Path

import jaxtyping
import pytest

from tmm_engine.cli.settings import settings_page
from tmm_engine.index.errors import InputError
from tmm_engine.rerank.settings import (
    Blend,
    Blending,
    ClosedForm,
    FixedPatch,
    GlobalRecipe,
    PatchTrigger,
    QueryTrigger,
    Rank,
    Sample,
    Score,
    TmmConfig,
    TunedHead,
    View,
    described,
)
from tmm_engine.rerank.settings.stages import STAGES

ROOT = Path(__file__).parents[1]
WHOLE = {  # fields and what they are called
    (QueryTrigger, "steps"): "trigger.steps",
    (PatchTrigger, "steps"): "trigger.steps",
    (TunedHead, "epochs"): "head.epochs",
    (TunedHead, "min_steps"): "head.min_steps",
    (TunedHead, "batch"): "head.batch",
    (Sample, "max_exemplars"): "sample.max_exemplars",
    (Sample, "companions"): "sample.companions",
    (TmmConfig, "seed"): "seed",
    (GlobalRecipe, "seed"): "seed",
}
REAL = {
    (QueryTrigger, "lr"): "trigger.lr",
    (QueryTrigger, "tolerance"): "trigger.tolerance",
    (PatchTrigger, "lr"): "trigger.lr",
    (PatchTrigger, "tolerance"): "trigger.tolerance",
    (TunedHead, "lr"): "head.lr",
    (TunedHead, "ewc_lambda"): "head.ewc_lambda",
    (ClosedForm, "shrinkage"): "head.shrinkage",
    (Rank, "fusion"): "fusion",
}


@pytest.fixture
def unchecked():
    """As a user runs it, without the type checks of the tests: what reaches the code may be of any type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_every_number_is_in_the_lists_of_this_file():
    numbers = {
        (way, each.name)
        for ways in STAGES.values()
        for way in ways
        for each in dataclasses.fields(way)
        if each.type in (int, float)
    }
    assert numbers == {key for key in {**WHOLE, **REAL} if key[1] != "seed"}


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", None])
@pytest.mark.parametrize("field", WHOLE, ids=str)
def test_whole_numbers_only(unchecked, field, value):
    way, name = field
    with pytest.raises(InputError, match=f"^{WHOLE[field]}: expected a"):
        way(**{name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.1", None])
@pytest.mark.parametrize("field", REAL, ids=str)
def test_finite_numbers_only(unchecked, field, value):
    way, name = field
    with pytest.raises(InputError, match=f"^{REAL[field]}: expected a"):
        way(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 0, 0.0099, 1.0001, float("nan"), float("-inf"), True, False, "0.7"])
def test_recognition_is_a_ratio_or_none(unchecked, value):
    with pytest.raises(InputError, match="recognition: expected a"):
        Rank(recognition=value)
    assert [Rank(recognition=good).recognition for good in (None, 0.01, 1.0)] == [None, 0.01, 1.0]


@pytest.mark.parametrize("value", [-0.1, 1.0001, float("nan"), True, "0.7"])
def test_intensity_is_a_share_or_none(unchecked, value):
    with pytest.raises(InputError, match="intensity: expected a"):
        Blending(intensity=value)
    assert [Blending(intensity=good).intensity for good in (None, 0, 1.0)] == [None, 0.0, 1.0]


@pytest.mark.parametrize("value", ["no", 0, None])
@pytest.mark.parametrize(("way", "name"), [(Blending, "clamp"), (View, "stretch")])
def test_switches_are_true_or_false(unchecked, way, name, value):
    with pytest.raises(InputError, match=f"{name}: expected True or False"):
        way(**{name: value})


@pytest.mark.parametrize("value", ["", "Added", 3, None])
def test_choices_are_members(unchecked, value):
    with pytest.raises(InputError, match=r"unknown blend .*; known: printed, swapped, scaled, added"):
        Blending(formula=value)
    with pytest.raises(InputError, match=r"unknown head.score .*; known: log-odds, logit"):
        TunedHead(score=value)


def test_a_recipe_optimises(unchecked):
    with pytest.raises(InputError, match="optimised: expected a QueryTrigger, got FixedPatch"):
        GlobalRecipe(trigger=FixedPatch())


def test_choices_may_be_given_by_value(unchecked):
    assert Blending(formula="added").formula is Blend.ADDED
    assert TunedHead(score="logit").score is Score.LOGIT


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [None, "query", 1, PatchTrigger, {}])
def test_a_stage_is_one_of_its_own_ways(unchecked, stage, value):
    others = [way() for name, ways in STAGES.items() if name != stage for way in ways]
    for wrong in (value, *others):
        with pytest.raises(InputError, match=f"^{stage}: expected {STAGES[stage][0].__name__}.*, got "):
            TmmConfig(**{stage: wrong})


# ---- what is told of settings


def test_each_setting_is_described_once_with_its_range():
    values = {each.name: each.values for each in described()}
    assert len(values) == len(described())
    assert values == {
        "stretch": "true, false",
        "trigger": "query, global, fixed-patch, patch",
        "trigger.steps": "whole number, 0 or more",
        "trigger.lr": "number, 0 or more",
        "trigger.tolerance": "number, 0 or more",
        "blend": "printed, swapped, scaled, added",
        "clamp": "true, false",
        "intensity": "number, 0 to 1, or none",
        "head": "adam, discriminant",
        "head.epochs": "whole number, 0 or more",
        "head.min_steps": "whole number, 1 or more",
        "head.lr": "number, 0 or more",
        "head.batch": "whole number, 1 or more",
        "head.ewc_lambda": "number, 0 or more",
        "head.score": "log-odds, logit",
        "head.shrinkage": "number, 1e-06 or more",
        "fusion": "number, 0 or more",
        "recognition": "number, 0.01 to 1, or none",
        "sample.max_exemplars": "whole number, 1 or more",
        "sample.companions": "whole number, 0 or more",
        "seed": "whole number, 0 or more",
    }
    assert all(each.meaning and each.source for each in described())
    plain = TmmConfig().to_json() | TmmConfig(head=ClosedForm()).to_json() | {"head": "adam"}
    shown = {name: str(value).lower() for name, value in plain.items()}
    assert {each.name: each.default.lower() for each in described()} == shown


def test_the_page_of_settings_is_made_from_the_code():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page()
