"""A specialised network is the same function, the original stays as it was, and a pass is blending, then φ."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.configs import changed
from tests.conftest import SHAPE
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank import TmmConfig, TmmNN
from tmm_engine.rerank.backbone import Backbone, Precision, SpecialisedClassifier, TorchBackbone, specialised
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.score import dummy_scores
from tmm_engine.rerank.settings import Blend, QueryTrigger, Score, TunedHead
from tmm_engine.rerank.tuning import TuningSet, tune_head

slow = pytest.mark.slow
ARCHITECTURES = [
    ("resnet18", (1, 28, 28), False),
    ("resnet18", (3, 32, 32), True),
    ("mobilenet_v3_small", (3, 32, 32), False),
    ("densenet121", (3, 32, 32), False),
    ("vit_tiny_32", (3, 32, 32), False),
    pytest.param("vgg11_bn", (3, 32, 32), False, marks=slow),  # 130 and 70 million weights, several times
    pytest.param("wide_resnet50_2", (3, 32, 32), False, marks=slow),
]


def give_a_past(model: nn.Module) -> None:
    """Batch norms as after training: fresh ones hardly do anything."""
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for tensor, low, high in (
            (norm.weight, 0.8, 1.2),
            (norm.bias, -0.1, 0.1),
            (norm.running_mean, -0.1, 0.1),
            (norm.running_var, 0.7, 1.3),
        ):
            if tensor is not None:
                tensor.data.uniform_(low, high, generator=generator)


def architecture(name: str, shape: tuple[int, int, int], *, small_stem: bool = False) -> Classifier:
    options = {} if name.startswith("vit") else {"small_stem": small_stem}
    classifier = Classifier.from_architecture(
        name, image_shape=shape, seed=0, num_classes=7, mean=[0.4] * shape[0], std=[0.3] * shape[0], **options
    )
    give_a_past(classifier.backbone)
    return classifier


def images_for(classifier: Classifier, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand((n, *classifier.image_shape), generator=generator, dtype=torch.float64).to(classifier.head.weight)


def largest_difference(one: Classifier, other: Classifier, images: Tensor | None = None) -> float:
    """Of features and logits, as a share of the largest."""
    images = images_for(one) if images is None else images
    with torch.no_grad():
        features, others = one.features(images), other.features(images)
        logits, other_logits = one.logits(features), other.logits(others)
    return max(
        float((features - others).abs().max() / features.abs().max()),
        float((logits - other_logits).abs().max() / logits.abs().max()),
    )


def network_of(classifier: Classifier) -> nn.Module:
    return classifier.backbone.get_submodule("network")


def everything_in(module: nn.Module) -> tuple[str, list[tuple[str, bytes, tuple[int, ...], bool]]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found = [(name, value.detach().numpy().tobytes(), value.stride(), value.requires_grad) for name, value in tensors]
    return repr(module), found


# ---- known architectures


@pytest.mark.parametrize(("name", "shape", "small_stem"), ARCHITECTURES)
def test_a_specialised_architecture_is_the_same_function_and_the_original_stays(name, shape, small_stem):
    classifier = architecture(name, shape, small_stem=small_stem)
    before = everything_in(classifier.backbone)
    fast = specialised(classifier)
    assert fast is not classifier
    assert everything_in(classifier.backbone) == before
    assert largest_difference(classifier, fast) < 1e-4
    assert not any(parameter.requires_grad for parameter in fast.backbone.parameters())
    assert not any(module.training for module in fast.backbone.modules())
    precise = classifier.double()
    assert largest_difference(precise, specialised(precise)) < 1e-10


def test_a_specialised_resnet_has_neither_batch_norms_nor_taps_that_meet_only_padding():
    network = specialised(architecture("resnet18", (1, 28, 28))).backbone.get_submodule("network")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    sizes = {name: module.kernel_size for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert sizes["layer1.0.conv1"] == (3, 3)  # on 7×7 maps
    assert sizes["layer4.0.conv1"] == (2, 2)  # from 2×2 to 1×1, stride 2: the first row and column meet padding
    assert sizes["layer4.1.conv2"] == (1, 1)  # on 1×1 maps


@pytest.mark.parametrize(("name", "shape"), [("resnet18", (1, 28, 28)), ("mobilenet_v3_small", (3, 32, 32))])
def test_gradients_of_the_image_are_the_same(name, shape):
    classifier = architecture(name, shape).double()
    gradients = []
    for f in (classifier, specialised(classifier)):
        images = images_for(classifier).requires_grad_()
        (gradient,) = torch.autograd.grad(f.logits(f.features(images)).square().sum(), images)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9 * float(gradients[0].abs().max()))


def test_a_classifier_specialised_in_inference_mode_has_gradients(classifier):
    with torch.inference_mode():
        fast = specialised(classifier)
    images = images_for(classifier).requires_grad_()
    (gradient,) = torch.autograd.grad(fast.features(images).sum(), images)
    assert gradient.abs().max() > 0.0


@pytest.mark.parametrize("follows", [True, False])
def test_what_is_specialised_is_not_specialised_again(follows):
    net = Net(plain if follows else by_keyword)
    fast = specialised(Classifier.from_module(net, image_shape=SHAPE))
    assert isinstance(fast, SpecialisedClassifier)
    assert specialised(fast) is fast


# ---- any convolution

SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=150)
@given(
    size=SIDES,
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_a_convolution_of_any_geometry_gives_the_same_with_no_larger_a_kernel(
    *, size, kernel, stride, padding, dilation, groups, bias
):
    outputs = [
        (size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    assume(min(outputs) >= 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias=bias)
        model = nn.Sequential(conv, nn.Flatten(), nn.Linear(8 * outputs[0] * outputs[1], 3))
    classifier = Classifier.from_module(model, image_shape=(4, *size)).double()
    fast = specialised(classifier)
    images = images_for(classifier)
    torch.testing.assert_close(fast.features(images), classifier.features(images), rtol=1e-12, atol=1e-12)
    cut = next(module for module in fast.backbone.modules() if isinstance(module, nn.Conv2d))
    assert all(now <= then for now, then in zip(cut.kernel_size, kernel, strict=True))
    assert tuple(cut.weight.shape[2:]) == cut.kernel_size
    centred = tuple(step * (side // 2) for step, side in zip(dilation, kernel, strict=True))
    if size == (1, 1) and padding == centred and kernel[0] % 2 == kernel[1] % 2 == 1:
        assert cut.kernel_size == (1, 1)


# ---- any network


class Net(nn.Module):
    """Two convolutions that keep the size, two batch norms with a past, a head; `body` is what φ does with them."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor], *, features: int = 6, **convolution: object) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 6, 3, **{"padding": 1, **convolution})
            self.second = nn.Conv2d(6, 6, 3, **{"padding": 1, **convolution})
            self.norm, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.head = nn.Linear(features, 4)
        self.body = body
        give_a_past(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self, images))


def plain(net: Net, x: Tensor) -> Tensor:
    return net.other(net.second(net.norm(net.first(x)).relu())).relu().mean((2, 3))


def twice_at_two_sizes(net: Net, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    return net.second(net.second(x).mean((2, 3), keepdim=True)).flatten(1)


def one_norm_for_two(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.second(net.norm(net.first(x)).relu())).mean((2, 3))


def one_convolution_with_two_norms(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    return (net.norm(net.second(x)).relu() + net.other(net.second(x)).relu()).mean((2, 3))


def used_beside_its_norm(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    return (x + net.norm(x)).relu().mean((2, 3))


def norm_first(net: Net, x: Tensor) -> Tensor:
    return net.second(net.norm(net.first(x).relu())).amax((2, 3))


def viewed(net: Net, x: Tensor) -> Tensor:
    x = net.norm(net.first(x)).relu()
    return x.view(x.size(0), -1)


def by_keyword(net: Net, x: Tensor) -> Tensor:
    return net.norm(input=net.first(input=x)).mean((2, 3))


def one_by_one(net: Net, x: Tensor) -> Tensor:
    return torch.stack([net.first(image).mean((1, 2)) for image in x])


def as_bright(net: Net, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    if x.mean() > 0.3:
        x = x.mean((2, 3), keepdim=True)
    return net.norm(net.second(x)).relu().mean((2, 3))


def as_bright_viewed(net: Net, x: Tensor) -> Tensor:
    x = as_bright(net, x)[:, :, None, None].expand(-1, -1, 3, 3)
    return net.second(x).view(len(x), -1)


@pytest.mark.parametrize(
    ("net", "follows"),
    [
        (Net(plain), True),
        (Net(plain, padding_mode="circular"), True),
        (Net(plain, padding_mode="reflect"), True),
        (Net(plain, padding="same"), True),
        (Net(plain, padding="valid"), True),
        (Net(plain, bias=False), True),
        (Net(twice_at_two_sizes), True),
        (Net(one_norm_for_two), True),
        (Net(one_convolution_with_two_norms), True),
        (Net(used_beside_its_norm), True),
        (Net(norm_first), True),
        (Net(viewed, features=6 * 64), True),
        (Net(by_keyword), False),
        (Net(one_by_one), False),
        (Net(as_bright), False),
        (Net(as_bright_viewed, features=54), False),
    ],
    ids=lambda value: value.body.__name__ if isinstance(value, Net) else "",
)
def test_any_network_stays_the_same_function(net, follows):
    classifier = Classifier.from_module(net, image_shape=SHAPE).double()
    fast = specialised(classifier)
    assert (network_of(fast) is not network_of(classifier)) == follows
    for images in (images_for(classifier, 4), images_for(classifier, 2) * 0.01, images_for(classifier, 1) + 2.0):
        assert largest_difference(classifier, fast, images) < 1e-10
    pixels = torch.arange(2 * 192, dtype=torch.uint8).view(2, *SHAPE)
    untriggered = {"image_weight": 1.0, "trigger_weight": 0.0, "clamp": False}
    passed = TorchBackbone(fast)(pixels, torch.zeros(SHAPE, dtype=torch.float64), **untriggered)
    torch.testing.assert_close(passed, classifier.features(pixels.double() / 255.0), rtol=1e-9, atol=1e-9)


def with_weight_norm() -> nn.Module:
    net = Net(plain)
    parametrizations.weight_norm(net.first)
    return net


def with_a_weight_of_five_axes() -> nn.Module:
    net = Net(plain)
    net.register_parameter("scale", nn.Parameter(torch.ones(1, 1, 1, 1, 1)))
    return net


@pytest.mark.parametrize("make", [with_weight_norm, with_a_weight_of_five_axes])
def test_what_cannot_be_rewritten_is_used_as_it_is(make):
    classifier = Classifier.from_module(make(), image_shape=SHAPE)
    before = everything_in(classifier.backbone)
    assert largest_difference(classifier, specialised(classifier)) < 1e-5
    assert everything_in(classifier.backbone) == before


# ---- the pass


@settings(max_examples=60)
@given(
    blend=st.sampled_from(Blend),
    clamp=st.booleans(),
    intensity=st.floats(0.0, 1.0),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
    n=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_a_pass_is_blending_then_features(classifier, precise, make_images, *, blend, clamp, intensity, scale, n, seed):
    images = torch.tensor(make_images(n, seed=seed))
    trigger = scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    image_weight, trigger_weight = blend.weights(intensity)
    given_bytes, trigger_bytes = images.numpy().tobytes(), trigger.numpy().tobytes()
    for dtype, f, tolerance in ((torch.float64, precise, 1e-10), (torch.float32, classifier, 1e-4)):
        backbone = TorchBackbone(specialised(f))
        found = backbone(
            images, trigger.to(dtype), image_weight=image_weight, trigger_weight=trigger_weight, clamp=clamp
        )
        x = apply_trigger(images.to(dtype) / 255.0, trigger.to(dtype), intensity=intensity, blend=blend, clamp=clamp)
        expected = f.features(x)
        assert found.dtype == dtype
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert images.numpy().tobytes() == given_bytes
    assert trigger.numpy().tobytes() == trigger_bytes


def test_bfloat16_is_near_and_says_that_it_is_not_exact():
    classifier = architecture("resnet18", (3, 32, 32))
    before = everything_in(classifier.backbone)
    exact, rough = (TorchBackbone(specialised(classifier), precision) for precision in Precision)
    assert isinstance(exact, Backbone)
    assert isinstance(rough, Backbone)
    assert (exact.exact, exact.name) == (True, "torch fp32 on cpu")
    assert (rough.exact, rough.name) == (False, "torch bf16 on cpu")
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    blend = {"image_weight": 0.3, "trigger_weight": 0.7, "clamp": True}
    trigger = torch.randn((3, 32, 32), generator=torch.Generator().manual_seed(1))
    fine, coarse = exact(images, trigger, **blend), rough(images, trigger, **blend)
    assert coarse.dtype == torch.float32
    errors = (coarse - fine).norm(dim=1) / fine.norm(dim=1)
    assert 1e-5 < float(errors.max()) < 0.03  # bfloat16 has 8 bits: 0.004 a step, over 20 layers
    assert everything_in(classifier.backbone) == before


def test_features_that_are_not_finite_do_not_count_as_the_same():
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 3))
    classifier = Classifier.from_module(model, image_shape=SHAPE)
    norm = next(module for module in classifier.backbone.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_var.fill_(np.nan)
    assert network_of(specialised(classifier)) is network_of(classifier)


# ---- a ranking from a pass in bfloat16

QUICK = TmmConfig(trigger=QueryTrigger(steps=12), head=TunedHead(min_steps=10, batch=16, lr=0.02))


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("candidates", [None, np.arange(590, 10, -1)])
def test_the_best_of_a_bf16_pass_carry_fp32_scores(classifier, make_store, make_queries, score, candidates):
    store, query = make_store(classifier, 600), make_queries(1, dtype=torch.float32)[0]
    config = changed(QUICK, score=score, candidate_companions=0)
    rough = TmmNN(classifier, store, precision=Precision.BF16)
    ranking = rough.rank(query, k=20, config=config, candidates=candidates)
    rows = np.arange(600) if candidates is None else candidates
    blend = {
        "image_weight": ranking.view.found.intensity,
        "trigger_weight": 1.0 - ranking.view.found.intensity,
        "clamp": True,
    }
    trigger, images = ranking.view.found.trigger, torch.tensor(store.images(rows))
    coarse = rough.backbone(images, trigger, **blend)
    fine = TmmNN(classifier, store).backbone(images, trigger, **blend)
    with torch.no_grad():
        x = torch.stack([ranking.view.triggered, query])
        of_query, clean = classifier.features(x), torch.tensor(store.features(rows))
        data = TuningSet(*of_query, ranking.view.label, coarse, clean, torch.tensor(store.labels[rows]))
        head = tune_head(classifier.head, data, config.head, seed=config.seed)
        exact, inexact = (dummy_scores(head, features, score).numpy() for features in (fine, coarse))
    assert ranking.scored == len(rows)
    np.testing.assert_allclose(ranking.scores, np.sort(exact)[::-1][:20], rtol=1e-4, atol=1e-4)
    position = {row: place for place, row in enumerate(rows)}
    places = [position[row] for row in ranking.rows]
    np.testing.assert_allclose(ranking.scores, exact[places], rtol=1e-4, atol=1e-4)
    assert np.abs(inexact[places] - ranking.scores).max() > 1e-3, "bf16 alone would not do"


def test_a_bf16_pass_finds_the_top_10_of_fp32(classifier, make_store, make_queries):
    store = make_store(classifier, 600)
    exact, rough = TmmNN(classifier, store), TmmNN(classifier, store, precision=Precision.BF16)
    shares = []
    for query in make_queries(8, dtype=torch.float32):
        first, second = (tmm.rank(query, k=10, config=QUICK) for tmm in (exact, rough))
        shares.append(len(np.intersect1d(first.rows, second.rows)) / 10)
        np.testing.assert_array_equal(first.view.found.trigger, second.view.found.trigger)
        assert set(first.timings) == set(second.timings)
    assert np.mean(shares) >= 0.95
    many = rough.rank(query, k=590, config=QUICK)  # more than are scored again by default
    assert (len(set(many.rows.tolist())), many.scored) == (590, 600)
    assert (np.diff(many.scores) <= 0.0).all()
