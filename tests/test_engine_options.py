"""`SearchOptions`: what is asked for, and what is refused because it would have no effect."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import jaxtyping
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.digits import IMAGES, LABELS, SHORTLY, make_classifier
from tests.modes import quick
from tmm_engine import Engine, Mode, Prefilter, SearchOptions, build_index
from tmm_engine.cli.main import main
from tmm_engine.cli.options import MODES
from tmm_engine.index import ArraySource, InputError
from tmm_engine.options import SearchKeywords
from tmm_engine.rerank import TmmConfig, preset

N = 60
FIXED = preset("paper").with_settings(["trigger=fixed-patch"])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """Without the checks of types that these tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# ---- what they are


def test_the_keywords_are_the_options():
    assert get_type_hints(SearchKeywords) == get_type_hints(SearchOptions)
    assert list(get_type_hints(SearchKeywords)) == [each.name for each in fields(SearchOptions)]


def test_the_command_line_has_the_same_modes():
    assert list(MODES) == list(Mode)


def test_the_default_mode_is_robust_and_tmm_where_an_option_of_its_own_is_given():
    options = SearchOptions()
    assert (options.k, options.mode, options.candidates, options.where) == (10, Mode.ROBUST, None, None)
    for own in ({"candidates": 5}, {"config": "fast"}, {"label": 0}, {"together": True}):
        assert SearchOptions(**own).mode == Mode.TMM
    assert SearchOptions(mode="tmm").tmm == preset("paper")
    assert (options.stretches, options.threshold) == (True, 0.7)
    for mode in ("l2", "cosine"):
        assert (SearchOptions(mode=mode).stretches, SearchOptions(mode=mode).threshold) == (False, None)


@pytest.mark.parametrize("config", ["paper", "fast", FIXED], ids=["paper", "fast", "fixed"])
def test_stretch_and_recognition_stand_in_place_of_the_configurations(config: TmmConfig | str):
    own = preset(config) if isinstance(config, str) else config
    options = SearchOptions(config=config, stretch=not own.view.stretch, recognition=0.5)
    assert options.tmm.to_json() == own.to_json() | {"stretch": not own.view.stretch, "recognition": 0.5}
    assert (options.stretches, options.threshold) == (not own.view.stretch, 0.5)
    assert SearchOptions(config=config, recognition=False).tmm.to_json() == own.to_json() | {"recognition": None}
    assert SearchOptions(config=config).tmm == own


@pytest.mark.usefixtures("as_a_user")
def test_words_and_numpys_integers_become_plain_values():
    options = SearchOptions(mode="tmm", k=np.int64(3), candidates=np.int32(7), prefilter="global")  # type: ignore[arg-type]
    assert (options.mode, options.prefilter) == (Mode.TMM, Prefilter.GLOBAL)
    assert (type(options.k), type(options.candidates)) == (int, int)


# ---- what has no effect

WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    *(
        ({"mode": mode, **options}, f"{name} has no effect in mode '{mode}': leave it out, or search by tmm")
        for mode in ("robust", "l2", "cosine")
        for name, options in (
            ("candidates", {"candidates": 5}),
            ("candidates", {"candidates": 5, "prefilter": "l2"}),
            ("config", {"config": "paper"}),
            ("config", {"config": preset("fast")}),
            ("label", {"label": 0}),
            ("together", {"together": True}),
        )
    ),
    *(
        ({"mode": mode, "prefilter": prefilter}, "prefilter has no effect without candidates")
        for mode in Mode
        for prefilter in Prefilter
    ),
    ({"mode": "robust", "stretch": False}, "stretch=False has no effect in mode 'robust'"),
    ({"together": True, "config": "fast"}, "together has no effect with trigger=global"),
    ({"together": True, "config": FIXED}, "together has no effect with trigger=fixed-patch"),
    ({"label": 0, "config": "fast"}, r"label has no effect with a head in closed form \(head=discriminant\)"),
    (
        {"label": 0, "config": preset("paper").with_settings(["head=discriminant"])},
        r"label has no effect with a head in closed form \(head=discriminant\)",
    ),
]


@pytest.mark.parametrize(("options", "message"), WITHOUT_EFFECT, ids=[str(each[0]) for each in WITHOUT_EFFECT])
def test_what_has_no_effect_is_refused(memory: Engine, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        SearchOptions(**options)
    with pytest.raises(InputError, match=message):
        memory.search(IMAGES[200], **options)
    with pytest.raises(InputError, match=message):
        memory.search_each([], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"candidates": 5, "prefilter": "cosine"},
        {"config": "paper", "together": True, "label": 3},
        {"config": FIXED, "label": 3},
        {"config": preset("paper").with_settings(["head=discriminant"]), "together": True},
        {"config": preset("paper").with_settings(["trigger=global"]), "label": 3},
        {"mode": "l2", "stretch": True, "recognition": 0.8, "where": "label = 1"},
    ],
    ids=str,
)
def test_what_has_an_effect_is_taken(options: dict[str, Any]):
    asked = SearchOptions(**options)
    assert {name: getattr(asked, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": 5}, "config: expected a preset's name or a TmmConfig, got 5"),
        ({"mode": "l2", "stretch": "yes"}, "stretch: expected True, False or None, got 'yes'"),
        ({"config": "paper", "together": "no"}, "together: expected True or False, got 'no'"),
        ({"config": "paper", "label": True}, "label: expected a class index, got True"),
        ({"config": "paper", "label": 2.0}, r"label: expected a class index, got 2\.0"),
        ({"where": 5}, "where: expected a condition in SQL, got 5"),
        ({"k": 2.0}, "k: expected a whole number of at least 1, got 2"),
        ({"candidates": True}, "candidates: expected a whole number of at least 1, got True"),
        ({"mode": "l2", "recognition": "0.8"}, "recognition: expected a number, got '0.8'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_values_of_another_type_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        SearchOptions(**options)


# ---- in a search


@pytest.fixture(scope="module")
def memory() -> Engine:
    return Engine.from_arrays(IMAGES[:N], LABELS[:N], make_classifier(), global_trigger=SHORTLY)


def test_a_keyword_wins_over_the_options(memory: Engine):
    options = SearchOptions(mode="cosine", k=7)
    assert len(memory.search(IMAGES[200], options).hits) == 7
    both = memory.search(IMAGES[200], options, k=3)
    assert (both.mode, len(both.hits)) == ("cosine", 3)
    [each] = memory.search_each([IMAGES[200]], options, k=3, mode="l2")
    assert each.to_json()["mode"] == "l2"
    assert len(each.to_json()["hits"]) == 3
    assert options == SearchOptions(mode="cosine", k=7)
    with pytest.raises(InputError, match="candidates has no effect in mode 'cosine'"):
        memory.search(IMAGES[200], options, candidates=5)
    with pytest.raises(TypeError, match="cadidates"):
        memory.search(IMAGES[200], options, cadidates=5)  # type: ignore[call-overload]


def test_options_and_keywords_ask_for_the_same(memory: Engine):
    keywords: dict[str, Any] = {"k": 5, "candidates": 20, "prefilter": "l2", "where": "label < 7"}
    keywords |= {"config": quick(trigger_steps=3, head_steps=5), "label": 3, "together": True, "stretch": True}
    one, other = memory.search(IMAGES[200], SearchOptions(**keywords)), memory.search(IMAGES[200], **keywords)
    assert [(hit.id, hit.score) for hit in one.hits] == [(hit.id, hit.score) for hit in other.hits]
    without = memory.search(IMAGES[200], replace(SearchOptions(**keywords), label=4))
    assert [hit.score for hit in one.hits] != [hit.score for hit in without.hits], "label has an effect"


# ---- on the command line


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options") / "digits.idx"
    build_index(ArraySource(IMAGES[:N], LABELS[:N]), path, make_classifier(), global_trigger=SHORTLY)
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        *(
            (("--mode", mode, *option), 2, f"{option[0]} has no effect with --mode {mode}: it is an option of tmm")
            for mode in ("l2", "robust", "l2,cosine")
            for option in (
                ("--candidates", 5),
                ("--prefilter", "l2"),
                ("--preset", "fast"),
                ("--set", "blend=added"),
                ("--seed", 0),
                ("--together",),
                ("--precision", "bf16"),
                ("--backend", "onnx"),
            )
        ),
        (("--prefilter", "l2"), 1, "prefilter has no effect without candidates"),
        (("--preset", "fast", "--together"), 1, "together has no effect with trigger=global"),
        (("--preset", "paper", "--set", "trigger=fixed-patch", "--together"), 1, "no effect with trigger=fixed-patch"),
        (
            ("--preset", "fast", "--precision", "bf16"),
            2,
            "--precision has no effect with the index's trigger (trigger=global)",
        ),
        (
            ("--preset", "fast", "--backend", "torch"),
            2,
            "--backend has no effect with the index's trigger (trigger=global)",
        ),
        (("--preset", "fast", "--seed", 5), 1, "seed has no effect with trigger=global and head=discriminant"),
        (
            ("--preset", "fast", "--set", "head.lr=0.1"),
            1,
            "head.lr has no effect with head=discriminant: leave it out, or add head=adam",
        ),
        (("--preset", "fast", "--set", "trigger.steps=5"), 1, "trigger.steps has no effect with trigger=global"),
        (("--preset", "paper", "--set", "shrinkage=1"), 1, "head.shrinkage has no effect with head=adam"),
        (("--preset", "robust"), 1, "'robust' is a mode now, not a preset"),
        (("--split", "test"), 2, "--split has no effect without --source"),
        (("--root", "data"), 2, "--root has no effect without --source"),
    ],
)
def test_the_command_line_refuses_it_before_the_index_is_opened(
    tmp_path: Path, arguments: tuple[object, ...], code: int, message: str
):
    refused = run("search", tmp_path / "none.idx", "--id", "00000003", *arguments)
    assert (refused.exit_code, refused.stdout) == (code, ""), refused.output
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_in_several_modes_the_options_of_tmm_are_tmms_alone(index: Path):
    def scored(*arguments: object) -> dict[str, tuple[int, list[tuple[str, float]]]]:
        with_json = run("search", index, "--id", "00000003", "--json", *arguments)
        assert with_json.exit_code == 0, with_json.stderr
        found = [json.loads(line) for line in with_json.stdout.splitlines()]
        return {one["mode"]: (one["scored"], [(hit["id"], hit["score"]) for hit in one["hits"]]) for one in found}

    options = ("--candidates", 20, "--prefilter", "l2", "--preset", "paper", "--set", "head.min_steps=5", "--seed", 3)
    together = scored("--mode", "cosine,tmm,l2", *options)
    assert list(together) == ["cosine", "tmm", "l2"]
    assert together == scored("--mode", "cosine") | scored("--mode", "tmm", *options) | scored("--mode", "l2")
    assert {mode: count for mode, (count, _) in together.items()} == {"cosine": N, "tmm": 20, "l2": N}
