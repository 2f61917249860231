"""Labels of one's own: shown, filtered, used by Eq. 3 where they are classes; in memory and on disk alike."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from tests.conftest import SHAPE, network
from tests.digits import SHORT, make_classifier, write_photos, write_queries
from tests.modes import quick
from tmm_engine import Engine, Query
from tmm_engine.building import build_index
from tmm_engine.cli.main import main
from tmm_engine.index import ArraySource, Classifier, InputError
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.info import describe_index
from tmm_engine.query import queries_from
from tmm_engine.rerank.classes import ExemplarClasses
from tmm_engine.rerank.tmm import TmmNN
from tmm_engine.verify import verify_index
from tmm_engine.views.showing import agrees

N = 40
NAMES = ("ant", "bee", "cat", "dog")
IMAGES = np.random.default_rng(5).integers(0, 256, (N, *SHAPE), dtype=np.uint8)
LABELS = [None if n % 8 == 7 else "Mittens" if n % 4 == 0 else "Tom" if n % 4 == 1 else "cat" for n in range(N)]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.from_module(network(), image_shape=SHAPE, class_names=NAMES)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, classifier: Classifier) -> Path:
    path = tmp_path_factory.mktemp("labels") / "own.idx"
    build_index(source(), path, classifier, views=0)
    return path


def source() -> ArraySource:
    return ArraySource(IMAGES, LABELS, metadata={"page": list(range(N))}, name="pets")


def opened(path: Path) -> Engine:
    return Engine.open(path, model=network(), device="cpu")


@pytest.fixture(params=["memory", "disk"])
def engine(request: pytest.FixtureRequest, built: Path, classifier: Classifier) -> Engine:
    if request.param == "disk":
        return opened(built)
    return Engine.from_arrays(IMAGES, LABELS, classifier, metadata={"page": list(range(N))}, views=0)


@pytest.fixture(scope="module")
def predicted(classifier: Classifier) -> list[int]:
    with torch.inference_mode():
        return classifier.logits(classifier.features(torch.from_numpy(IMAGES) / 255.0)).argmax(1).tolist()


def test_a_hit_has_the_users_label_and_the_models_class(engine: Engine, predicted: list[int]):
    assert engine.class_names == NAMES
    assert engine.label_names == (*NAMES, "Mittens", "Tom")
    table = engine.to_arrow()
    assert table["predicted_class"].to_pylist() == [NAMES[said] for said in predicted]
    own = [NAMES[said] if name is None else name for name, said in zip(LABELS, predicted, strict=True)]
    assert table["class_name"].to_pylist() == own
    hits = engine.search(IMAGES[0], k=N, mode="l2").hits
    assert len(hits) == N
    for hit in hits:
        row = hit.metadata["page"]
        own = LABELS[row]
        assert hit.class_name == (NAMES[predicted[row]] if own is None else own)
        assert engine.label_names[hit.label] == hit.class_name
        assert (hit.predicted_label, hit.predicted_class) == (predicted[row], NAMES[predicted[row]])
        assert hit.label_is_predicted is (own is None)
        assert hit.label_is_class is (own not in ("Mittens", "Tom"))


@pytest.mark.parametrize(
    ("where", "matches"),
    [
        ("label = 'Mittens'", lambda label, said, page: label == "Mittens"),
        (
            "label IN ('Mittens', 'cat') AND page < 20",
            lambda label, said, page: label in ("Mittens", "cat") and page < 20,
        ),
        ("predicted = 'bee' OR label LIKE 'T%'", lambda label, said, page: said == 1 or label == "Tom"),
        ("label <> 'Tom'", lambda label, said, page: label not in ("Tom", None)),
        ("label IS NULL", lambda label, said, page: label is None),
        ("NOT label = 'Tom'", lambda label, said, page: label not in ("Tom", None)),
        ("NOT label NOT IN ('Tom', 'cat')", lambda label, said, page: label in ("Tom", "cat")),
        ("(label = 'Tom') IS NULL", lambda label, said, page: label is None),
        ("(label = 'Tom') IS NOT TRUE", lambda label, said, page: label != "Tom"),
        ("label = predicted", lambda label, said, page: label is None or label == NAMES[said]),
        ("label = 2", lambda label, said, page: label == "cat" or (label is None and said == 2)),
    ],
)
def test_filters_by_label_and_by_predicted_class(engine: Engine, predicted: list[int], where: str, matches):
    hits = engine.search(IMAGES[3], k=N, mode="cosine", where=where).hits
    expected = {n for n in range(N) if matches(LABELS[n], predicted[n], n)}
    assert expected
    assert {hit.metadata["page"] for hit in hits} == expected


def test_a_filter_that_would_see_a_labels_number_as_a_text_is_refused(engine: Engine):
    with pytest.raises(InputError, match="expected label in a plain comparison"):
        engine.matching("cast(label as string) = '0'")


def test_eq_3_uses_the_label_where_it_is_a_class_else_the_prediction_and_the_answer_says_so(
    engine: Engine, classifier: Classifier, predicted: list[int]
):
    classes = ExemplarClasses.of(engine.store, len(NAMES))
    expected = [2 if label == "cat" else said for label, said in zip(LABELS, predicted, strict=True)]
    assert classes.numbers.tolist() == expected
    result = engine.search(IMAGES[1], k=5, config=quick(trigger_steps=5, head_steps=10))
    [note] = [note for note in result.notes if "Eq. 3" in note]
    assert "20 with a label that is no class of the model's and 5 without a label, the label of the other 15" in note
    as_numbers = MemoryStore.of(ArraySource(IMAGES, expected), classifier)
    query = torch.from_numpy(IMAGES[1]).float() / 255.0
    ranking = TmmNN(classifier, as_numbers).rank(query, k=5, config=quick(trigger_steps=5, head_steps=10))
    assert [hit.metadata["page"] for hit in result.hits] == ranking.rows.tolist()
    assert [hit.score for hit in result.hits] == ranking.scores.tolist()
    assert not [note for note in engine.search(IMAGES[1], k=5, mode="l2").notes if "Eq. 3" in note]


def test_a_neighbour_with_another_label_agrees_by_its_predicted_class(engine: Engine):
    result = engine.search(IMAGES[3], k=N, mode="l2")
    for hit in result.hits:
        said = hit.label if hit.label_is_class else hit.predicted_label
        assert agrees(hit, result) is (said == result.predicted_label)
    named = engine.search(Query("q", IMAGES[3] / np.float32(255), "Tom"), k=N, mode="l2")
    assert (named.true_label, named.true_class) == (5, "Tom")
    assert {agrees(hit, named) for hit in named.hits if hit.class_name == "Tom"} == {True}
    assert sum(agrees(hit, named) for hit in named.hits) == LABELS.count("Tom")
    unknown = engine.search(Query("q", IMAGES[3] / np.float32(255), "easy"), k=N, mode="l2")
    assert (unknown.true_label, unknown.true_class) == (None, "easy")
    assert [agrees(hit, unknown) for hit in unknown.hits] == [agrees(hit, result) for hit in result.hits]


@pytest.mark.parametrize(
    ("label", "number", "name"),
    [("Tom", 5, "Tom"), ("eel", None, "eel"), (5, 5, "Tom"), (99, None, "99"), (None, None, None)],
)
def test_a_querys_label_is_used_by_name_and_else_shown_as_it_is(
    engine: Engine, label: int | str | None, number: int | None, name: str | None
):
    result = engine.search(Query("q", IMAGES[0] / np.float32(255), label), k=1, mode="l2")
    assert (result.true_label, result.true_class) == (number, name)
    assert any("none of the index's" in note for note in result.notes) is (number is None and name is not None)


def test_a_folder_of_queries_brings_names_not_numbers(tmp_path: Path):
    photos = write_photos(tmp_path / "photos", count=20)
    queries = queries_from(FolderSource(photos), (1, 8, 8))
    assert {query.label for query in queries if isinstance(query, Query)} == {f"digit-{n}" for n in range(10)}


def test_the_report_of_an_engine_in_memory_says_what_was_guessed(classifier: Classifier):
    engine = Engine.from_arrays(IMAGES, LABELS, classifier, views=0)
    assert engine.report is not None
    assert engine.report.agreement is not None
    assert (engine.report.agreement.labelled, engine.report.agreement.compared) == (35, 15)
    assert any("5 of 40 images have no label" in note for note in engine.report.remarks)
    assert any("'Mittens', 'Tom'" in note for note in engine.report.remarks)


def test_texts_as_labels_are_checked():
    assert ArraySource(IMAGES[:2], ["b", "a"]).class_names == ("a", "b")
    with pytest.raises(InputError, match=r"one of the class names, got 'as' \(did you mean 'a'"):
        ArraySource(IMAGES[:2], ["as", "b"], class_names=["a", "b"])
    with pytest.raises(InputError, match="integers or of texts"):
        ArraySource(IMAGES[:2], np.array([1, "b"], dtype=object))
    assert not ArraySource(IMAGES[:2], [None, None]).labelled


def test_the_life_of_an_index_with_labels_of_its_own(built: Path, tmp_path: Path, classifier: Classifier):
    index = Path(shutil.copytree(built, tmp_path / "own.idx"))
    with opened(index) as engine:
        flat = engine.add(ArraySource(IMAGES[:3], ids=["x", "y", "z"], name="flat"))
        assert "no image has a label" in (flat.agreement.sentences()[0] if flat.agreement else "")
        named = engine.add(ArraySource(IMAGES[3:5], ["Anna", "Tom"], ids=["anna", "tom"], name="new"))
        assert "1 of the 2 labels of new" in named.remarks[0]
        assert engine.label_names == (*NAMES, "Mittens", "Tom", "Anna")
        assert [hit.id for hit in engine.search(IMAGES[0], mode="l2", where="label = 'Anna'").hits] == ["anna"]
        engine.delete(where="label = 'Mittens' OR label IS NULL")
        engine.compact()
        hits = engine.search(IMAGES[0], k=99, mode="l2").hits
        assert {hit.class_name for hit in hits} == {"Tom", "cat", "Anna"}
    manifest = Manifest.read(index)
    assert manifest.vocabulary == Vocabulary(NAMES, ("Mittens", "Tom", "Anna"))
    assert manifest.agreement is not None
    assert (manifest.agreement.labelled, manifest.agreement.compared) == (27, 15)
    assert verify_index(index, model=network()).findings == []
    described = describe_index(index)
    assert (described["num_classes"], described["num_other_labels"]) == (4, 3)
    assert "agree with" in described["agreement"]


def test_row_digests_do_not_depend_on_the_numbers_of_labels(tmp_path: Path, classifier: Classifier):
    """An index that grew has those of one that was built at once."""
    parts = [
        ArraySource(IMAGES[:2], ["Tom", "cat"], ids=["a", "b"]),
        ArraySource(IMAGES[2:4], ["Anna", "Tom"], ids=["c", "d"]),
    ]
    whole = ArraySource(IMAGES[:4], ["Tom", "cat", "Anna", "Tom"], ids=list("abcd"))
    build_index(parts[0], tmp_path / "grown.idx", classifier, views=0)
    with opened(tmp_path / "grown.idx") as engine:
        engine.add(parts[1])
    build_index(whole, tmp_path / "whole.idx", classifier, views=0)
    found = []
    for name in ("grown.idx", "whole.idx"):
        with opened(tmp_path / name) as engine:
            assert [engine.label_names[label] for label in engine.store.labels] == ["Tom", "cat", "Anna", "Tom"]
            found.append(engine.store._dataset.to_table(columns=["row_digest"])["row_digest"].to_pylist())
    assert found[0] == found[1]


def test_exemplars_of_an_older_format_have_predictions_too(tmp_path: Path):
    """They are computed from stored features: of hits, of filters, and of Eq. 3 for labels that came later."""
    index = Path(shutil.copytree(Path(__file__).parent / "data" / "format-2.idx", tmp_path / "old.idx"))
    with opened(index) as engine:
        hits = engine.search(engine.exemplar(str(engine.store.ids[0])), k=len(engine), mode="l2").hits
        said = {hit.id for hit in hits if hit.predicted_label == 1}
        assert 0 < len(said) < len(engine)
        name = engine.class_names[1]
        asked = engine.search(
            engine.exemplar(str(engine.store.ids[0])), k=len(engine), where=f"predicted = '{name}'", mode="l2"
        )
        assert {hit.id for hit in asked.hits} == said
        shape = engine.store.image_shape
        engine.add(ArraySource(np.zeros((1, *shape), np.uint8) + 9, ["Tom"], ids=["tom"]))
        assert engine.label_names[-1] == "Tom"
        classes = ExemplarClasses.of(engine.store, len(engine.class_names))
        assert classes.others == 1
        assert engine.manifest is not None
        assert engine.manifest.agreement is None
    assert "not known" in describe_index(index)["agreement"]


def one_hot() -> torch.nn.Module:
    """12 classes: the pixel that is lit; channels first."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 12, bias=False))
    model[1].weight.data = torch.eye(12)
    return model


def numbered_folders(path: Path, numbers: Iterable[int]) -> Path:
    """For each number a folder with the picture of its class."""
    for number in numbers:
        pixels = np.zeros((3, 2, 2), np.uint8)
        pixels.reshape(-1)[number] = 255
        (path / str(number)).mkdir(parents=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path / str(number) / "a.png")
    return path


def test_the_order_of_numbered_folders_is_doubted_where_the_predictions_say_the_other(tmp_path: Path):
    whole = numbered_folders(tmp_path / "whole", range(12))
    model = Classifier.from_module(one_hot(), image_shape=(3, 2, 2))
    report = build_index(whole, tmp_path / "whole.idx", model, views=0)
    assert report.agreement is not None
    assert report.agreement.agreeing == 2  # 0 and 1
    assert any("agree with 17% of the labels as their names were read, and with 100%" in x for x in report.remarks)
    part = numbered_folders(tmp_path / "part", (2, 10))
    report = build_index(part, tmp_path / "part.idx", model, views=0)
    assert report.agreement is not None
    assert report.agreement.agreeing == 2
    assert sum("numbers" in remark for remark in report.remarks) == 2
    assert not any("as their names were read" in remark for remark in report.remarks)
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(12))) + "\n")
    command = ["build-index", str(whole), str(tmp_path / "named.idx"), "--model", "tests.test_engine_labels:one_hot"]
    done = CliRunner().invoke(main, [*command, "--views", "0", "--class-names", str(tmp_path / "names.txt")])
    assert done.exit_code == 0, done.output
    assert "agree with 100 % of the labels" in done.output
    assert "warning" not in done.output
    refused = CliRunner().invoke(main, [*command, "--class-names", str(tmp_path / "none.txt")])
    assert (refused.exit_code, "a name in each line" in refused.output) == (2, True)


# ---- the command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line_says_what_agrees_and_shows_both(tmp_path: Path):
    classifier = replace(make_classifier(), class_names=tuple(f"digit-{n}" for n in range(10)))
    classifier.save(tmp_path / "weights.safetensors")
    photos = write_photos(tmp_path / "photos")
    weights = ("--weights", tmp_path / "weights.safetensors")
    done = run("build-index", photos, tmp_path / "a.idx", *weights, *SHORT)
    assert done.exit_code == 0, done.output
    assert "the model's predictions agree with" in done.stderr
    own = photos.rename(tmp_path / "own")
    (own / "digit-3").rename(own / "Mittens")
    done = run("build-index", own, tmp_path / "own.idx", *weights, *SHORT)
    assert done.exit_code == 0, done.output
    assert "that are its classes" in done.stderr
    assert "no class of the model's: 'Mittens'" in done.stderr
    write_queries(tmp_path / "queries")
    [query, *_] = sorted((tmp_path / "queries").iterdir())
    found = run("search", tmp_path / "own.idx", query, "--mode", "l2", "--where", "label = 'Mittens'", "--json")
    assert found.exit_code == 0, found.output
    assert {hit["class_name"] for hit in json.loads(found.stdout)["hits"]} == {"Mittens"}
    shown = run("search", tmp_path / "own.idx", query, "--mode", "l2", "--where", "label = 'Mittens'")
    assert "label    predicted" in shown.stdout
    wrong = run("search", tmp_path / "own.idx", query, "--where", "label = 'Mitens'")
    assert (wrong.exit_code, "did you mean 'Mittens'" in wrong.stderr) == (1, True)
