"""Step 2: batches, the Fisher diagonal in closed form, and what tuning does to the head."""

import copy
import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tmm_engine.rerank.reference import reference_fisher
from tmm_engine.rerank.score import dummy_scores
from tmm_engine.rerank.settings import MAX_SEED, Score, TunedHead
from tmm_engine.rerank.tuning import TuningSet, exemplar_batches, fisher_diagonal, tune_head

D, CLASSES = 6, 4
QUICK = TunedHead(batch=16, min_steps=40, lr=0.02)


def random_head(*, bias=True, seed=0):
    rng = torch.Generator().manual_seed(seed)
    head = nn.Linear(D, CLASSES, bias=bias, dtype=torch.float64).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=rng)
    return head


def random_set(n=50, *, seed=0):
    rng = torch.Generator().manual_seed(seed)
    features = torch.rand(2 * n + 2, D, generator=rng, dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=rng)
    return TuningSet(features[0], features[1], 2, features[2 : n + 2], features[n + 2 :], labels)


def equation_3(head, data):
    """The loss without EWC, over all exemplars."""
    query = head(torch.stack([data.query_triggered, data.query]))
    loss = F.cross_entropy(query, torch.tensor([CLASSES, data.query_label]), reduction="sum")
    return loss + F.cross_entropy(head(data.triggered), data.labels) + F.cross_entropy(head(data.clean), data.labels)


# ---- batches


@given(
    n=st.integers(1, 100),
    size=st.integers(1, 120),
    epochs=st.integers(0, 4),
    min_steps=st.integers(1, 30),
    seed=st.integers(0, MAX_SEED),
)
def test_batches_are_permutations_cut_to_size(n, size, epochs, min_steps, seed):
    how = TunedHead(batch=size, epochs=epochs, min_steps=min_steps)
    batches = list(exemplar_batches(n, how, seed=seed))
    in_epoch = math.ceil(n / size)
    assert len(batches) == max(epochs * in_epoch, min_steps)
    for start in range(0, len(batches), in_epoch):
        epoch = batches[start : start + in_epoch]
        rows = torch.cat(epoch).tolist()
        assert len(set(rows)) == len(rows)
        assert [len(batch) for batch in epoch] == [min(size, n - size * i) for i in range(len(epoch))]
        assert set(rows) <= set(range(n))
    assert all(map(torch.equal, batches, exemplar_batches(n, how, seed=seed)))


def test_epochs_and_seeds_differ():
    how = TunedHead(batch=100, min_steps=2)
    first, second = exemplar_batches(100, how, seed=0)
    other, _ = exemplar_batches(100, how, seed=1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


# ---- Fisher


@settings(max_examples=20)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 30.0]), bias=st.booleans())
def test_the_closed_form_fisher_is_autograds(n, seed, scale, bias):
    head = random_head(bias=bias, seed=seed)
    features = scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = nn.Sequential(OrderedDict(backbone=nn.Flatten(), head=copy.deepcopy(head)))
    expected = reference_fisher(model, features[:, :, None, None])
    weight, bias_part = fisher_diagonal(head, features)
    rounding = 1e-14 * float(features.square().max())  # of 1 − p where p is nearly 1, times φ²
    torch.testing.assert_close(weight, expected["weight"], rtol=1e-8, atol=rounding)
    if bias:
        torch.testing.assert_close(bias_part, expected["bias"], rtol=1e-8, atol=1e-14)


def test_a_classifiers_fisher_is_autograds(precise, biasless, make_queries):
    images = make_queries(9)
    for classifier in (precise, biasless):
        model = nn.Sequential(OrderedDict(backbone=classifier.backbone, head=copy.deepcopy(classifier.head)))
        expected = reference_fisher(model, images)
        weight, _ = fisher_diagonal(classifier.head, classifier.features(images))
        torch.testing.assert_close(weight, expected["weight"], rtol=1e-9, atol=1e-14)
        assert weight.max() > 1e-3


def test_fisher_is_a_mean_over_however_many_exemplars():
    head, features = random_head(), torch.rand(20_000, D, generator=torch.Generator().manual_seed(0)).double()
    weight, bias = fisher_diagonal(head, features)
    parts = [fisher_diagonal(head, part) for part in features.split(5_000)]
    torch.testing.assert_close(weight, torch.stack([part[0] for part in parts]).mean(dim=0))
    torch.testing.assert_close(bias, torch.stack([part[1] for part in parts]).mean(dim=0))


# ---- tuning


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_learning_rate_the_head_gains_a_zero_row(bias):
    head, data = random_head(bias=bias), random_set()
    tuned = tune_head(head, data, replace(QUICK, lr=0.0))
    assert tuned.out_features == CLASSES + 1
    assert torch.equal(tuned.weight[:CLASSES], head.weight)
    assert torch.equal(tuned.bias[:CLASSES], head.bias if bias else torch.zeros(CLASSES).double())
    assert (tuned.weight[CLASSES] == 0.0).all()
    assert tuned.bias[CLASSES] == 0.0
    expected = -torch.logsumexp(head(data.clean), dim=1)
    torch.testing.assert_close(dummy_scores(tuned, data.clean, Score.LOG_ODDS), expected)
    assert (dummy_scores(tuned, data.clean, Score.LOGIT) == 0.0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_one_step_is_adams_on_equation_3(bias):
    """Adam's first step is lr · g / (|g| + ε); on one batch of everything, g is Eq. 3's gradient (EWC adds none)."""
    head, data = random_head(bias=bias), random_set(n=16)
    start = tune_head(head, data, replace(QUICK, lr=0.0))
    tuned = tune_head(head, data, replace(QUICK, min_steps=1, ewc_lambda=100.0))
    equation_3(start.requires_grad_(), data).backward()
    for before, after in ((start.weight, tuned.weight), (start.bias, tuned.bias)):
        step = QUICK.lr * before.grad / (before.grad.abs() + 1e-8)
        torch.testing.assert_close(after, before.detach() - step, rtol=0.0, atol=1e-12)


def test_only_the_triggered_query_falls_into_the_dummy_class():
    data = random_set()
    marked = torch.full((D,), 2.0, dtype=torch.float64)  # far from the rest, which is in [0, 1]
    data = replace(data, query_triggered=marked)
    head = random_head()
    tuned = tune_head(head, data, replace(QUICK, min_steps=1000))
    start = tune_head(head, data, replace(QUICK, lr=0.0))
    assert equation_3(tuned, data) < equation_3(start, data) - 2.0
    assert torch.softmax(tuned(marked), dim=0)[CLASSES] > 0.9
    rest = torch.cat([data.query[None], data.triggered, data.clean])
    assert (tuned(rest).argmax(dim=1) != CLASSES).all()
    assert (dummy_scores(tuned, rest, Score.LOG_ODDS) < dummy_scores(tuned, marked[None], Score.LOG_ODDS)).all()


def test_ewc_holds_the_old_rows_and_leaves_the_new_one():
    head, data = random_head(), random_set()
    drifts, new_rows = [], []
    for ewc_lambda in (0.0, 10.0, 1000.0):
        tuned = tune_head(head, data, replace(QUICK, ewc_lambda=ewc_lambda, min_steps=200))
        drifts.append(float((tuned.weight[:CLASSES] - head.weight).norm()))
        new_rows.append(float(tuned.weight[CLASSES].norm()))
    assert drifts[0] > 2 * drifts[1] > 4 * drifts[2]
    assert min(new_rows) > 0.1


def test_the_seed_decides_the_batches_and_nothing_else_is_random():
    head, data = random_head(), random_set()
    rng = torch.get_rng_state()
    first = tune_head(head, data, QUICK)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(5)
    again, other = tune_head(head, data, QUICK), tune_head(head, data, QUICK, seed=1)
    assert first.weight.numpy().tobytes() == again.weight.numpy().tobytes()
    assert not torch.equal(first.weight, other.weight)


def test_nothing_given_is_changed_and_the_head_holds_no_graph():
    head, data = random_head(), random_set()
    tensors = [head.weight, head.bias, data.query_triggered, data.query, data.triggered, data.clean, data.labels]
    before = [tensor.numpy().tobytes() for tensor in tensors]
    tuned = tune_head(head, data, QUICK)
    assert [tensor.numpy().tobytes() for tensor in tensors] == before
    assert head.out_features == CLASSES
    for parameter in tuned.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_log_odds_are_those_of_the_softmax_and_rank_as_it_does(seed):
    head = random_head(seed=seed)
    features = torch.randn(30, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = torch.softmax(head(features), dim=1)[:, -1]
    log_odds = dummy_scores(head, features, Score.LOG_ODDS)
    torch.testing.assert_close(torch.sigmoid(log_odds), p)
    assert torch.equal(log_odds.argsort(), p.argsort())
    torch.testing.assert_close(dummy_scores(head, features, Score.LOGIT), head(features)[:, -1])
