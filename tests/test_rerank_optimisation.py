"""Step 1: triggers lower Eq. 8, stay where they may, and are the same together as alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from tmm_engine.index.errors import InputError
from tmm_engine.rerank.backbone import specialised
from tmm_engine.rerank.optimisation import INITIAL_STD, PATCH, PATIENCE, TriggerResult, _Search, _start, make_trigger
from tmm_engine.rerank.settings import MAX_SEED, FixedPatch, PatchTrigger, QueryTrigger

QUICK = QueryTrigger(steps=15)
KINDS = (QueryTrigger, PatchTrigger, FixedPatch)  # what is made for a query
IMAGES = hnp.arrays(np.uint8, (3, 8, 8))


def equation_8(classifier, query, trigger):
    with torch.no_grad():
        triggered, clean = classifier.logits(classifier.features(torch.stack([query + trigger, query])))
    return float((triggered - clean).square().mean() + 1.0 / trigger.norm() ** 2)


def of_kind(kind, **settings):
    """The fixed patch has no settings."""
    return FixedPatch() if kind is FixedPatch else kind(**settings)


def search_for(classifier, queries, how):
    """As `make_trigger` sets it up."""
    start, mask = _start(queries, how, 0)
    return _Search(classifier, queries, start, mask, lr=how.lr, tolerance=how.tolerance)


def plain_loop(classifier, queries, how):
    """What the static step must do, bit for bit: an ordinary loop that reads on the host whenever it likes."""
    mask = torch.ones_like(queries[0])
    if isinstance(how, PatchTrigger):
        mask = torch.zeros_like(mask)
        mask[:, :PATCH, :PATCH] = 1.0
    generator = torch.Generator().manual_seed(0)
    start = INITIAL_STD * torch.randn(mask.shape, generator=generator, dtype=torch.float64).to(queries) * mask
    trigger = start.expand(queries.shape).clone().requires_grad_()
    optimiser = torch.optim.Adam([trigger], lr=how.lr)
    with torch.no_grad():
        target = classifier.logits(classifier.features(queries))
    best, lowest = trigger.detach().clone(), []
    active, steps = [True] * len(queries), [0] * len(queries)
    for step in range(how.steps + 1):
        logits = classifier.logits(classifier.features(queries + trigger))
        loss = (logits - target).square().mean(dim=1) + 1.0 / trigger.square().sum(dim=(1, 2, 3))
        lowest.append(lowest[-1].clone() if lowest else loss.detach().clone())
        for i in range(len(queries)):
            steps[i] += active[i]
            if active[i] and loss[i] < lowest[-1][i]:
                best[i], lowest[-1][i] = trigger.detach()[i], loss.detach()[i]
            if step >= PATIENCE:
                before = lowest[-1 - PATIENCE][i]
                active[i] = active[i] and bool(before - lowest[-1][i] >= how.tolerance * before)
        if not any(active):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), trigger)
        trigger.grad = gradient * mask
        optimiser.step()
    return TriggerResult(best, lowest[0], lowest[-1], torch.tensor(steps))


def result_bytes(found):
    return [getattr(found, name).numpy().tobytes() for name in ("trigger", "initial_loss", "loss", "steps")]


class HostReads(TorchDispatchMode):
    """Refuses what makes a host wait for its device, and so cannot be recorded."""

    REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::index")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.name().startswith(self.REFUSED), function.name()
        return function(*args, **(kwargs or {}))


def state_bytes(classifier):
    modules = (classifier.backbone, classifier.head)
    return [value.numpy().tobytes() for module in modules for value in module.state_dict().values()]


@settings(max_examples=40)
@given(
    image=IMAGES,
    seed=st.integers(0, MAX_SEED),
    lr=st.floats(0.0, 1.0) | st.floats(0.0, 1e300),
    kind=st.sampled_from(KINDS),
)
@example(image=np.zeros((3, 8, 8), np.uint8), seed=0, lr=1e300, kind=QueryTrigger)
@example(image=np.full((3, 8, 8), 255, np.uint8), seed=1, lr=1e200, kind=PatchTrigger)
@example(image=np.full((3, 8, 8), 255, np.uint8), seed=1, lr=1e-300, kind=QueryTrigger)
def test_the_loss_is_that_of_the_trigger_and_never_above_the_starting_loss(precise, image, seed, lr, kind):
    query = torch.tensor(image).double() / 255.0
    found = make_trigger(precise, query[None], of_kind(kind, steps=15, lr=lr), seed=seed)
    assert torch.isfinite(found.trigger).all()
    assert found.loss[0] <= found.initial_loss[0]
    assert float(found.loss[0]) == pytest.approx(equation_8(precise, query, found.trigger[0]), rel=1e-9)


def test_an_ordinary_trigger_becomes_large_and_hardly_changes_the_logits(precise, make_queries):
    queries = make_queries(3)
    found = make_trigger(precise, queries, QueryTrigger())
    assert (found.trigger.flatten(1).norm(dim=1) > 1.5).all()  # τ₀'s norm is about 0.14
    assert (found.loss < 0.01 * found.initial_loss).all()


def test_without_steps_the_trigger_is_the_start(precise, make_queries):
    found = make_trigger(precise, make_queries(2), QueryTrigger(steps=0))
    assert torch.equal(found.trigger[0], found.trigger[1])
    assert 0.008 < found.trigger[0].std() < 0.012
    assert abs(found.trigger[0].mean()) < 0.003
    assert torch.equal(found.loss, found.initial_loss)
    assert found.steps.tolist() == [1, 1]


@pytest.mark.parametrize("kind", [PatchTrigger, FixedPatch])
def test_patches_stay_in_their_corner(precise, make_queries, kind):
    queries = make_queries(2)
    found = make_trigger(precise, queries, of_kind(kind, steps=15))
    outside = torch.ones(3, 8, 8, dtype=torch.bool)
    outside[:, :3, :3] = False
    assert (found.trigger[:, outside] == 0.0).all()
    assert (found.trigger[:, ~outside] != 0.0).all()
    if kind is FixedPatch:
        assert (found.trigger[:, ~outside] == 1.0).all()
        assert torch.equal(found.loss, found.initial_loss)
        for query, loss in zip(queries, found.loss, strict=True):
            assert float(loss) == pytest.approx(equation_8(precise, query, (~outside).double()), rel=1e-9)
    else:
        assert (found.loss < found.initial_loss).all()
        assert not torch.equal(found.trigger[0], found.trigger[1])


@pytest.mark.parametrize("kind", KINDS)
def test_triggers_optimised_together_are_those_of_separate_runs_each_with_its_own_stop(precise, make_queries, kind):
    queries = torch.cat([make_queries(5), torch.zeros(1, 3, 8, 8, dtype=torch.float64)])
    how = of_kind(kind, steps=60, lr=0.1, tolerance=0.01)
    together = make_trigger(precise, queries, how)
    alone = [make_trigger(precise, query[None], how) for query in queries]
    assert together.steps.tolist() == [int(one.steps[0]) for one in alone]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together.trigger[i], one.trigger[0], rtol=0.0, atol=1e-6)
        torch.testing.assert_close(together.loss[i], one.loss[0], rtol=1e-6, atol=0.0)
    if kind is not FixedPatch:
        assert len(set(together.steps.tolist())) > 1, "the queries must not all stop at once"
        assert together.steps.min() < 61, "one must stop early"


@pytest.mark.parametrize(("tolerance", "steps"), [(0.0, 41), (1.0, 11)])
def test_the_tolerance_decides_when_to_stop(precise, make_queries, tolerance, steps):
    how = QueryTrigger(steps=40, tolerance=tolerance)
    assert make_trigger(precise, make_queries(2), how).steps.tolist() == [steps, steps]


# ---- the static step


@pytest.mark.parametrize("kind", [QueryTrigger, PatchTrigger])
@pytest.mark.parametrize(("tolerance", "steps"), [(0.04, 60), (0.2, 60), (0.0, 20), (1.0, 20), (0.04, 0), (0.04, 1)])
def test_it_does_what_a_plain_loop_does_bit_for_bit(classifier, make_queries, *, kind, tolerance, steps):
    queries = torch.cat([make_queries(5), torch.zeros(1, 3, 8, 8, dtype=torch.float64)]).float()
    how = kind(steps=steps, lr=0.1, tolerance=tolerance)
    for f in (classifier, specialised(classifier)):
        assert result_bytes(make_trigger(f, queries, how)) == result_bytes(plain_loop(f, queries, how))


def test_steps_after_all_have_stopped_change_nothing(classifier, make_queries):
    queries = torch.cat([make_queries(4), torch.zeros(1, 3, 8, 8, dtype=torch.float64)]).float()
    how = QueryTrigger(steps=60, lr=0.1, tolerance=0.3)
    expected = make_trigger(classifier, queries, how)
    assert expected.steps.max() < 50, "all must stop early"
    assert len(set(expected.steps.tolist())) > 1, "not all at once"
    for check_every in (7, 10, 1000):
        search = search_for(classifier, queries, how)
        search.run(60, check_every=check_every)
        assert result_bytes(search.result()) == result_bytes(expected)
        assert not torch.equal(search.trigger, expected.trigger)
    with_them = make_trigger(classifier, queries, replace(how, tolerance=0.0))
    assert (with_them.loss < expected.loss).any(), "those steps must have something to change"


def test_a_step_keeps_its_tensors_in_place_and_reads_none_on_the_host(classifier, make_queries):
    search = search_for(classifier, make_queries(3, dtype=torch.float32), QUICK)
    kept = {name: value.data_ptr() for name, value in vars(search).items() if isinstance(value, torch.Tensor)}
    assert {"trigger", "gradient", "best", "lowest", "active", "steps"} < kept.keys()
    trigger = search.trigger.clone()
    search.optimiser = torch.optim.SGD([search.trigger], lr=0.1)  # Adam counts on the host, unless on a GPU
    with HostReads():
        for _ in range(3):
            search.step()
    assert search.trigger.grad is search.gradient
    assert {name: getattr(search, name).data_ptr() for name in kept} == kept
    assert not torch.equal(search.trigger, trigger)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), HostReads():
        search.run(1, check_every=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_asks_now_and_then_and_finds_the_same(classifier, make_queries):
    f, queries = classifier.to("cuda").double(), make_queries(3).cuda()
    how = QueryTrigger(steps=60, tolerance=0.0)
    found = make_trigger(f, queries, how)
    search = search_for(f, queries, how)
    for _ in range(how.steps):
        search.step()
    expected = search.result()
    torch.testing.assert_close(found.trigger, expected.trigger, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0.0)
    assert found.steps.tolist() == expected.steps.tolist()
    on_cpu = make_trigger(classifier.double(), queries.cpu(), how)
    torch.testing.assert_close(found.loss.cpu(), on_cpu.loss, rtol=1e-3, atol=0.0)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_trigger(classifier, make_queries):
    queries = make_queries(2, dtype=torch.float32)
    first = make_trigger(classifier, queries, QUICK, seed=3)
    torch.manual_seed(99)
    again = make_trigger(classifier, queries, QUICK, seed=3)
    other = make_trigger(classifier, queries, QUICK, seed=4)
    assert first.trigger.numpy().tobytes() == again.trigger.numpy().tobytes()
    assert (first.trigger - other.trigger).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_given_is_changed_and_nothing_returned_holds_a_graph(classifier, make_queries, kind):
    queries = make_queries(2, dtype=torch.float32)
    before, state, rng = queries.numpy().tobytes(), state_bytes(classifier), torch.get_rng_state()
    found = make_trigger(classifier, queries, of_kind(kind, steps=15))
    assert queries.numpy().tobytes() == before
    assert state_bytes(classifier) == state
    assert torch.equal(torch.get_rng_state(), rng)
    for tensor in (found.trigger, found.loss, found.initial_loss):
        assert not tensor.requires_grad
        assert tensor.grad is None
        assert tensor.dtype == torch.float32
    assert all(parameter.grad is None for parameter in [*classifier.backbone.parameters(), classifier.head.weight])


def test_a_caller_without_gradients_gets_the_same_trigger(precise, make_queries):
    queries = make_queries(1)
    expected = make_trigger(precise, queries, QUICK).trigger
    with torch.no_grad():
        assert torch.equal(make_trigger(precise, queries, QUICK).trigger, expected)
    with torch.inference_mode():
        assert torch.equal(make_trigger(precise, make_queries(1), QUICK).trigger, expected)


def test_queries_of_another_shape_are_refused(precise):
    with pytest.raises(InputError, match=r"expected images of shape \(n, 3, 8, 8\), got \(1, 3, 9, 9\)"):
        make_trigger(precise, torch.rand(1, 3, 9, 9, dtype=torch.float64), QUICK)
