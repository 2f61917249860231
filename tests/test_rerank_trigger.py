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
from tmm_engine.rerank import Blend, TmmConfig, Trigger
from tmm_engine.rerank.backbone import specialised
from tmm_engine.rerank.cuda_graphs import WARM_UP
from tmm_engine.rerank.settings import MAX_SEED
from tmm_engine.rerank.trigger import (
    INITIAL_STD,
    PATCH,
    PATIENCE,
    TriggerResult,
    _Search,
    apply_trigger,
    intensity_of,
    make_trigger,
)

QUICK = TmmConfig(trigger_steps=15)
KINDS = (Trigger.QUERY, Trigger.PATCH, Trigger.FIXED_PATCH)  # what is made for a query
IMAGES = hnp.arrays(np.uint8, (3, 8, 8))


def equation_8(classifier, query, trigger):
    with torch.no_grad():
        triggered, clean = classifier.logits(classifier.features(torch.stack([query + trigger, query])))
    return float((triggered - clean).square().mean() + 1.0 / trigger.norm() ** 2)


def plain_loop(classifier, queries, config):
    """What the static step must do, bit for bit: an ordinary loop that reads on the host whenever it likes."""
    mask = torch.ones_like(queries[0])
    if config.trigger is Trigger.PATCH:
        mask = torch.zeros_like(mask)
        mask[:, :PATCH, :PATCH] = 1.0
    generator = torch.Generator().manual_seed(config.seed)
    start = INITIAL_STD * torch.randn(mask.shape, generator=generator, dtype=torch.float64).to(queries) * mask
    trigger = start.expand(queries.shape).clone().requires_grad_()
    optimiser = torch.optim.Adam([trigger], lr=config.trigger_lr)
    with torch.no_grad():
        target = classifier.logits(classifier.features(queries))
    best, lowest = trigger.detach().clone(), []
    active, steps = [True] * len(queries), [0] * len(queries)
    for step in range(config.trigger_steps + 1):
        logits = classifier.logits(classifier.features(queries + trigger))
        loss = (logits - target).square().mean(dim=1) + 1.0 / trigger.square().sum(dim=(1, 2, 3))
        lowest.append(lowest[-1].clone() if lowest else loss.detach().clone())
        for i in range(len(queries)):
            steps[i] += active[i]
            if active[i] and loss[i] < lowest[-1][i]:
                best[i], lowest[-1][i] = trigger.detach()[i], loss.detach()[i]
            if step >= PATIENCE:
                before = lowest[-1 - PATIENCE][i]
                active[i] = active[i] and bool(before - lowest[-1][i] >= config.trigger_tolerance * before)
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


@settings(max_examples=40, deadline=None)
@given(
    image=IMAGES,
    seed=st.integers(0, MAX_SEED),
    lr=st.floats(0.0, 1.0) | st.floats(0.0, 1e300),
    kind=st.sampled_from(KINDS),
)
@example(image=np.zeros((3, 8, 8), np.uint8), seed=0, lr=1e300, kind=Trigger.QUERY)
@example(image=np.full((3, 8, 8), 255, np.uint8), seed=1, lr=1e200, kind=Trigger.PATCH)
@example(image=np.full((3, 8, 8), 255, np.uint8), seed=1, lr=1e-300, kind=Trigger.QUERY)
def test_the_loss_is_that_of_the_trigger_and_never_above_the_starting_loss(precise, image, seed, lr, kind):
    query = torch.tensor(image).double() / 255.0
    found = make_trigger(precise, query[None], replace(QUICK, trigger=kind, trigger_lr=lr, seed=seed))
    assert torch.isfinite(found.trigger).all()
    assert found.loss[0] <= found.initial_loss[0]
    assert float(found.loss[0]) == pytest.approx(equation_8(precise, query, found.trigger[0]), rel=1e-9)


def test_an_ordinary_trigger_becomes_large_and_hardly_changes_the_logits(precise, make_queries):
    queries = make_queries(3)
    found = make_trigger(precise, queries, TmmConfig())
    assert (found.trigger.flatten(1).norm(dim=1) > 1.5).all()  # τ₀'s norm is about 0.14
    assert (found.loss < 0.01 * found.initial_loss).all()


def test_without_steps_the_trigger_is_the_start(precise, make_queries):
    found = make_trigger(precise, make_queries(2), replace(QUICK, trigger_steps=0))
    assert torch.equal(found.trigger[0], found.trigger[1])
    assert 0.008 < found.trigger[0].std() < 0.012
    assert abs(found.trigger[0].mean()) < 0.003
    assert torch.equal(found.loss, found.initial_loss)
    assert found.steps.tolist() == [1, 1]


@pytest.mark.parametrize("kind", [Trigger.PATCH, Trigger.FIXED_PATCH])
def test_patches_stay_in_their_corner(precise, make_queries, kind):
    queries = make_queries(2)
    found = make_trigger(precise, queries, replace(QUICK, trigger=kind))
    outside = torch.ones(3, 8, 8, dtype=torch.bool)
    outside[:, :3, :3] = False
    assert (found.trigger[:, outside] == 0.0).all()
    assert (found.trigger[:, ~outside] != 0.0).all()
    if kind is Trigger.FIXED_PATCH:
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
    config = TmmConfig(trigger=kind, trigger_steps=60, trigger_lr=0.1, trigger_tolerance=0.01)
    together = make_trigger(precise, queries, config)
    alone = [make_trigger(precise, query[None], config) for query in queries]
    assert together.steps.tolist() == [int(one.steps[0]) for one in alone]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together.trigger[i], one.trigger[0], rtol=0.0, atol=1e-6)
        torch.testing.assert_close(together.loss[i], one.loss[0], rtol=1e-6, atol=0.0)
    if kind is not Trigger.FIXED_PATCH:
        assert len(set(together.steps.tolist())) > 1, "the queries must not all stop at once"
        assert together.steps.min() < 61, "one must stop early"


@pytest.mark.parametrize(("tolerance", "steps"), [(0.0, 41), (1.0, 11)])
def test_the_tolerance_decides_when_to_stop(precise, make_queries, tolerance, steps):
    config = TmmConfig(trigger_steps=40, trigger_tolerance=tolerance)
    assert make_trigger(precise, make_queries(2), config).steps.tolist() == [steps, steps]


# ---- the static step


@pytest.mark.parametrize("kind", [Trigger.QUERY, Trigger.PATCH])
@pytest.mark.parametrize(("tolerance", "steps"), [(0.04, 60), (0.2, 60), (0.0, 20), (1.0, 20), (0.04, 0), (0.04, 1)])
def test_it_does_what_a_plain_loop_does_bit_for_bit(classifier, make_queries, *, kind, tolerance, steps):
    queries = torch.cat([make_queries(5), torch.zeros(1, 3, 8, 8, dtype=torch.float64)]).float()
    config = TmmConfig(trigger=kind, trigger_steps=steps, trigger_lr=0.1, trigger_tolerance=tolerance)
    for f in (classifier, specialised(classifier)):
        assert result_bytes(make_trigger(f, queries, config)) == result_bytes(plain_loop(f, queries, config))


def test_steps_after_all_have_stopped_change_nothing(classifier, make_queries):
    queries = torch.cat([make_queries(4), torch.zeros(1, 3, 8, 8, dtype=torch.float64)]).float()
    config = TmmConfig(trigger_steps=60, trigger_lr=0.1, trigger_tolerance=0.3)
    expected = make_trigger(classifier, queries, config)
    assert expected.steps.max() < 50, "all must stop early"
    assert len(set(expected.steps.tolist())) > 1, "not all at once"
    for check_every in (7, 10, 1000):
        search = _Search(classifier, queries, config)
        search.run(60, check_every=check_every)
        assert result_bytes(search.result()) == result_bytes(expected)
        assert not torch.equal(search.trigger, expected.trigger)
    with_them = make_trigger(classifier, queries, replace(config, trigger_tolerance=0.0))
    assert (with_them.loss < expected.loss).any(), "those steps must have something to change"


def test_a_step_keeps_its_tensors_in_place_and_reads_none_on_the_host(classifier, make_queries):
    search = _Search(classifier, make_queries(3, dtype=torch.float32), QUICK)
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
def test_a_gpu_replays_what_it_does_step_by_step(classifier, make_queries):
    f, queries = classifier.to("cuda").double(), make_queries(3).cuda()
    config = TmmConfig(trigger_steps=WARM_UP + 30, trigger_tolerance=0.0)
    found = make_trigger(f, queries, config)
    search = _Search(f, queries, config)
    for _ in range(config.trigger_steps):
        search.step()
    expected = search.result()
    torch.testing.assert_close(found.trigger, expected.trigger, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0.0)
    assert found.steps.tolist() == expected.steps.tolist()
    on_cpu = make_trigger(classifier.double(), queries.cpu(), config)
    torch.testing.assert_close(found.loss.cpu(), on_cpu.loss, rtol=1e-3, atol=0.0)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_trigger(classifier, make_queries):
    queries = make_queries(2, dtype=torch.float32)
    first = make_trigger(classifier, queries, replace(QUICK, seed=3))
    torch.manual_seed(99)
    again = make_trigger(classifier, queries, replace(QUICK, seed=3))
    other = make_trigger(classifier, queries, replace(QUICK, seed=4))
    assert first.trigger.numpy().tobytes() == again.trigger.numpy().tobytes()
    assert (first.trigger - other.trigger).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_given_is_changed_and_nothing_returned_holds_a_graph(classifier, make_queries, kind):
    queries = make_queries(2, dtype=torch.float32)
    before, state, rng = queries.numpy().tobytes(), state_bytes(classifier), torch.get_rng_state()
    found = make_trigger(classifier, queries, replace(QUICK, trigger=kind))
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


# ---- intensity and blend


@given(image=IMAGES)
def test_the_intensity_is_numpys_standard_deviation(image):
    pixels = image / 255.0
    assert intensity_of(torch.tensor(pixels), TmmConfig()) == pytest.approx(pixels.std(), rel=1e-12, abs=1e-15)
    single = torch.tensor(pixels).float()
    assert intensity_of(single, TmmConfig()) == pytest.approx(pixels.std(), rel=1e-6, abs=1e-7)
    assert intensity_of(single, TmmConfig(intensity=0.3)) == 0.3


@settings(max_examples=50)
@given(
    images=hnp.arrays(np.float64, (2, 3, 4, 4), elements=st.floats(0.0, 1.0)),
    trigger=hnp.arrays(np.float64, (3, 4, 4), elements=st.floats(-3.0, 3.0)),
    omega=st.floats(0.0, 1.0),
)
def test_every_blend_is_its_formula(images, trigger, omega):
    formulas = {
        Blend.PRINTED: images * omega + trigger * (1 - omega),
        Blend.SWAPPED: images * (1 - omega) + trigger * omega,
        Blend.SCALED: images + omega * trigger,
        Blend.ADDED: images + trigger,
    }
    assert set(formulas) == set(Blend)
    x, tau = torch.tensor(images), torch.tensor(trigger)
    for blend, expected in formulas.items():
        free = apply_trigger(x, tau, intensity=omega, blend=blend, clamp=False)
        clamped = apply_trigger(x, tau, intensity=omega, blend=blend, clamp=True)
        np.testing.assert_allclose(free, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(clamped, expected.clip(0, 1), rtol=0, atol=1e-12)
        single = apply_trigger(x[1], tau, intensity=omega, blend=blend, clamp=True)
        assert torch.equal(single, clamped[1])
    np.testing.assert_array_equal(x, images)
    np.testing.assert_array_equal(tau, trigger)
