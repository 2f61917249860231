"""Configurations: what is refused, what the command line and JSON say, and what importing costs."""

import dataclasses
import json
import subprocess
import sys

import jaxtyping
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.errors import InputError
from rerank import PRESETS, Blend, Score, TmmConfig, Trigger, preset
from rerank.config import MAX_SEED

WHOLE = ["trigger_steps", "tuning_epochs", "tuning_min_steps", "tuning_batch", "max_tuning_exemplars", "seed"]
REAL = ["trigger_lr", "trigger_tolerance", "tuning_lr", "ewc_lambda"]

configs = st.builds(
    TmmConfig,
    blend=st.sampled_from(Blend),
    clamp=st.booleans(),
    trigger=st.sampled_from(Trigger),
    score=st.sampled_from(Score),
    intensity=st.none() | st.floats(0.0, 1.0),
    trigger_steps=st.integers(0, 1000),
    trigger_lr=st.floats(0.0, 1e6),
    trigger_tolerance=st.floats(0.0, 1.0),
    tuning_epochs=st.integers(0, 100),
    tuning_min_steps=st.integers(1, 1000),
    tuning_lr=st.floats(0.0, 1e6),
    tuning_batch=st.integers(1, 10_000),
    ewc_lambda=st.floats(0.0, 1e6),
    max_tuning_exemplars=st.integers(1, 10**9),
    candidate_companions=st.integers(0, 10**6),
    seed=st.integers(0, MAX_SEED),
)


@pytest.fixture
def unchecked():
    """As a user runs it, without the type checks of the tests: what reaches the code may be of any type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_preset_paper_is_algorithm_1_as_printed():
    assert preset("paper") == TmmConfig(
        blend=Blend.PRINTED,
        clamp=True,
        trigger=Trigger.QUERY,
        score=Score.LOG_ODDS,
        intensity=None,
        trigger_steps=300,
        trigger_lr=0.015,
        tuning_epochs=1,
        tuning_min_steps=235,
        tuning_lr=1e-3,
        tuning_batch=256,
        ewc_lambda=1.0,
        max_tuning_exemplars=60_000,
        seed=0,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset(name).seed = 1


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(InputError, match=r"unknown preset 'papr' \(did you mean 'paper'\?\); known: paper, robust"):
        preset("papr")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs)
def test_json_has_all_and_makes_the_same_configuration(unchecked, config):
    text = json.dumps(config.to_json(), allow_nan=False)
    assert list(json.loads(text)) == [field.name for field in dataclasses.fields(TmmConfig)]
    assert TmmConfig(**json.loads(text)) == config


@settings(max_examples=50)
@given(config=configs)
def test_settings_in_words_make_the_same_configuration(config):
    words = [f"{name.replace('_', '-')} = {value}" for name, value in config.to_json().items()]
    assert TmmConfig().with_settings(words) == config


def test_settings_change_what_they_name_and_leave_the_original():
    before = TmmConfig(seed=7)
    after = before.with_settings(["blend=added", "clamp=no", "intensity=0.5", "tuning-min-steps=1_000", "seed=8"])
    assert after == TmmConfig(blend=Blend.ADDED, clamp=False, intensity=0.5, tuning_min_steps=1000, seed=8)
    assert after.with_settings(["seed=9", "seed=7"]).seed == 7
    assert after.with_settings(["intensity=none"]).intensity is None
    assert before == TmmConfig(seed=7)
    assert before.with_settings([]) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("blnd=added", r"unknown TMM setting 'blnd' \(did you mean 'blend'\?\); known: blend, clamp"),
        ("=1", "unknown TMM setting ''"),
        ("", "unknown TMM setting ''"),
        ("blend=addd", r"unknown blend 'addd' \(did you mean 'added'\?\); known: printed, swapped, scaled, added"),
        ("blend", "unknown blend ''"),
        ("trigger=fixedpatch", r"unknown trigger 'fixedpatch' \(did you mean 'fixed-patch'\?\)"),
        ("score=logits", r"unknown score 'logits' \(did you mean 'logit'\?\)"),
        ("clamp=maybe", "clamp: cannot read 'maybe' as bool"),
        ("seed=1.5", "seed: cannot read '1.5' as int"),
        ("seed=", "seed: cannot read '' as int"),
        ("seed=none", "seed: cannot read 'none' as int"),
        ("trigger_lr=fast", "trigger_lr: cannot read 'fast' as float"),
        ("trigger_lr=none", "trigger_lr: cannot read 'none' as float"),
        ("trigger_lr=nan", "trigger_lr: expected .* got nan"),
        ("trigger_lr=inf", "trigger_lr: expected .* got inf"),
        ("tuning_lr=-1e-3", "tuning_lr: expected .* got -0.001"),
        ("intensity=1.01", r"intensity: expected a .*value in \[0, 1\], got 1.01"),
        ("intensity=half", "intensity: cannot read 'half'"),
        ("tuning_batch=0", r"tuning_batch: expected a .*value in \[1, inf\], got 0"),
        ("seed=-1", "seed: expected .* got -1"),
        ("seed=18446744073709551616", "seed: expected .* got 18446744073709551616"),
    ],
)
def test_wrong_settings_say_what_was_expected(setting, message):
    with pytest.raises(InputError, match=message):
        TmmConfig().with_settings(["seed=3", setting])


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", None])
@pytest.mark.parametrize("name", [*WHOLE, "candidate_companions"])
def test_whole_numbers_only(unchecked, name, value):
    with pytest.raises(InputError, match=f"{name}: expected a"):
        TmmConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.1", None])
@pytest.mark.parametrize("name", REAL)
def test_finite_numbers_only(unchecked, name, value):
    with pytest.raises(InputError, match=f"{name}: expected a"):
        TmmConfig(**{name: value})


@pytest.mark.parametrize("value", ["no", 0, None])
def test_clamp_is_true_or_false(unchecked, value):
    with pytest.raises(InputError, match="clamp: expected True or False"):
        TmmConfig(clamp=value)


@pytest.mark.parametrize("value", ["", "Added", 3, None])
def test_choices_are_members(unchecked, value):
    with pytest.raises(InputError, match=r"unknown blend .*; known: printed, swapped, scaled, added"):
        TmmConfig(blend=value)


def test_choices_may_be_given_by_value(unchecked):
    config = TmmConfig(blend="added", trigger="patch", score="logit")
    assert (config.blend, config.trigger, config.score) == (Blend.ADDED, Trigger.PATCH, Score.LOGIT)


def test_importing_rerank_imports_neither_lance_nor_faiss():
    code = (
        "import sys, rerank, rerank.reference\n"
        "assert all(getattr(rerank, name) for name in rerank.__all__)\n"
        "print(*sorted({'lance', 'faiss', 'pyarrow'} & set(sys.modules)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
