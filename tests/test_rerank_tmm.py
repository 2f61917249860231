"""The rerank as a whole: who is scored, in what order, from what memory, and what it must never touch."""

import gc
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import changed
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.rerank import TmmConfig, TmmNN
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.optimisation import make_trigger
from tmm_engine.rerank.score import dummy_scores
from tmm_engine.rerank.settings import Blend, QueryTrigger, Score, TunedHead
from tmm_engine.rerank.tuning import TuningSet, tune_head

QUICK = TmmConfig(trigger=QueryTrigger(steps=12), head=TunedHead(min_steps=10, batch=16, lr=0.02))


def assert_same_bytes(first, second):
    for name in ("rows", "scores", "confidences"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes(), name
    assert torch.equal(first.view.found.trigger, second.view.found.trigger)
    assert torch.equal(first.view.triggered, second.view.triggered)
    assert first.view.found.loss == second.view.found.loss


def by_hand(classifier, store, query, config, *, tuned_on, scored):
    """Algorithm 1 from its parts: scores of the rows `scored`, from a head tuned on the rows `tuned_on`."""
    found = make_trigger(classifier, query[None], config.trigger, seed=config.seed).trigger[0]
    omega = float(query.std(correction=0))

    def features(pixels, *, triggered):
        blend = {"intensity": omega, "blend": config.blending.formula, "clamp": config.blending.clamp}
        return classifier.features(apply_trigger(pixels, found, **blend) if triggered else pixels)

    def pixels(rows):
        return torch.tensor(store.images(rows)).to(query) / 255.0

    with torch.no_grad():
        clean = features(query[None], triggered=False)
        data = TuningSet(
            features(query[None], triggered=True)[0],
            clean[0],
            int(classifier.logits(clean).argmax()),
            features(pixels(tuned_on), triggered=True),
            features(pixels(tuned_on), triggered=False),
            torch.tensor(store.labels[tuned_on]),
        )
        head = tune_head(classifier.head, data, config.head, seed=config.seed)
        return dummy_scores(head, features(pixels(scored), triggered=True), config.head.score).numpy()


# ---- order


@settings(max_examples=200)
@given(
    values=st.lists(
        st.integers(-3, 3) | st.sampled_from([0.0, -0.0, np.inf, -np.inf, 1e-300]), min_size=1, max_size=30
    ),
    k=st.integers(1, 35),
    shuffle=st.randoms(use_true_random=False),
)
def test_best_first_is_a_sort_by_score_then_id(values, k, shuffle):
    exemplars = [f"id {i}" for i in range(40)]  # as strings, 'id 10' is before 'id 9'
    shuffle.shuffle(exemplars)
    rows = shuffle.sample(range(40), len(values))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], exemplars[rows[i]]))[:k]
    ids = np.array(exemplars, dtype=object)
    best = best_first(np.array(values, dtype=np.float64), np.array(rows), ids, k=k)
    assert best.tolist() == expected


@settings(max_examples=25)
@given(data=st.data())
def test_a_rerank_is_a_permutation_of_its_candidates_and_scores_fall(classifier, make_store, make_queries, data):
    store = make_store(classifier, 40)
    candidates = data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=40, unique=True))
    k = data.draw(st.integers(len(candidates), 60))
    companions = data.draw(st.integers(0, 50))
    query = make_queries(1, seed=data.draw(st.integers(0, 1000)), dtype=torch.float32)[0]
    config = changed(QUICK, candidate_companions=companions, score=data.draw(st.sampled_from(Score)))
    ranking = TmmNN(classifier, store).rank(query, k=k, config=config, candidates=np.array(candidates))
    assert sorted(ranking.rows) == sorted(candidates)
    assert ranking.scored == len(candidates)
    assert ranking.found_on == min(len(candidates) + companions, 40)
    assert (np.diff(ranking.scores) <= 0.0).all()
    assert ((ranking.confidences >= 0.0) & (ranking.confidences <= 1.0)).all()


def test_a_smaller_k_is_the_beginning_of_the_full_ranking(classifier, make_store, make_queries):
    tmm, query = TmmNN(classifier, make_store(classifier, 40)), make_queries(1, dtype=torch.float32)[0]
    full = tmm.rank(query, k=40, config=QUICK)
    assert sorted(full.rows) == list(range(40))
    assert full.scored == full.found_on == 40
    for k in (1, 7, 39, 100):
        ranking = tmm.rank(query, k=k, config=QUICK)
        assert ranking.rows.tolist() == full.rows[:k].tolist()
        np.testing.assert_array_equal(ranking.scores, full.scores[:k])


def test_ties_break_by_id(classifier, make_store, make_images, make_queries):
    images = make_images(8).repeat(5, axis=0)  # every exemplar five times
    ids = [f"id {i}" for i in np.random.default_rng(0).permutation(40)]
    store = make_store(classifier, 40, images=images, ids=ids)
    query = make_queries(1, dtype=torch.float32)[0]
    ranking = TmmNN(classifier, store).rank(query, k=40, config=QUICK)
    ordered = list(zip(-ranking.scores, store.ids[ranking.rows], strict=True))
    assert ordered == sorted(ordered)
    assert len(set(ranking.scores.tolist())) < 40, "there must be ties"
    top = TmmNN(classifier, store).rank(query, k=3, config=QUICK)
    assert top.rows.tolist() == ranking.rows[:3].tolist()


@pytest.mark.parametrize("settings_", [{}, {"max_tuning_exemplars": 20}, {"trigger": "fixed-patch"}])
def test_queries_ranked_together_are_ranked_as_alone(precise, make_store, make_queries, settings_):
    tmm, queries, config = TmmNN(precise, make_store(precise, 40)), make_queries(3), changed(QUICK, **settings_)
    together = tmm.rank_many(queries, k=40, config=config, labels=[None, 1, None])
    alone = [
        tmm.rank(query, k=40, config=config, label=label) for query, label in zip(queries, [None, 1, None], strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6, atol=1e-6)
        assert (one.view.label, one.scored, one.found_on) == (other.view.label, other.scored, other.found_on)
    some = [np.arange(5), None, np.array([30, 2])]
    mixed = tmm.rank_many(queries, k=40, config=config, candidates=some)
    assert [ranking.scored for ranking in mixed] == [5, 40, 2]
    assert sorted(mixed[2].rows) == [2, 30]


def test_mixed_candidates_are_ranked_as_alone(precise, make_store, make_queries):
    tmm, queries = TmmNN(precise, make_store(precise, 40)), make_queries(4)
    candidates = [np.arange(5), None, np.array([30, 2]), None]
    config = changed(QUICK, candidate_companions=6)
    mixed = tmm.rank_many(queries, k=40, config=config, candidates=candidates, labels=[None, 2, 1, None])
    for query, rows, label, one in zip(queries, candidates, [None, 2, 1, None], mixed, strict=True):
        other = tmm.rank(query, k=40, config=config, candidates=rows, label=label)
        assert one.rows.tolist() == other.rows.tolist()
        assert (one.view.label, one.scored, one.found_on) == (other.view.label, other.scored, other.found_on)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(one.confidences, other.confidences, rtol=1e-6, atol=1e-6)
        assert set(one.timings) == set(other.timings)


# ---- who tunes, who is scored


@pytest.mark.parametrize("score", Score)
def test_above_the_limit_a_sample_tunes_and_all_are_scored(precise, make_store, make_queries, score):
    store, query = make_store(precise, 50), make_queries(1)[0]
    config = changed(QUICK, max_tuning_exemplars=20, seed=4, score=score)
    ranking = TmmNN(precise, store).rank(query, k=50, config=config)
    assert (ranking.scored, ranking.found_on) == (50, 20)
    assert sorted(ranking.rows) == list(range(50))
    sample = np.sort(np.random.default_rng(4).choice(50, 20, replace=False))
    expected = by_hand(precise, store, query, config, tuned_on=sample, scored=np.arange(50))
    np.testing.assert_allclose(ranking.scores, expected[ranking.rows], rtol=1e-8, atol=1e-8)
    assert ranking.scores[0] == pytest.approx(expected.max(), rel=1e-8)
    at_limit = TmmNN(precise, store).rank(query, k=50, config=changed(config, max_tuning_exemplars=50))
    assert at_limit.found_on == 50
    assert np.abs(at_limit.scores - ranking.scores).max() > 1e-3


def test_candidates_are_scored_and_companions_only_tune(precise, make_store, make_queries):
    store, query, candidates = make_store(precise, 50), make_queries(1)[0], np.array([49, 3, 17, 8])
    tmm = TmmNN(precise, store)
    alone = tmm.rank(query, k=10, config=changed(QUICK, candidate_companions=0), candidates=candidates)
    some = tmm.rank(query, k=10, config=changed(QUICK, candidate_companions=10), candidates=candidates)
    all_ = tmm.rank(query, k=10, config=changed(QUICK, candidate_companions=1000), candidates=candidates)
    for ranking, tuned_on in ((alone, 4), (some, 14), (all_, 50)):
        assert (ranking.scored, ranking.found_on) == (4, tuned_on)
        assert sorted(ranking.rows) == sorted(candidates)
    others = np.setdiff1d(np.arange(50), candidates)
    for ranking, tuned_on in ((alone, candidates), (all_, np.concatenate([candidates, others]))):
        expected = by_hand(precise, store, query, QUICK, tuned_on=tuned_on, scored=ranking.rows)
        np.testing.assert_allclose(ranking.scores, expected, rtol=1e-8, atol=1e-8)
    assert sorted(map(float, alone.scores)) != sorted(map(float, some.scores))


def test_a_query_that_is_an_exemplar_stays(precise, make_store):
    store = make_store(precise, 40)
    query = torch.tensor(store.images(np.array([23]))[0]).double() / 255.0
    config = changed(QUICK, tuning_min_steps=300, blend=Blend.ADDED, clamp=False)
    ranking = TmmNN(precise, store).rank(query, k=40, config=config)
    assert 23 in ranking.rows[:4]  # its triggered features are the one positive that the head is tuned on


def test_the_label(precise, make_store, make_queries):
    store, query = make_store(precise, 40), make_queries(1)[0]
    tmm = TmmNN(precise, store)
    with torch.no_grad():
        predicted = int(precise.logits(precise.features(query[None])).argmax())
    by_default = tmm.rank(query, k=40, config=QUICK)
    assert by_default.view.label == predicted
    assert_same_bytes(tmm.rank(query, k=40, config=QUICK, label=predicted), by_default)
    other = tmm.rank(query, k=40, config=QUICK, label=(predicted + 1) % 4)
    assert other.view.label == (predicted + 1) % 4
    np.testing.assert_array_equal(other.view.found.trigger, by_default.view.found.trigger)
    assert np.abs(other.scores - by_default.scores).max() > 1e-3


# ---- what is said of the query


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("blend", Blend)
def test_the_trigger_its_losses_and_the_triggered_query_are_told(precise, make_store, make_queries, blend, clamp):
    query, config = make_queries(1)[0], changed(QUICK, blend=blend, clamp=clamp)
    ranking = TmmNN(precise, make_store(precise, 10)).rank(query, k=3, config=config)
    found = make_trigger(precise, query[None], config.trigger, seed=config.seed)
    np.testing.assert_allclose(ranking.view.found.trigger, found.trigger[0], rtol=0.0, atol=1e-9)
    assert ranking.view.found.loss == pytest.approx((float(found.initial_loss[0]), float(found.loss[0])), rel=1e-6)
    assert ranking.view.found.steps == int(found.steps[0])
    assert ranking.view.found.intensity == pytest.approx(query.numpy().std())
    expected = apply_trigger(
        query, ranking.view.found.trigger, intensity=ranking.view.found.intensity, blend=blend, clamp=clamp
    )
    np.testing.assert_array_equal(ranking.view.triggered, expected)
    assert ranking.timings
    assert min(ranking.timings.values()) >= 0.0


def test_confidences_are_probabilities_whatever_ranks(precise, make_store, make_queries):
    tmm, query = TmmNN(precise, make_store(precise, 40)), make_queries(1)[0]
    log_odds = tmm.rank(query, k=40, config=QUICK)
    logits = tmm.rank(query, k=40, config=changed(QUICK, score=Score.LOGIT))
    np.testing.assert_allclose(log_odds.confidences, 1.0 / (1.0 + np.exp(-log_odds.scores)), rtol=1e-12)
    by_row = dict(zip(log_odds.rows, log_odds.confidences, strict=True))
    np.testing.assert_allclose(logits.confidences, [by_row[row] for row in logits.rows], rtol=1e-12)
    assert (np.diff(logits.scores) <= 0.0).all()


@pytest.mark.parametrize("candidates", [None, np.arange(3, 1500)])
def test_progress_is_told_to_the_end(classifier, make_store, make_queries, candidates):
    told: list[tuple[str, int, int]] = []
    config = changed(QUICK, max_tuning_exemplars=1100, candidate_companions=3)
    tmm = TmmNN(classifier, make_store(classifier, 1500))
    query = make_queries(1, dtype=torch.float32)[0]
    tmm.rank(query, k=1, config=config, candidates=candidates, progress=lambda *step: told.append(step))
    steps = {step: [(done, total) for name, done, total in told if name == step] for step, _, _ in told}
    assert len(steps) == (3 if candidates is None else 2)
    for counts in steps.values():
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1] == counts[0][1] in (QUICK.trigger.steps, 1100, 1500)


# ---- refusals


@pytest.mark.parametrize(
    ("blend", "omega", "reason"),
    [
        (Blend.PRINTED, 0.0, "every triggered image the same"),
        (Blend.SWAPPED, 0.0, "the trigger invisible"),
        (Blend.SCALED, 0.0, "the trigger invisible"),
        (Blend.PRINTED, 1.0, "the trigger invisible"),
        (Blend.SWAPPED, 1.0, "every triggered image the same"),
    ],
)
def test_an_intensity_that_makes_the_blend_meaningless_is_refused_with_the_reason(
    precise, make_store, make_queries, *, blend, omega, reason
):
    tmm, query = TmmNN(precise, make_store(precise, 10)), make_queries(1)[0]
    message = rf"ω = {omega:g}.* makes {reason} with the blend '{blend}'.*'added'"
    with pytest.raises(InputError, match=message):
        tmm.rank(query, k=1, config=changed(QUICK, blend=blend, intensity=omega))
    if omega == 0.0:
        for level in (0.0, 0.1, 1.0):
            with pytest.raises(InputError, match="is the image constant"):
                tmm.rank(torch.full_like(query, level), k=1, config=changed(QUICK, blend=blend))


def test_a_constant_image_is_accepted_where_the_intensity_plays_no_part(precise, make_store):
    tmm = TmmNN(precise, make_store(precise, 10))
    for level in (0.0, 0.5, 1.0):
        query = torch.full((3, 8, 8), level, dtype=torch.float64)
        ranking = tmm.rank(query, k=10, config=changed(QUICK, blend=Blend.ADDED))
        assert ranking.view.found.intensity == pytest.approx(0.0, abs=1e-12)
        assert np.isfinite(ranking.scores).all()
        assert sorted(tmm.rank(query, k=10, config=changed(QUICK, intensity=0.3)).rows) == list(range(10))


def test_a_query_of_another_shape_is_refused(precise, make_store):
    with pytest.raises(InputError, match=r"expected images of shape \(n, 3, 8, 8\)"):
        TmmNN(precise, make_store(precise, 10)).rank(torch.rand(1, 8, 8).double(), k=1, config=QUICK)


# ---- memory, randomness, side effects


@pytest.mark.parametrize("cache_bytes", [0, 1500 * 3 * 8 * 8, 1500 * (3 * 8 * 8 + 4 * 12)])
@pytest.mark.parametrize("max_tuning", [60_000, 1200])
@pytest.mark.parametrize("candidates", [None, np.arange(1499, 10, -1)])
def test_streaming_from_the_store_equals_keeping_all(
    classifier, make_store, make_queries, *, cache_bytes, max_tuning, candidates
):
    store, queries = make_store(classifier, 1500), make_queries(2, dtype=torch.float32)
    config = changed(QUICK, max_tuning_exemplars=max_tuning, candidate_companions=5)
    resident, streaming = TmmNN(classifier, store), TmmNN(classifier, store, cache_bytes=cache_bytes)
    for query in [*queries, queries[0]]:  # the first query fills what is kept, the others use it
        expected = resident.rank(query, k=1500, config=config, candidates=candidates)
        assert_same_bytes(streaming.rank(query, k=1500, config=config, candidates=candidates), expected)
    resident.rank(queries[1], k=1, config=config)  # all images are kept now, then candidates are taken from them
    assert_same_bytes(resident.rank(queries[0], k=1500, config=config, candidates=candidates), expected)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_trigger(classifier, make_store, make_queries):
    store, query = make_store(classifier, 40), make_queries(1, dtype=torch.float32)[0]
    config = changed(QUICK, max_tuning_exemplars=30, seed=3)
    first = TmmNN(classifier, store).rank(query, k=40, config=config)
    torch.manual_seed(1234)
    again = TmmNN(classifier.to("cpu"), store).rank(query, k=40, config=config)
    assert_same_bytes(first, again)
    other = TmmNN(classifier, store).rank(query, k=40, config=changed(config, seed=4))
    assert (other.view.found.trigger - first.view.found.trigger).abs().max() > 1e-3


def test_the_global_generators_are_left_alone(classifier, make_store, make_queries):
    tmm, query = TmmNN(classifier, make_store(classifier, 40)), make_queries(1, dtype=torch.float32)[0]
    before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    tmm.rank(query, k=5, config=changed(QUICK, max_tuning_exemplars=30))
    tmm.rank(query, k=5, config=QUICK, candidates=np.arange(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == numpy_before  # noqa: NPY002


@pytest.mark.parametrize("bias", [True, False])
def test_nothing_given_is_changed(make_network, make_store, make_queries, bias):
    model = make_network(bias=bias)
    users_bytes = [value.numpy().tobytes() for value in model.state_dict().values()]
    classifier = Classifier.from_module(model, image_shape=(3, 8, 8))
    store, query = make_store(classifier, 40), make_queries(1, dtype=torch.float32)[0]
    every = np.arange(40)
    candidates = np.arange(20, 30)

    def everything():
        modules = (classifier.backbone, classifier.head)
        tensors = [value.numpy() for module in modules for value in module.state_dict().values()]
        arrays = [store.images(every), store.features(every), store.labels, query.numpy(), candidates]
        return [array.tobytes() for array in [*tensors, *arrays]]

    before, ids = everything(), store.ids.tolist()
    for blend in Blend:
        tmm, config = TmmNN(classifier, store), changed(QUICK, blend=blend)
        tmm.rank(query, k=5, config=config)
        tmm.rank(query, k=5, config=config, candidates=candidates)
        tmm.rank(query, k=5, config=changed(config, max_tuning_exemplars=8))
    assert everything() == before
    assert store.ids.tolist() == ids
    assert [value.numpy().tobytes() for value in model.state_dict().values()] == users_bytes
    assert all(module.training for module in model.modules()), "the user's model keeps its mode"
    assert classifier.num_classes == 4


def test_neither_gradients_nor_graphs_are_kept(classifier, make_store, make_queries):
    tmm, query = TmmNN(classifier, make_store(classifier, 40)), make_queries(1, dtype=torch.float32)[0]
    ranking = tmm.rank(query, k=5, config=QUICK)
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    assert not [tensor.shape for tensor in tensors if tensor.grad_fn is not None]
    parameters = [*classifier.backbone.parameters(), *classifier.head.parameters()]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)
    view = ranking.view
    kept = (view.pixels, view.triggered, view.features, view.found.trigger)
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same(classifier, make_store, make_queries, mode):
    store, query = make_store(classifier, 40), make_queries(1, dtype=torch.float32)[0]
    tmm = TmmNN(classifier, store)
    expected = tmm.rank(query, k=40, config=QUICK)
    with mode():
        assert_same_bytes(TmmNN(classifier, store).rank(query.clone(), k=40, config=QUICK), expected)
        assert_same_bytes(tmm.rank(query, k=40, config=QUICK), expected)
    assert_same_bytes(tmm.rank(query, k=40, config=QUICK), expected)
