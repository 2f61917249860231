"""Recognition in every mode of a search: by hand, told in the answer, and refused where it makes no sense."""

import json
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from scipy.special import expit
from torch import nn

from tests.digits import IMAGES, LABELS, SHORTLY, make_classifier
from tests.modes import MODES, in_mode
from tmm_engine import Engine
from tmm_engine.cli.main import main
from tmm_engine.index import ArraySource, Classifier, InputError
from tmm_engine.index.store.building import write_index
from tmm_engine.rerank import preset

N = 60
ROBUST = preset("fast")
PLAIN = ROBUST.with_settings(["recognition=none"])
COPIED = (3, 12, 27)


def noisy(number: int) -> np.ndarray:
    """A digit under noise that changes the order of its neighbours, and leaves no doubt which digit it is."""
    noise = np.random.default_rng(number).standard_normal((8, 8))
    return (IMAGES[number] / 255 + 0.05 * noise).clip(0, 1).astype(np.float32)


def id_of(number: int) -> str:
    return f"{number:08}"


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture(scope="module")
def engine(classifier: Classifier) -> Engine:
    """Without descriptors: what ranks recognises."""
    return Engine.from_arrays(IMAGES[:N], LABELS[:N], classifier, views=0, global_trigger=SHORTLY)


@pytest.fixture(scope="module")
def described(classifier: Classifier) -> Engine:
    """With a recogniser of its own."""
    return Engine.from_arrays(IMAGES[:N], LABELS[:N], classifier, views=2, global_trigger=SHORTLY)


@pytest.fixture(scope="module")
def by_pixels() -> Classifier:
    """Its features are the pixels."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Classifier.from_module(network, image_shape=(1, 8, 8), mean=(0.0,), std=(1.0,))


# ---- what comes first


def test_what_the_recogniser_finds_nearest_comes_first_and_the_others_stay(classifier: Classifier):
    many = Engine.from_arrays(IMAGES[:400], LABELS[:400], classifier, views=2)
    options = {"recognition": 0.01}  # no query is taken for a copy
    put_first = 0
    for number in range(0, 400, 10):
        image = (0.5 * np.roll(noisy(number), 1, axis=1)).astype(np.float32)
        plain = [hit.id for hit in many.search(image, k=400, recognition=False).hits]
        found = many.search(image, k=20, **options)
        first, *others = [hit.id for hit in found.hits]
        note = f"{first} comes first by what recognises copies, not by its score"
        assert others == [other for other in plain if other != first][:19]
        assert (note in found.notes) == found.put_first == (first != plain[0])
        assert found.recognised_as is None
        assert [hit.id for hit in many.search(image, k=1, **options).hits] == [first]
        put_first += first != plain[0]
    assert 5 < put_first < 40


def test_of_two_that_the_recogniser_cannot_tell_apart_neither_comes_first(classifier: Classifier):
    """Two images with the same means over the recogniser's cells; the query is one of them."""
    images = IMAGES[:400].copy()
    images[3] = images[7]
    images[3, :4, :4] = images[7, :4, :4].T
    assert not np.array_equal(images[3], images[7])
    twins = Engine.from_arrays(images, LABELS[:400], classifier, views=1, recogniser="pixels:2x2")
    found = twins.search(twins.exemplar(id_of(7)), k=5)
    assert (found.hits[0].id, found.put_first) == (id_of(7), False)


def test_approximate_search_puts_the_same_first(classifier: Classifier):
    exact = Engine.from_arrays(IMAGES[:400], LABELS[:400], classifier, views=2)
    graph = Engine.from_arrays(IMAGES[:400], LABELS[:400], classifier, views=2, neighbours="HNSW32,Flat")
    image = (0.5 * np.roll(noisy(20), 1, axis=1)).astype(np.float32)
    for k in (1, 5):
        one, other = (engine.search(image, k=k, recognition=0.01) for engine in (exact, graph))
        assert one.hits[0].id == other.hits[0].id
        assert len(one.hits) == len(other.hits) == k


# ---- what is found


@pytest.fixture(scope="module")
def exemplars(engine: Engine) -> np.ndarray:
    return engine.store.features(np.arange(N)).astype(np.float64)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("mode", ["l2", "cosine"])
def test_a_baseline_moves_the_query_by_the_formula(
    engine: Engine, classifier: Classifier, exemplars: np.ndarray, *, mode: str, threshold: float
):
    def scores(query: np.ndarray) -> np.ndarray:
        if mode == "l2":
            return -np.linalg.norm(exemplars - query, axis=1)
        return exemplars @ query / np.linalg.norm(exemplars, axis=1) / np.linalg.norm(query)

    for image in (noisy(3), noisy(12), IMAGES[200] / np.float32(255)):
        with torch.inference_mode():
            query = classifier.features(torch.tensor(image[None, None], dtype=torch.float32)).double().numpy()[0]
        nearest, second = np.argsort(-scores(query))[:2]
        distances = -scores(query) if mode == "l2" else np.sqrt(1 - scores(query))
        share = expit(20 * (threshold - distances[nearest] / distances[second]) / threshold)
        expected = scores((1 - share) * query + share * exemplars[nearest])
        result = engine.search(image, k=N, mode=mode, recognition=threshold)
        found = np.array([hit.score for hit in sorted(result.hits, key=lambda hit: hit.id)])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)
        assert result.recognised_share == pytest.approx(share, abs=1e-3)
        assert result.recognised_as == (id_of(int(nearest)) if share >= 0.5 else None)
        assert "recognition" in result.timings


@pytest.mark.parametrize("mode", MODES)
def test_a_noisy_copy_is_answered_for_as_its_exemplar(engine: Engine, mode: str):
    options = in_mode(mode, PLAIN)
    for number in COPIED:
        own = engine.search(IMAGES[number], recognition=0.8, **options)
        copy = engine.search(noisy(number), recognition=0.8, **options)
        without = engine.search(noisy(number), **options)
        assert own.recognised_as == copy.recognised_as == id_of(number)
        assert [hit.id for hit in copy.hits] == [hit.id for hit in own.hits] != [hit.id for hit in without.hits]
        assert copy.recognised_share is not None
        assert copy.recognised_share > 0.99


@pytest.mark.parametrize("number", [*COPIED, 200])
def test_confidences_are_the_querys_own(engine: Engine, number: int):
    image = noisy(number)
    with_, without = (engine.search(image, k=N, config=PLAIN, recognition=one) for one in (0.8, False))
    own = {hit.id: hit.confidence for hit in without.hits}
    assert {hit.id: hit.confidence for hit in with_.hits} == own
    assert number == 200 or [hit.score for hit in with_.hits] != [hit.score for hit in without.hits]


@pytest.mark.parametrize("mode", MODES)
def test_a_held_out_query_keeps_its_answer(engine: Engine, mode: str):
    options = in_mode(mode, PLAIN)
    seen = 0
    for image in IMAGES[200:210]:
        found, without = (engine.search(image, recognition=one, **options) for one in (0.8, False))
        assert found.recognised_share is not None
        if found.recognised_share < 0.05:
            seen += 1
            assert found.recognised_as is None
            assert len({hit.id for hit in found.hits} & {hit.id for hit in without.hits}) >= 9
            np.testing.assert_allclose(found.hits[0].score, without.hits[0].score, rtol=0.05)
    assert seen >= 3


@pytest.mark.parametrize("mode", ["l2", "cosine"])
def test_a_query_as_far_from_two_exemplars_keeps_its_answer(by_pixels: Classifier, mode: str):
    """Halfway between a digit and its mirror image."""
    images = np.concatenate([IMAGES[3:4], IMAGES[3:4, :, ::-1], IMAGES[100:140]])
    engine = Engine.from_arrays(images, None, by_pixels, views=0, global_trigger=None)
    halfway = ((images[0] / 255 + images[1] / 255) / 2).astype(np.float32)
    found, without = (engine.search(halfway, k=5, mode=mode, recognition=one) for one in (0.8, False))
    assert {hit.id for hit in without.hits[:2]} == {id_of(0), id_of(1)}
    assert [hit.id for hit in found.hits[2:]] == [hit.id for hit in without.hits[2:]]
    assert {hit.id for hit in found.hits[:2]} == {id_of(0), id_of(1)}
    np.testing.assert_allclose([hit.score for hit in found.hits], [hit.score for hit in without.hits], rtol=0.02)
    assert found.recognised_share == pytest.approx(expit(-5.0), rel=1e-3)
    assert (found.recognised_as, found.notes) == (None, ())


@pytest.mark.parametrize("mode", MODES)
def test_where_there_are_descriptors_every_mode_recognises_by_their_recogniser(described: Engine, mode: str):
    options = in_mode(mode, PLAIN) | {"recognition": 0.8, "k": 10}
    for image in (noisy(3), noisy(12), IMAGES[200] / np.float32(255)):
        robust = described.search(image, recognition=0.8)
        found = described.search(image, **options)
        assert found.recognised_as == robust.recognised_as
        assert found.recognised_share == pytest.approx(robust.recognised_share, abs=1e-5)
        if found.recognised_share > 0.99:  # a stranger may be moved by a part of the way
            itself = described.search(described.exemplar(found.recognised_as), **options)
            assert [hit.id for hit in found.hits] == [hit.id for hit in itself.hits]
    without = described.search(noisy(3), **options | {"recognition": False})
    assert (without.recognised_as, without.recognised_share) == (None, None)


def test_a_recogniser_may_recognise_what_is_no_candidate(described: Engine):
    found = described.search(noisy(3), k=5, config=PLAIN, candidates=10, recognition=0.8, prefilter="l2")
    assert found.recognised_as == id_of(3)


@pytest.fixture(scope="module")
def twice(by_pixels: Classifier) -> Engine:
    """Every exemplar is there twice."""
    images, labels = np.repeat(IMAGES[:30], 2, axis=0), np.repeat(LABELS[:30], 2)
    return Engine.from_arrays(images, labels, by_pixels, views=0, global_trigger=SHORTLY)


@pytest.mark.parametrize("mode", MODES)
def test_of_duplicates_none_is_recognised_and_the_answer_is_close_to_that_without(twice: Engine, mode: str):
    options = in_mode(mode, PLAIN) | {"k": 60}
    for number in COPIED:
        found, without = (twice.search(noisy(number), recognition=one, **options) for one in (0.8, False))
        assert {hit.id for hit in found.hits[:2]} == {id_of(2 * number), id_of(2 * number + 1)}
        assert (found.recognised_as, found.notes) == (None, ())
        assert found.recognised_share == pytest.approx(expit(-5.0), rel=0.05)
        scores = [{hit.id: hit.score for hit in result.hits} for result in (found, without)]
        assert max(abs(score - scores[1][id_]) for id_, score in scores[0].items()) < 0.02
    itself = twice.search(twice.exemplar(id_of(6)), recognition=0.8, **options)
    without = twice.search(twice.exemplar(id_of(6)), recognition=False, **options)
    assert itself.notes == ()
    np.testing.assert_allclose([hit.score for hit in itself.hits], [hit.score for hit in without.hits], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_in_an_index_of_one_exemplar_nothing_is_recognised(by_pixels: Classifier, mode: str):
    engine = Engine.from_arrays(IMAGES[:1], None, by_pixels, views=0, global_trigger=SHORTLY)
    found = engine.search(noisy(0), mode=mode, k=1, recognition=0.8)
    assert [hit.id for hit in found.hits] == [id_of(0)]
    assert (found.recognised_as, found.recognised_share, found.notes) == (None, None, ())


@pytest.mark.parametrize("mode", MODES)
def test_several_queries_are_recognised_as_each_alone(engine: Engine, mode: str):
    images = [noisy(3), IMAGES[200], noisy(12)]
    options = in_mode(mode, PLAIN) | {"recognition": 0.8}
    bit_for_bit = {} if mode == "tmm" else {"alone": True}
    for image, one in zip(images, engine.search(images, **options, **bit_for_bit), strict=True):
        alone = engine.search(image, **options)
        assert (one.recognised_as, one.recognised_share) == (alone.recognised_as, alone.recognised_share)
        assert [(hit.id, hit.score) for hit in one.hits] == [(hit.id, hit.score) for hit in alone.hits]


@pytest.mark.parametrize("mode", MODES)
def test_only_what_the_filter_leaves_is_recognised(engine: Engine, mode: str):
    options = in_mode(mode, PLAIN) | {"recognition": 1.0}
    for number in COPIED:
        digit = int(LABELS[number])
        assert engine.search(noisy(number), where=f"label = {digit}", **options).recognised_as == id_of(number)
        others = engine.search(noisy(number), where=f"label <> {digit}", **options)
        assert others.recognised_as not in (None, id_of(number))


def test_where_an_approximate_index_finds_fewer_than_two_the_search_is_exact(by_pixels: Classifier):
    images = np.concatenate([np.repeat(IMAGES[:1], 3, axis=0), IMAGES[1:58]])  # of 8 clusters some hold fewer than 10
    options = {"views": 0, "global_trigger": None}
    engine = Engine.from_arrays(images, None, by_pixels, neighbours="IVF8,Flat", **options)
    exact = Engine.from_arrays(images, None, by_pixels, **options)
    queries = list(IMAGES[:230])
    found = engine.search(queries, mode="l2", recognition=0.5)
    expected = exact.search(queries, mode="l2", recognition=0.5)
    assert all(len(result.hits) == 10 and result.recognised_share is not None for result in found)
    other = [one.hits != best.hits for one, best in zip(found, expected, strict=True)]
    assert any(other)  # the approximate index is in use
    assert not all(other)


@pytest.mark.parametrize("mode", MODES)
def test_where_a_filter_leaves_one_exemplar_nothing_is_recognised(engine: Engine, mode: str):
    options = in_mode(mode, PLAIN) | {"recognition": 0.8}
    result = engine.search(noisy(12), where=f"id = '{id_of(12)}'", **options)
    assert [hit.id for hit in result.hits] == [id_of(12)]
    assert (result.recognised_as, result.recognised_share) == (None, None)


# ---- what is told


@pytest.mark.parametrize("mode", MODES)
def test_a_note_tells_of_a_copy_and_of_nothing_else(engine: Engine, mode: str):
    options = in_mode(mode, PLAIN) | {"recognition": 0.8}
    copy = engine.search(noisy(12), **options)
    [note] = copy.notes
    assert note == f"recognised as {id_of(12)}: ranked by what is like that exemplar"
    told = copy.to_json()
    assert (told["recognised_as"], told["notes"]) == (id_of(12), (note,))
    assert 0.99 < told["recognised_share"] <= 1.0
    for itself in (engine.exemplar(id_of(12)), IMAGES[12]):  # pixel by pixel, whatever its name
        result = engine.search(itself, **options)
        assert (result.recognised_as, result.notes) == (id_of(12), ())
    other = IMAGES[12].copy()
    other[0, 0] ^= 1
    assert engine.search(other, **options).notes == (note,)
    stranger = engine.search(IMAGES[200], **options | {"recognition": 0.01})
    off = engine.search(noisy(12), **options | {"recognition": False})
    for result, share in ((stranger, pytest.approx(0.0, abs=1e-20)), (off, None)):
        assert (result.recognised_as, result.notes) == (None, ())
        assert result.to_json()["recognised_as"] is None
        assert result.recognised_share == result.to_json()["recognised_share"] == share


def test_tmm_recognises_as_its_configuration_says_and_the_others_only_when_asked(engine: Engine):
    for config, recognition, expected in (
        (PLAIN, None, None),
        (ROBUST, None, 0.8),
        (ROBUST, 0.9, 0.9),
        (ROBUST, False, None),
        (PLAIN, 0.9, 0.9),
        (PLAIN, False, None),
    ):
        result = engine.search(noisy(12), config=config, recognition=recognition)
        assert result.config == ROBUST.to_json() | {"recognition": expected}
        assert result.recognised_as == (None if expected is None else id_of(12))
        for mode in ("l2", "cosine"):
            found = engine.search(noisy(12), mode=mode, recognition=recognition).recognised_as
            assert found == (id_of(12) if recognition else None)
    default = engine.search(noisy(12), config="fast")
    assert default.config == preset("fast").to_json()
    assert default.recognised_as == id_of(12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [2.0, 1.0001, 0.0, 0.009, -0.1, float("nan"), float("inf")])
def test_what_is_no_ratio_is_refused(engine: Engine, mode: str, value: float):
    with pytest.raises(InputError, match=r"recognition: expected a finite value in \[0\.01, 1\], got "):
        engine.search(IMAGES[3], mode=mode, recognition=value)
    with pytest.raises(InputError, match="recognition: expected"):
        engine.search_each([IMAGES[3]], mode=mode, recognition=value)


def test_true_is_no_ratio_either(engine: Engine):
    jaxtyping.config.update("jaxtyping_disable", True)  # as a user runs it
    try:
        for mode in MODES:
            with pytest.raises(InputError, match="recognition: expected a number, got True"):
                engine.search(IMAGES[3], mode=mode, recognition=True)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# ---- the command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, classifier: Classifier) -> Path:
    """A folder with digits.idx and copy.png, noise upon exemplar 12."""
    folder = tmp_path_factory.mktemp("recognition")
    write_index(ArraySource(IMAGES[:N], LABELS[:N]), folder / "digits.idx", classifier)
    Image.fromarray(np.rint(255 * noisy(12)).astype(np.uint8)).save(folder / "copy.png")
    return folder


def test_the_command_line_recognises_in_json_in_tables_on_the_page_and_in_the_picture(work: Path):
    searched = ("search", work / "digits.idx", work / "copy.png", "--id", id_of(12), "--mode", "l2,cosine")
    files = ("--html", work / "page.html", "--png", work / "sheet.png")
    done = run(*searched, *files, "--recognition", "0.8", "--json")
    assert done.exit_code == 0, done.stderr
    page, sheet = (work / "page.html").read_text(), (work / "sheet.png").read_bytes()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["mode"], line["recognised_as"]) for line in lines] == 2 * [("l2", id_of(12)), ("cosine", id_of(12))]
    copy, own = lines[:2], lines[2:]
    for one, other in zip(copy, own, strict=True):
        assert [hit["id"] for hit in one["hits"]] == [hit["id"] for hit in other["hits"]]
        assert one["notes"] == [f"recognised as {id_of(12)}: ranked by what is like that exemplar"]
        assert other["notes"] == []
    assert page.count(f"· recognised as {id_of(12)}</span>") == 2, "the exemplar itself, of which there is no note"
    assert page.count(f"<li>recognised as {id_of(12)}: ranked by what is like that exemplar</li>") == 2
    for switched_off in ((), ("--recognition", "off"), ("--recognition", "OFF")):
        off = run(*searched, *files, *switched_off, "--json")
        assert [json.loads(line)["recognised_as"] for line in off.stdout.splitlines()] == [None] * 4
        assert "recognised as" not in (work / "page.html").read_text()
        assert (work / "sheet.png").read_bytes() != sheet
    table = " ".join(run(*searched, "--recognition", "0.8").stdout.split())
    assert table.count(f"recognised as {id_of(12)}: ranked by what is like that exemplar") == 2


def test_settings_switch_recognition_of_tmm_on_and_off(work: Path):
    searched = ("search", work / "digits.idx", work / "copy.png", "--preset", "paper", "--candidates", "20", "--json")
    quick = ("--set", "head.min_steps=10", "--set", "trigger.steps=5")
    on = ("--set", "recognition=0.9")
    for options, expected in (
        ((), None),
        (on, 0.9),
        (("--recognition", "0.95"), 0.95),
        ((*on, "--recognition", "0.95"), 0.95),
        ((*on, "--set", "recognition=none"), None),
        ((*on, "--recognition", "off"), None),
    ):
        answer = json.loads(run(*searched, *quick, *options).stdout)
        assert answer["config"]["recognition"] == expected
        assert (answer["recognised_share"] is None) == (expected is None)


@pytest.mark.parametrize("value", ["2", "1.01", "nan", "-1", "0", "-0.0", "inf", "x", ""])
def test_what_is_no_ratio_is_refused_before_the_index_is_opened(tmp_path: Path, value: str):
    query = ("--id", id_of(12))
    refused = run("search", tmp_path / "none.idx", *query, f"--recognition={value}")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"'--recognition': expected a ratio from 0.01 to 1, or off, got '{value}'" in refused.stderr
    by_setting = run("search", tmp_path / "none.idx", *query, f"--set=recognition={value}")
    assert (by_setting.exit_code, by_setting.stdout) == (1, "")
    assert by_setting.stderr.startswith("error: recognition: ")
    assert len(by_setting.stderr.splitlines()) == 1
    assert "does not exist" in run("search", tmp_path / "none.idx", *query, "--recognition=0.8").stderr
