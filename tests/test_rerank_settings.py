"""Settings: what is refused and why, what the command line and JSON say, what is shared, what importing costs."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import configs, heads, optimised, recipes, triggers
from tmm_engine.index.errors import InputError
from tmm_engine.rerank.settings import (
    DEFAULT_PRESET,
    PRESETS,
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
    Trigger,
    TunedHead,
    Tuning,
    View,
    canonical,
    described,
    preset,
)
from tmm_engine.rerank.settings.config import OTHER_SPELLINGS

# The type checks of the tests look at random items of tuples, also where a strategy makes a configuration.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

OTHER_VALUES = {  # of every setting that is not a kind, one that is not its default
    "stretch": "true",
    "trigger.steps": "7",
    "trigger.lr": "0.5",
    "trigger.tolerance": "0.3",
    "blend": "added",
    "clamp": "false",
    "intensity": "0.4",
    "head.epochs": "3",
    "head.min_steps": "12",
    "head.lr": "0.07",
    "head.batch": "32",
    "head.ewc_lambda": "2.5",
    "head.score": "logit",
    "head.shrinkage": "0.9",
    "fusion": "2.0",
    "recognition": "0.6",
    "sample.max_exemplars": "500",
    "sample.companions": "11",
    "seed": "5",
}


def words(config):
    return [f"{name}={value}" for name, value in config.to_json().items()]


# ---- presets


def test_the_preset_paper_is_algorithm_1_as_printed():
    assert preset("paper") == TmmConfig()
    assert preset("paper").to_json() == {
        "stretch": False,
        "trigger": "query",
        "trigger.steps": 300,
        "trigger.lr": 0.015,
        "trigger.tolerance": 0.04,
        "blend": "printed",
        "clamp": True,
        "intensity": None,
        "head": "adam",
        "head.epochs": 1,
        "head.min_steps": 235,
        "head.lr": 1e-3,
        "head.batch": 256,
        "head.ewc_lambda": 1.0,
        "head.score": "log-odds",
        "fusion": 0.0,
        "recognition": None,
        "sample.max_exemplars": 60_000,
        "sample.companions": 1_000,
        "seed": 0,
    }


def test_the_preset_fast_is_what_the_first_study_found():
    assert DEFAULT_PRESET == "paper"
    assert preset("fast").to_json() == {
        "stretch": True,
        "trigger": "global",
        "blend": "printed",
        "clamp": True,
        "intensity": 0.1,
        "head": "discriminant",
        "head.shrinkage": 1.0,
        "fusion": 4.0,
        "recognition": 0.8,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset(name).seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset(name).rank.fusion = 1.0


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(InputError, match=r"unknown preset 'papr' \(did you mean 'paper'\?\); known: paper, fast"):
        preset("papr")


# ---- what would have no effect is refused


@pytest.mark.parametrize("head", Tuning)
@pytest.mark.parametrize("trigger", Trigger)
@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_setting_is_taken_where_it_has_an_effect_and_refused_with_the_reason_where_not(name, trigger, head):
    kinds = [f"trigger={trigger}", f"head={head}"]
    config, one = TmmConfig().with_settings(kinds), f"{name}={OTHER_VALUES[name]}"
    if name.startswith("trigger."):
        effect, reason = trigger in (Trigger.QUERY, Trigger.PATCH), f"trigger={trigger}: leave it out, or add trigger="
    elif name == "head.shrinkage":
        effect, reason = head is Tuning.DISCRIMINANT, f"head={head}: leave it out, or add head=discriminant"
    elif name.startswith("head."):
        effect, reason = head is Tuning.ADAM, f"head={head}: leave it out, or add head=adam"
    else:
        drawn = (trigger, head) != (Trigger.GLOBAL, Tuning.DISCRIMINANT)
        effect = drawn or not name.startswith(("seed", "sample"))
        reason = "trigger=global and head=discriminant: nothing is drawn, .* leave it out"
    if effect:
        changed = config.with_settings([one])
        value = changed.to_json()[name]
        assert value != config.to_json()[name]
        assert str(value).lower() == OTHER_VALUES[name]
        assert TmmConfig().with_settings([one, *kinds]) == TmmConfig().with_settings([*kinds, one]) == changed
        assert {**changed.to_json(), name: config.to_json()[name]} == config.to_json()
        return
    assert name not in config.to_json()
    for given_ in ([one], [*kinds, one], [one, *kinds]):
        with pytest.raises(InputError, match=f"^{name.split('.')[0]}.*has no effect with {reason}"):
            config.with_settings(given_)


@pytest.mark.parametrize("drawn", [{"seed": 1}, {"sample": Sample(companions=3)}, {"sample": Sample(max_exemplars=5)}])
def test_where_nothing_is_drawn_there_is_neither_seed_nor_sample(drawn):
    config = TmmConfig(trigger=IndexTrigger(), head=ClosedForm())
    assert not config.draws
    assert config.with_seed(7) is config
    [name] = drawn
    with pytest.raises(InputError, match=f"{name} has no effect with trigger=global and head=discriminant"):
        dataclasses.replace(config, **drawn)
    for stage, other in (("trigger", QueryTrigger()), ("trigger", FixedPatch()), ("head", TunedHead())):
        drawing = dataclasses.replace(config, **{stage: other}, **drawn)
        assert drawing.draws
        assert drawing.with_seed(7) == dataclasses.replace(drawing, seed=7)


def test_the_reason_names_all_that_would_help():
    with pytest.raises(InputError, match="with trigger=fixed-patch: leave it out, or add trigger=query or trigger=pat"):
        TmmConfig(trigger=FixedPatch()).with_settings(["trigger.steps=3"])


# ---- settings in words


@settings(max_examples=100)
@given(config=configs(), before=configs(), order=st.randoms(use_true_random=False))
def test_words_in_any_order_make_the_same_configuration_whatever_it_was_before(config, before, order):
    shuffled = words(config)
    order.shuffle(shuffled)
    assert before.with_settings(shuffled) == config
    old_names = {new: old for old, new in OTHER_SPELLINGS.items()}
    spelled = [f" {old_names.get(name, name).replace('_', '-')} = {value}" for name, value in config.to_json().items()]
    assert before.with_settings(spelled) == config


@given(config=configs(), trigger=triggers, head=heads)
def test_what_both_ways_have_in_common_stays_and_so_does_the_rest(config, trigger, head):
    changed = config.with_settings([f"head={head.kind}", f"trigger={trigger.kind}"])
    assert (changed.view, changed.blending, changed.rank) == (config.view, config.blending, config.rank)
    assert (changed.trigger.kind, changed.head.kind) == (trigger.kind, head.kind)
    for stage in ("trigger", "head"):
        old, new = getattr(config, stage), getattr(changed, stage)
        for each in dataclasses.fields(new):
            assert getattr(new, each.name) == getattr(old, each.name, each.default)
    if config.draws and changed.draws:
        assert (changed.seed, changed.sample) == (config.seed, config.sample)


def test_kinds_change_in_one_step_so_that_a_seed_survives():
    before = TmmConfig(head=ClosedForm(), seed=7, sample=Sample(companions=3))
    expected = TmmConfig(trigger=IndexTrigger(), seed=7, sample=Sample(companions=3))
    assert before.with_settings(["trigger=global", "head=adam"]) == expected
    assert before.with_settings(["trigger=global"]) == TmmConfig(trigger=IndexTrigger(), head=ClosedForm())


def test_settings_change_what_they_name_and_leave_the_original():
    before = TmmConfig(seed=7)
    after = before.with_settings(["blend=added", "clamp=no", "intensity=0.5", "tuning-min-steps=1_000", "seed=8"])
    blending = Blending(formula=Blend.ADDED, clamp=False, intensity=0.5)
    assert after == TmmConfig(blending=blending, head=TunedHead(min_steps=1000), seed=8)
    closed = before.with_settings(["tuning=discriminant", "stretch=yes", "shrinkage=1e-6", "fusion=4"])
    expected = TmmConfig(view=View(stretch=True), head=ClosedForm(shrinkage=1e-6), rank=Rank(fusion=4.0), seed=7)
    assert closed == expected
    assert after.with_settings(["intensity=none"]).blending.intensity is None
    recognising = before.with_settings(["recognition=0.7"])
    assert recognising == TmmConfig(rank=Rank(recognition=0.7), seed=7)
    assert recognising.with_settings(["recognition = None"]) == before
    assert before.with_settings(["recognition=1"]).rank.recognition == 1.0
    assert before == TmmConfig(seed=7)
    assert before.with_settings([]) == before


def test_the_last_counts_in_whatever_spelling():
    config = TmmConfig()
    assert config.with_settings(["seed=9", "seed=7"]).seed == 7
    assert config.with_settings(["head.lr=0.5", "tuning_lr=0.25"]).head == TunedHead(lr=0.25)
    assert config.with_settings(["tuning-lr=0.5", "head.lr=0.25"]).head == TunedHead(lr=0.25)
    assert config.with_settings(["head=discriminant", "tuning=adam", "head.lr=0.25"]).head == TunedHead(lr=0.25)


def test_other_spellings_are_those_of_settings_and_names_are_their_own():
    names = [each.name for each in described()]
    assert set(OTHER_SPELLINGS.values()) <= set(names)
    assert not set(OTHER_SPELLINGS) & set(names)
    assert [canonical(name) for name in names] == names
    assert [canonical(f" {name.replace('_', '-')} ") for name in OTHER_SPELLINGS] == list(OTHER_SPELLINGS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blnd=added", r"unknown TMM setting 'blnd' \(did you mean 'blend'\?\); known: trigger, head, stretch,"),
        ("head.shrinkag=1", r"unknown TMM setting 'head.shrinkag' \(did you mean 'head.shrinkage'\?\)"),
        ("=1", "unknown TMM setting ''"),
        ("", "unknown TMM setting ''"),
        ("blend=addd", r"unknown blend 'addd' \(did you mean 'added'\?\); known: printed, swapped, scaled, added"),
        ("blend", "blend: expected blend=VALUE, got no value"),
        ("head=adem", r"unknown head 'adem' \(did you mean 'adam'\?\)"),
        ("trigger=fixedpatch", r"unknown trigger 'fixedpatch' \(did you mean 'fixed-patch'\?\)"),
        ("score=logits", r"unknown head.score 'logits' \(did you mean 'logit'\?\)"),
        ("tuning=discrimant", r"'discrimant' \(did you mean 'discriminant'\?\); known: adam, discriminant"),
        ("stretch=maybe", "stretch: cannot read 'maybe' as bool"),
        ("stretch=none", "stretch: cannot read 'none' as bool"),
        ("fusion=-1", r"fusion: expected a finite value in \[0, inf\], got -1"),
        ("fusion=inf", "fusion: expected .* got inf"),
        ("fusion=none", "fusion: cannot read 'none' as float"),
        ("head=discriminant shrinkage=0", r"head.shrinkage: expected a finite value in \[1e-06, inf\], got 0"),
        ("head=discriminant shrinkage=nan", "head.shrinkage: expected .* got nan"),
        ("clamp=maybe", "clamp: cannot read 'maybe' as bool"),
        ("seed=1.5", "seed: cannot read '1.5' as int"),
        ("seed=", "seed: cannot read '' as int"),
        ("seed=none", "seed: cannot read 'none' as int"),
        ("trigger_lr=fast", "trigger.lr: cannot read 'fast' as float"),
        ("trigger.lr=none", "trigger.lr: cannot read 'none' as float"),
        ("trigger.lr=nan", "trigger.lr: expected .* got nan"),
        ("trigger_lr=inf", "trigger.lr: expected .* got inf"),
        ("tuning_lr=-1e-3", "head.lr: expected .* got -0.001"),
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
        ("tuning_batch=0", r"head.batch: expected a .*value in \[1, inf\], got 0"),
        ("seed=-1", "seed: expected .* got -1"),
        ("seed=18446744073709551616", "seed: expected .* got 18446744073709551616"),
    ],
)
def test_wrong_settings_say_what_was_expected(text, message):
    with pytest.raises(InputError, match=message):
        TmmConfig().with_settings(["seed=3", *(text.split() or [""])])


# ---- JSON, and records


@settings(max_examples=100)
@given(config=configs())
def test_json_has_what_has_an_effect_and_makes_the_same_configuration(config):
    plain = config.to_json()
    read = json.loads(json.dumps(plain, allow_nan=False))
    assert read == plain
    assert TmmConfig.from_json(read) == config
    assert TmmConfig.from_json(dict(reversed(read.items()))) == config
    kinds = {f"trigger={config.trigger.kind}", f"head={config.head.kind}"}
    staged = {each.name for each in described() if not each.name.startswith(("seed", "sample."))}
    goes_with = {each.name: set(each.goes_with) for each in described()}
    expected = {name for name in staged if not goes_with[name] or goes_with[name] & kinds}
    drawn = {"seed", "sample.max_exemplars", "sample.companions"} if config.draws else set()
    assert plain.keys() == expected | drawn


OF_BEFORE = {  # a record of the preset robust, from before settings belonged to stages
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


def test_records_of_before_are_understood():
    assert TmmConfig.from_json(OF_BEFORE) == preset("fast")
    without_effect = {"seed": 3, "score": "logit", "trigger_steps": 20, "max_tuning_exemplars": 50, "ewc_lambda": 7.0}
    assert TmmConfig.from_json(OF_BEFORE | without_effect) == preset("fast")
    own = TmmConfig.from_json(OF_BEFORE | without_effect | {"trigger": "patch"})
    assert own == dataclasses.replace(
        preset("fast"), trigger=PatchTrigger(steps=20), sample=Sample(max_exemplars=50), seed=3
    )
    tuned = TmmConfig.from_json(OF_BEFORE | without_effect | {"tuning": "adam"})
    assert tuned.head == TunedHead(score=Score.LOGIT, ewc_lambda=7.0)
    assert (tuned.trigger, tuned.seed) == (IndexTrigger(), 3)


def test_what_a_record_leaves_out_has_its_default_and_what_it_gets_wrong_is_told():
    assert TmmConfig.from_json({}) == TmmConfig()
    assert TmmConfig.from_json({"head": "discriminant"}) == TmmConfig(head=ClosedForm())
    with pytest.raises(InputError, match=r"unknown TMM setting 'fuson' \(did you mean 'fusion'\?\)"):
        TmmConfig.from_json({"fuson": 1.0})
    with pytest.raises(InputError, match=r"head\.batch: expected a finite value"):
        TmmConfig.from_json({"tuning_batch": 0})
    with pytest.raises(InputError, match="unknown trigger 'all'"):
        TmmConfig.from_json({"trigger": "all"})


# ---- what configurations share


@pytest.mark.parametrize("name", ["trigger", "head", *OTHER_VALUES])
def test_configurations_share_a_pass_unless_something_before_the_head_differs(name):
    before = TmmConfig(head=ClosedForm()) if name == "head.shrinkage" else TmmConfig()
    other = {"trigger": "patch", "head": "discriminant"} | OTHER_VALUES
    changed = before.with_settings([f"{name}={other[name]}"])
    assert changed != before
    after_the_pass = name.startswith("head") or name in ("fusion", "recognition")
    assert (changed.triggering == before.triggering) == after_the_pass
    assert len({changed.triggering, before.triggering}) == (1 if after_the_pass else 2)


# ---- global triggers


@settings(max_examples=50)
@given(recipe=recipes, order=st.randoms(use_true_random=False))
def test_a_recipe_is_made_of_its_words_too(recipe, order):
    assert "trigger" not in recipe.to_json()
    shuffled = words(recipe)
    order.shuffle(shuffled)
    assert GlobalRecipe().with_settings(shuffled) == recipe
    assert GlobalRecipe.of(recipe) is recipe


@settings(max_examples=50)
@given(config=configs())
def test_the_recipe_of_a_configuration_has_what_both_have(config):
    recipe = GlobalRecipe.of(config)
    assert (recipe.view, recipe.blending, recipe.seed) == (config.view, config.blending, config.seed)
    own = config.trigger
    if isinstance(own, QueryTrigger | PatchTrigger):
        assert [getattr(recipe.trigger, name) for name in optimised] == [getattr(own, name) for name in optimised]
    else:
        assert recipe.trigger == QueryTrigger()


@pytest.mark.parametrize("name", ["trigger", "head", "tuning", "sample.companions", "fusion", "recognition", "head.lr"])
def test_a_recipe_refuses_what_has_no_effect_on_a_global_trigger(name):
    value = {"trigger": "query", "head": "adam", "tuning": "adam"}.get(name) or OTHER_VALUES[name]
    with pytest.raises(InputError, match=f"^{canonical(name)} has no effect on a global trigger; leave it out"):
        GlobalRecipe().with_settings([f"{name}={value}"])


# ---- what importing costs


def test_importing_the_settings_imports_neither_torch_nor_numpy():
    code = (
        "import sys, tmm_engine.rerank.settings as settings\n"
        "settings.preset('fast').with_settings(['trigger=query', 'seed=3']).to_json()\n"
        "print(sorted({'torch', 'numpy', 'jaxtyping'} & set(sys.modules)), len(settings.described()))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] 21\n", "")


def test_importing_rerank_imports_neither_lance_nor_faiss():
    code = (
        "import sys, tmm_engine.rerank as rerank, tmm_engine.rerank.reference\n"
        "assert all(getattr(rerank, name) for name in rerank.__all__)\n"
        "print(*sorted({'lance', 'faiss', 'pyarrow'} & set(sys.modules)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
