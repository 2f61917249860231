"""Configurations: what is refused, what the command line and JSON say, and what importing costs."""

import dataclasses
import json
import subprocess
import sys

import jaxtyping
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tmm_engine.index.errors import InputError
from tmm_engine.rerank import PRESETS, Blend, Score, TmmConfig, Trigger, preset
from tmm_engine.rerank.settings import DEFAULT_PRESET, MAX_SEED, MIN_RECOGNITION, Tuning

WHOLE = ["trigger_steps", "tuning_epochs", "tuning_min_steps", "tuning_batch", "max_tuning_exemplars", "seed"]
REAL = ["trigger_lr", "trigger_tolerance", "tuning_lr", "ewc_lambda", "fusion", "shrinkage"]
AFTER_THE_PASS = {"tuning", "score", "fusion", "recognition", "tuning_epochs", "tuning_min_steps", "tuning_lr",
                  "tuning_batch", "ewc_lambda", "shrinkage"}  # fmt: skip

configs = st.builds(
    TmmConfig,
    blend=st.sampled_from(Blend),
    clamp=st.booleans(),
    trigger=st.sampled_from(Trigger),
    stretch=st.booleans(),
    tuning=st.sampled_from(Tuning),
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
    fusion=st.floats(0.0, 1e6),
    recognition=st.none() | st.floats(MIN_RECOGNITION, 1.0),
    shrinkage=st.floats(1e-6, 1e6),
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
        stretch=False,
        tuning=Tuning.ADAM,
        score=Score.LOG_ODDS,
        fusion=0.0,
        recognition=None,
        intensity=None,
        trigger_steps=300,
        trigger_lr=0.015,
        trigger_tolerance=0.04,
        tuning_epochs=1,
        tuning_min_steps=235,
        tuning_lr=1e-3,
        tuning_batch=256,
        ewc_lambda=1.0,
        max_tuning_exemplars=60_000,
        seed=0,
    )


def test_the_preset_robust_is_the_default_and_what_the_study_found():
    assert DEFAULT_PRESET == "robust"
    assert preset("robust").to_json() == {
        "blend": "printed",
        "clamp": True,
        "trigger": "global",
        "stretch": True,
        "tuning": "discriminant",
        "score": "log-odds",
        "fusion": 4.0,
        "recognition": 0.8,
        "intensity": 0.1,
        "trigger_steps": 300,
        "trigger_lr": 0.015,
        "trigger_tolerance": 0.04,
        "tuning_epochs": 1,
        "tuning_min_steps": 235,
        "tuning_lr": 1e-3,
        "tuning_batch": 256,
        "ewc_lambda": 1.0,
        "shrinkage": 1.0,
        "max_tuning_exemplars": 60_000,
        "candidate_companions": 1_000,
        "seed": 0,
    }


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TmmConfig)])
def test_configurations_share_a_pass_unless_something_before_the_tuning_differs(name):
    before = TmmConfig()
    choices = {"blend": Blend.ADDED, "trigger": Trigger.PATCH, "tuning": Tuning.DISCRIMINANT, "score": Score.LOGIT}
    value = getattr(before, name)
    if name in choices:
        other = choices[name]
    else:
        other = not value if isinstance(value, bool) else 0.5 if value is None else value + 1
    changed = dataclasses.replace(before, **{name: other})
    assert changed != before
    assert (changed.before_tuning == before.before_tuning) == (name in AFTER_THE_PASS)


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
    before = flat(seed=7)
    after = before.with_settings(["blend=added", "clamp=no", "intensity=0.5", "tuning-min-steps=1_000", "seed=8"])
    assert after == flat(blend=Blend.ADDED, clamp=False, intensity=0.5, tuning_min_steps=1000, seed=8)
    closed = before.with_settings(["tuning=discriminant", "stretch=yes", "shrinkage=1e-6", "fusion=4"])
    assert closed == flat(tuning=Tuning.DISCRIMINANT, stretch=True, shrinkage=1e-6, fusion=4.0, seed=7)
    assert after.with_settings(["seed=9", "seed=7"]).seed == 7
    assert after.with_settings(["intensity=none"]).intensity is None
    recognising = before.with_settings(["recognition=0.7"])
    assert recognising == flat(recognition=0.7, seed=7)
    assert recognising.with_settings(["recognition = None"]) == before
    assert before.with_settings(["recognition=1"]).recognition == 1.0
    assert before == flat(seed=7)
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
        (
            "tuning=discrimant",
            r"unknown tuning 'discrimant' \(did you mean 'discriminant'\?\); known: adam, discriminant",
        ),
        ("stretch=maybe", "stretch: cannot read 'maybe' as bool"),
        ("stretch=none", "stretch: cannot read 'none' as bool"),
        ("fusion=-1", r"fusion: expected a finite value in \[0, inf\], got -1"),
        ("fusion=inf", "fusion: expected .* got inf"),
        ("fusion=none", "fusion: cannot read 'none' as float"),
        ("shrinkage=0", r"shrinkage: expected a finite value in \[1e-06, inf\], got 0"),
        ("shrinkage=nan", "shrinkage: expected .* got nan"),
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
        ("recognition=0", r"recognition: expected a finite value in \[0\.01, 1\], got 0"),
        ("recognition=2", r"recognition: expected a finite value in \[0\.01, 1\], got 2"),
        ("recognition=0.0099", "recognition: expected .* got 0.0099"),
        ("recognition=-0.1", "recognition: expected .* got -0.1"),
        ("recognition=nan", "recognition: expected .* got nan"),
        ("recognition=yes", "recognition: cannot read 'yes'"),
        ("recognition=off", "recognition: cannot read 'off'"),
        ("recognition=", "recognition: cannot read ''"),
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


@pytest.mark.parametrize("value", [-0.1, 0, 0.0099, 1.0001, float("nan"), float("-inf"), True, False, "0.7"])
def test_recognition_is_a_ratio_or_none(unchecked, value):
    with pytest.raises(InputError, match="recognition: expected a"):
        flat(recognition=value)
    assert [flat(recognition=good).recognition for good in (None, 0.01, 1.0)] == [None, 0.01, 1.0]


@pytest.mark.parametrize("value", ["no", 0, None])
@pytest.mark.parametrize("name", ["clamp", "stretch"])
def test_switches_are_true_or_false(unchecked, name, value):
    with pytest.raises(InputError, match=f"{name}: expected True or False"):
        TmmConfig(**{name: value})


@pytest.mark.parametrize("value", ["", "Added", 3, None])
def test_choices_are_members(unchecked, value):
    with pytest.raises(InputError, match=r"unknown blend .*; known: printed, swapped, scaled, added"):
        flat(blend=value)
    with pytest.raises(InputError, match=r"unknown tuning .*; known: adam, discriminant"):
        flat(tuning=value)


def test_choices_may_be_given_by_value(unchecked):
    config = flat(blend="added", trigger="patch", tuning="discriminant", score="logit")
    expected = (Blend.ADDED, Trigger.PATCH, Tuning.DISCRIMINANT, Score.LOGIT)
    assert (config.blend, config.trigger, config.tuning, config.score) == expected


def test_importing_rerank_imports_neither_lance_nor_faiss():
    code = (
        "import sys, rerank, rerank.reference\n"
        "assert all(getattr(rerank, name) for name in rerank.__all__)\n"
        "print(*sorted({'lance', 'faiss', 'pyarrow'} & set(sys.modules)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
