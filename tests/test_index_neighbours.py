"""k nearest neighbours: exact search against NumPy, ties, batches, approximate indexes; and the ranking behind it."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.factories import Effort, make_faiss_index
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.neighbours.search import MARGIN, Neighbours, exact_scores
from tmm_engine.index.store.memory import MemoryStore

METRICS = list(Metric)


def store_of(features: np.ndarray, ids: list[str] | None = None) -> MemoryStore:
    n = len(features)
    return MemoryStore(
        np.zeros((n, 1, 1, 1), np.uint8),
        {"feature": np.ascontiguousarray(features, dtype=np.float32)},
        np.zeros(n, np.int64),
        ids=ids or [f"exemplar {row}" for row in range(n)],  # "exemplar 10" comes before "exemplar 2"
    )


def oracle_scores(query: np.ndarray, features: np.ndarray, metric: Metric) -> np.ndarray:
    """The definition, exemplar by exemplar, in extended precision."""
    scores = []
    for feature in features.astype(np.longdouble):
        xq = query.astype(np.longdouble)
        if metric is Metric.L2:
            scores.append(-np.sqrt(((feature - xq) ** 2).sum()))
        else:
            norms = np.sqrt((feature**2).sum()) * np.sqrt((xq**2).sum())
            scores.append((feature * xq).sum() / norms if norms else np.longdouble(0))
    return np.array(scores)


def full_ranking(query: np.ndarray, store: MemoryStore, metric: Metric) -> list[tuple[float, str]]:
    """All exemplars sorted by score, then id."""
    scores = exact_scores(query, store.features(np.arange(len(store))), metric)
    return sorted(zip((-scores).tolist(), store.ids.tolist(), strict=True))


def answer(store: MemoryStore, found: tuple[np.ndarray, np.ndarray]) -> list[tuple[float, str]]:
    rows, scores = found
    return list(zip((-scores).tolist(), store.ids[rows].tolist(), strict=True))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and queries (q, d): exact duplicates, near duplicates, multiples, zeros, several scales."""
    n, d, q = draw(st.integers(1, 120)), draw(st.integers(1, 12)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, 0.1, -0.3, 5.0])
    kind = draw(st.sampled_from(["few values", "normal", "near", "multiples"]))
    if kind == "few values":
        features = draw(hnp.arrays(np.float32, (n, d), elements=values.map(np.float32)))
    elif kind == "normal":
        features = rng.normal(size=(n, d))
    elif kind == "near":
        features = 100 + 1e-3 * rng.normal(size=(n, d))
    else:
        features = rng.integers(-50, 50, (n, 1)) * rng.integers(-2, 3, (1, d))
    features = (features * draw(st.sampled_from([1e-9, 1.0, 1e9]))).astype(np.float32)
    queries = features[rng.integers(0, n, q)] + np.float32(draw(st.sampled_from([0.0, 0.25]))) * features[0]
    return features, queries


# ---- exact search


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=120)
@given(problem=problems(), k=st.integers(1, 130))
def test_exact_search_is_the_head_of_the_full_ranking(metric, problem, k):
    features, queries = problem
    store = store_of(features)
    for query, found in zip(queries, Neighbours(store, metric).search(queries, k=k), strict=True):
        assert len(found[0]) == min(k, len(store))
        assert answer(store, found) == full_ranking(query, store, metric)[:k]


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=60)
@given(problem=problems())
def test_scores_are_those_of_the_definition(metric, problem):
    features, queries = problem
    expected = oracle_scores(queries[0], features, metric).astype(np.float64)
    np.testing.assert_allclose(exact_scores(queries[0], features, metric), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=60)
@given(problem=problems(), seed=st.integers(0, 2**32 - 1), k=st.integers(1, 20))
def test_the_order_of_exemplars_does_not_matter(metric, problem, seed, k):
    features, queries = problem
    store = store_of(features)
    order = np.random.default_rng(seed).permutation(len(features))
    shuffled = store_of(features[order], ids=store.ids[order].tolist())
    before = Neighbours(store, metric).search(queries, k=k)
    after = Neighbours(shuffled, metric).search(queries, k=k)
    assert [answer(store, found) for found in before] == [answer(shuffled, found) for found in after]


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=60)
@given(problem=problems(), k=st.integers(1, 20))
def test_a_batch_gives_what_single_queries_give_bit_for_bit(metric, problem, k):
    features, queries = problem
    searcher = Neighbours(store_of(features), metric)
    for query, (rows, scores) in zip(queries, searcher.search(queries, k=k), strict=True):
        ((alone_rows, alone_scores),) = searcher.search(query[None], k=k)
        np.testing.assert_array_equal(rows, alone_rows)
        np.testing.assert_array_equal(scores.view(np.int64), alone_scores.view(np.int64))


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_beyond_what_float32_tells_apart(metric):
    features = (100 + 1e-3 * np.random.default_rng(0).normal(size=(600, 512))).astype(np.float32)
    store, queries = store_of(features), features[:300]  # so many that FAISS expands |x − y|² and loses all digits
    for query, found in zip(queries, Neighbours(store, metric).search(queries, k=5), strict=True):
        assert answer(store, found) == full_ranking(query, store, metric)[:5]


@pytest.mark.parametrize("exponent", [-90, -60, 60, 90])
def test_cosine_does_not_depend_on_the_scale(exponent):
    features = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    store, scaled = store_of(features), store_of(np.ldexp(features, exponent))
    expected = Neighbours(store, Metric.COSINE).search(features[:5], k=7)
    found = Neighbours(scaled, Metric.COSINE).search(np.ldexp(features[:5], exponent), k=7)
    for (rows, scores), (scaled_rows, scaled_scores) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(rows, scaled_rows)
        np.testing.assert_allclose(scores, scaled_scores, rtol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("duplicates", [2, MARGIN + 1, 10 * MARGIN])
def test_duplicates_come_in_the_order_of_their_ids(metric, duplicates):
    rng = np.random.default_rng(0)
    other = rng.normal(size=(50, 8))
    features = np.concatenate([other, np.repeat(rng.normal(size=(1, 8)), duplicates, axis=0)]).astype(np.float32)
    ids = [f"other {row}" for row in range(50)] + [f"same {row}" for row in rng.permutation(duplicates)]
    store = store_of(features, ids)
    ((rows, scores),) = Neighbours(store, metric).search(features[-1:], k=5)
    same = sorted(name for name in ids if name.startswith("same"))
    assert store.ids[rows].tolist()[: min(5, duplicates)] == same[:5]
    best = 0.0 if metric is Metric.L2 else 1.0
    np.testing.assert_allclose(scores[: min(5, duplicates)], best, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_one_exemplar_and_more_wanted_than_there_are(metric):
    store = store_of(np.array([[1.0, 2.0]]))
    ((rows, scores),) = Neighbours(store, metric).search(np.array([[2.0, 4.0]], np.float32), k=10)
    assert rows.tolist() == [0]
    np.testing.assert_allclose(scores, -np.sqrt(5) if metric is Metric.L2 else 1.0)


def test_zero_vectors_are_similar_to_nothing_and_a_zero_query_orders_by_id():
    store = store_of(np.array([[0, 0], [1, 0], [-1, 0], [0, 0]]), ids=["d", "c", "b", "a"])
    with np.errstate(all="raise"):
        searcher = Neighbours(store, Metric.COSINE)
        ((rows, scores),) = searcher.search(np.array([[2, 0]], np.float32), k=4)
        assert store.ids[rows].tolist() == ["c", "a", "d", "b"]
        assert scores.tolist() == [1.0, 0.0, 0.0, -1.0]
        ((rows, scores),) = searcher.search(np.zeros((1, 2), np.float32), k=3)
    assert store.ids[rows].tolist() == ["a", "b", "c"]
    assert scores.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("metric", METRICS)
def test_no_queries_no_answers(metric):
    assert Neighbours(store_of(np.eye(3)), metric).search(np.zeros((0, 3), np.float32), k=2) == []


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF4,Flat"])
def test_inputs_are_not_modified(metric, factory):
    features = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    store, queries = store_of(features.copy()), features[:3].copy()
    Neighbours(store, metric, factory=factory).search(queries, k=4)
    np.testing.assert_array_equal(store.features(np.arange(200)), features)
    np.testing.assert_array_equal(queries, features[:3])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e25])
def test_features_whose_squares_leave_float32_keep_their_order(metric, scale):
    rng = np.random.default_rng(3)
    features, queries = rng.normal(size=(200, 8)), rng.normal(size=(4, 8))
    plain = Neighbours(store_of(features.astype(np.float32)), metric).search(queries.astype(np.float32), k=5)
    scaled = Neighbours(store_of((features * scale).astype(np.float32)), metric)
    for (rows, _), (expected, _) in zip(scaled.search((queries * scale).astype(np.float32), k=5), plain, strict=True):
        np.testing.assert_array_equal(rows, expected)


# ---- approximate search


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("factory", "recall"), [("HNSW32", 0.95), ("HNSW32,Flat", 0.95), ("IVF16,Flat", 0.5), ("SQ8", 0.9)]
)
def test_approximate_indexes_find_most_neighbours_and_score_them_exactly(metric, factory, recall):
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(16, 24))
    features = (centres[rng.integers(0, 16, 2000)] + rng.normal(size=(2000, 24))).astype(np.float32)
    store, queries = store_of(features), features[:50] + np.float32(0.01)
    exact = Neighbours(store, metric).search(queries, k=10)
    found = Neighbours(store, metric, factory=factory).search(queries, k=10)
    hits = [len(set(a.tolist()) & set(b.tolist())) for (a, _), (b, _) in zip(exact, found, strict=True)]
    assert np.mean(hits) / 10 >= recall
    for query, (rows, scores) in zip(queries, found, strict=True):
        assert len(set(rows.tolist())) == len(rows) <= 10
        np.testing.assert_array_equal(scores, exact_scores(query, features[rows], metric))
        assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("metric", list(Metric))
def test_where_an_approximate_index_looks_into_too_few_clusters_the_search_is_exact(metric: Metric):
    features = np.random.default_rng(5).normal(size=(800, 4)).astype(np.float32)
    store = store_of(features)
    few = Neighbours(store, metric, factory="IVF16,Flat", effort=Effort(nprobe=1))
    [(rows, scores)] = few.search(features[:1], k=300)  # a cluster has some 50
    [(expected, exact)] = Neighbours(store, metric).search(features[:1], k=300)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, exact)


# FAISS aborts, divides by zero or loops for these.
DEADLY = ("HNSW0", "HNSW1", "IVF0,Flat", "PQ0", "NSG1", "LSH0", "IVF4_HNSW0,Flat", "RCQ2x0", "IMI2x0,Flat")


@pytest.mark.parametrize("factory", ["", "Flat ", "flat", "HNSW32x", "BFlat", "IVF16", "PQ7", "é", "x" * 1000, *DEADLY])
def test_a_factory_string_that_faiss_does_not_know(factory):
    with pytest.raises(InputError, match=r"for features of 24 dimensions.*'Flat'"):
        make_faiss_index(24, Metric.L2, factory)


@pytest.mark.parametrize("factory", ["IVF100,Flat", "PQ4"])
def test_a_factory_string_that_these_exemplars_cannot_serve(factory):
    store = store_of(np.random.default_rng(0).normal(size=(20, 8)))
    with pytest.raises(InputError, match=f"FAISS cannot use '{factory}' for 20 exemplars.*'Flat'"):
        Neighbours(store, Metric.L2, factory=factory)


def test_cosine_is_an_inner_product_of_normalised_features():
    assert make_faiss_index(4, Metric.COSINE, "Flat").metric_type == faiss.METRIC_INNER_PRODUCT
    assert make_faiss_index(4, Metric.L2, "Flat").metric_type == faiss.METRIC_L2


# ---- ranking


@settings(max_examples=200)
@given(
    scores=hnp.arrays(
        np.float64, st.integers(1, 40), elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-300])
    ),
    k=st.integers(1, 45),
    data=st.data(),
)
def test_best_first_is_a_full_sort_cut_off(scores, k, data):
    n = len(scores)
    ids = np.array(data.draw(st.lists(st.text(max_size=3), min_size=n, max_size=n, unique=True)), dtype=object)
    rows = np.array(data.draw(st.permutations(range(n))))
    expected = sorted(range(n), key=lambda position: (-scores[position], ids[rows[position]]))
    assert best_first(scores, rows, ids, k=k).tolist() == expected[:k]


def test_best_first_refuses_nan():
    with pytest.raises(AssertionError, match="numbers"):
        best_first(np.array([0.0, np.nan]), np.arange(2), np.array(["a", "b"], dtype=object), k=1)
