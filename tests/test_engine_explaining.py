"""Explanations against brute force, and the influence against gradients that autograd and Captum compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import classifier_of, network
from tests.page import Page
from tmm_engine import Engine, SearchResult, write_html
from tmm_engine.explaining import SHOWN
from tmm_engine.index import Classifier
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.prototypes import medoids
from tmm_engine.rerank import preset

N = 90
MODES = ("robust", "l2", "cosine")


@pytest.fixture(scope="module")
def images(make_images) -> np.ndarray:
    return make_images(N + 10, seed=5)


@pytest.fixture(scope="module")
def engine(images: np.ndarray, classifier: Classifier) -> Engine:
    labels = np.random.default_rng(3).integers(0, classifier.num_classes, N)
    return Engine.from_arrays(images[:N], labels, classifier, views=2)


@pytest.fixture(scope="module")
def explained(engine: Engine, images: np.ndarray) -> dict[str, list[SearchResult]]:
    queries = [*images[N : N + 3]]
    return {mode: engine.search(queries, mode=mode, explain=True, alone=True) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_unlike_are_the_first_of_another_class_in_the_whole_ranking(engine: Engine, images, explained, mode: str):
    for place, result in enumerate(explained[mode]):
        everything = engine.search(images[N + place], mode=mode, k=N).hits
        others = [hit for hit in everything if hit.label != result.predicted_label][:SHOWN]
        assert [(hit.id, hit.score) for hit in result.explanation.unlike] == [(hit.id, hit.score) for hit in others]
        assert result.explanation.class_name == result.predicted_class


@pytest.mark.parametrize("mode", MODES)
def test_queries_that_pass_the_network_together_are_explained_as_alone(engine: Engine, images, explained, mode: str):
    together = engine.search([*images[N : N + 3]], mode=mode, explain=True)
    for one, other in zip(together, explained[mode], strict=True):
        assert one.explanation.class_name == other.explanation.class_name
        for kind in ("unlike", "prototypes", "pulled_towards", "pulled_away"):
            own, others = getattr(one.explanation, kind), getattr(other.explanation, kind)
            assert [hit.id for hit in own] == [hit.id for hit in others]
            assert [hit.score for hit in own] == pytest.approx([hit.score for hit in others], rel=1e-4, abs=1e-6)


def test_unlike_of_tmm_are_of_its_own_ranking(engine: Engine, images: np.ndarray):
    quick = preset("paper").with_settings(["trigger.steps=5", "head.min_steps=5"])
    for candidates in (None, 20):
        asked = {"mode": "tmm", "config": quick, "candidates": candidates}
        whole = engine.search(images[N], k=candidates or N, **asked).hits
        few = engine.search(images[N], k=2, explain=True, **asked)
        assert [hit.id for hit in few.hits] == [hit.id for hit in whole[:2]]
        others = [(hit.id, hit.score) for hit in whole if hit.label != few.predicted_label]
        assert [(hit.id, hit.score) for hit in few.explanation.unlike] == others[:SHOWN]


@pytest.mark.parametrize(("metric", "column"), [(Metric.L2, "feature"), (Metric.COSINE, "robust_feature")])
def test_medoids_are_nearest_to_all_of_their_class(engine: Engine, metric: Metric, column: str):
    store = engine.store
    features = store.features(np.arange(N), column=column).astype(np.float64)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    found = medoids(store, store.labels, metric, column=column)
    assert sorted(found) == np.unique(store.labels).tolist()
    for label, row in found.items():
        rows = np.flatnonzero(store.labels == label)
        if metric is Metric.L2:
            costs = ((features[rows, None] - features[None, rows]) ** 2).sum(axis=(1, 2))
        else:
            costs = -(units[rows] @ units[rows].T).sum(axis=1)
        assert row == rows[costs.argmin()]


def test_prototypes_are_of_the_class_and_of_the_alternative(explained):
    for result in explained["cosine"]:
        of_class, of_other = result.explanation.prototypes
        assert of_class.label == result.predicted_label
        assert of_other.label == result.explanation.unlike[0].label


def gradients(classifier: Classifier, features: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Of cross-entropy with respect to all of the head, by autograd, row by row, in float64."""
    head = nn.Linear(classifier.feature_dim, classifier.num_classes, bias=classifier.head.bias is not None).double()
    head.load_state_dict(classifier.head.state_dict())
    found = []
    for feature, label in zip(features.double(), classes, strict=True):
        loss = nn.functional.cross_entropy(head(feature[None]), label[None])
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*head.parameters()])]))
    return torch.stack(found)


@pytest.mark.parametrize("bias", [True, False])
def test_influence_is_the_product_of_gradients(images: np.ndarray, bias: bool):
    classifier = classifier_of(network(bias=bias, seed=2))
    labels = np.random.default_rng(1).integers(0, classifier.num_classes, N)
    with Engine.from_arrays(images[:N], labels, classifier, views=0) as engine:
        result = engine.search(images[N], mode="l2", explain=True)
        query = classifier.features(torch.tensor(images[N : N + 1]) / 255.0)
        own = gradients(classifier, query, torch.tensor([result.predicted_label]))
        stored = torch.tensor(engine.store.features(np.arange(N)))
        influence = (gradients(classifier, stored, torch.tensor(labels)) @ own[0]).numpy()
    expected = influence[np.argsort(-influence)[:SHOWN]]
    towards, away = result.explanation.pulled_towards, result.explanation.pulled_away
    np.testing.assert_allclose([hit.score for hit in towards], expected, rtol=1e-6)
    np.testing.assert_allclose([hit.score for hit in away], np.sort(influence)[:SHOWN], rtol=1e-6)
    assert [int(hit.id) for hit in towards] == np.argsort(-influence)[:SHOWN].tolist()


def test_influence_is_of_the_query_as_the_mode_sees_it(engine: Engine, images: np.ndarray, classifier: Classifier):
    result = engine.search(images[N], mode="robust", explain=True)
    query = classifier.features(stretch_contrast(torch.tensor(images[N : N + 1]) / 255.0))
    own = gradients(classifier, query, torch.tensor([result.predicted_label]))
    stored = torch.tensor(engine.store.features(np.arange(N)))
    influence = (gradients(classifier, stored, torch.tensor(engine.store.labels)) @ own[0]).numpy()
    np.testing.assert_allclose(
        [hit.score for hit in result.explanation.pulled_towards], -np.sort(-influence)[:SHOWN], rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Captum's own
def test_influence_is_what_captum_computes(images: np.ndarray, tmp_path):
    influence = pytest.importorskip("captum.influence")
    model = network(bias=False, seed=2).eval()  # Captum's fast form leaves the bias of the last layer out
    classifier = classifier_of(model)
    labels = np.random.default_rng(1).integers(0, classifier.num_classes, N)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    pixels = classifier.backbone.get_submodule("normalise")(torch.tensor(np.array(images)) / 255.0)
    tracin = influence.TracInCPFast(
        model,
        model[-1],
        torch.utils.data.TensorDataset(pixels[:N], torch.tensor(labels)),
        [str(tmp_path / "checkpoint.pt")],
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=32,
    )
    with Engine.from_arrays(images[:N], labels, classifier, views=0) as engine:
        result = engine.search(images[N], mode="cosine", explain=True)
    asked = (pixels[N : N + 1], torch.tensor([result.predicted_label]))
    found = tracin.influence(asked, k=None)[0].detach().numpy()
    for sign, hits in ((1, result.explanation.pulled_towards), (-1, result.explanation.pulled_away)):
        best = np.argsort(-sign * found)[:SHOWN]
        assert [int(hit.id) for hit in hits] == best.tolist()
        np.testing.assert_allclose([hit.score for hit in hits], found[best], rtol=1e-4)


def test_an_explanation_is_alone_what_it_is_among_others(engine: Engine, images: np.ndarray, explained):
    alone = engine.search(images[N + 1], mode="robust", explain=True).explanation
    among = explained["robust"][1].explanation
    assert [hit.id for hit in alone.unlike] == [hit.id for hit in among.unlike]
    assert [hit.id for hit in alone.pulled_towards] == [hit.id for hit in among.pulled_towards]


def test_there_is_none_unless_it_is_asked_for(engine: Engine, images: np.ndarray):
    result = engine.search(images[N], mode="l2")
    assert result.explanation is None
    assert "explanation" not in result.to_json()


def test_of_one_class_there_is_nothing_unlike(engine: Engine, images: np.ndarray):
    predicted = engine.search(images[N], mode="l2").predicted_label
    result = engine.search(images[N], mode="l2", where=f"label = '{predicted}'", explain=True)
    assert result.explanation.unlike == ()
    assert len(result.explanation.prototypes) == 1
    assert "no exemplar that was scored is of another class than" in result.explanation.notes[0]
    others = engine.search(images[N], mode="l2", where=f"label <> '{predicted}'", explain=True)
    assert "has no prototype" in others.explanation.notes[0]


def test_json_and_page_show_it(engine: Engine, explained, tmp_path):
    result = explained["robust"][0]
    told = result.to_json()["explanation"]
    assert [hit["id"] for hit in told["unlike"]] == [hit.id for hit in result.explanation.unlike]
    assert set(told) == {"class_name", "unlike", "prototypes", "pulled_towards", "pulled_away", "notes"}
    name = "<b>x</b>"
    hostile = replace(result, explanation=replace(result.explanation, class_name=name, notes=(name,)))
    write_html([hostile], tmp_path / "why.html")
    source = (tmp_path / "why.html").read_text()
    page = Page(source)
    kinds = ("unlike", "prototypes", "pulled_towards", "pulled_away")
    shown = [hit.id for kind in kinds for hit in getattr(result.explanation, kind)]
    assert page.of_class("id") == [*(hit.id for hit in result.hits), *shown]
    assert name not in source
    assert "Pulled away from" in source
