"""Small classifiers on 8×8 images, and exemplars with their features."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.memory import MemoryStore

SHAPE = (3, 8, 8)
CLASSES = 4


class AsStored(nn.Module):
    """Rounds features to float32, as a store does: so that in float64 the store is not what limits a comparison."""

    def forward(self, features: Tensor) -> Tensor:
        return features.float().to(features.dtype)


def network(*, bias: bool = True, seed: int = 0) -> nn.Module:
    """Convolution, BatchNorm with a past, 12 features, 4 classes; in training mode, as a user may leave it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, 12),
            nn.ReLU(),
            AsStored(),
            nn.Linear(12, CLASSES, bias=bias),
        )
        norm, head = model[1], model[-1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.2)
            norm.load_state_dict(
                {"running_mean": 0.3 * torch.randn(8), "running_var": 0.2 + 0.4 * torch.rand(8)}, strict=False
            )
            head.weight.mul_(4.0)  # or every image has nearly the same logits
    return model


def classifier_of(model: nn.Module) -> Classifier:
    return Classifier.from_module(model, image_shape=SHAPE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


# A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On tensors this small threads only wait for each other, on a busy machine for minutes."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: two workers share two cores


@pytest.fixture(scope="session")
def make_network() -> Callable[..., nn.Module]:
    """network(bias=, seed=): a fresh one each time."""
    return network


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    """float32."""
    return classifier_of(network())


@pytest.fixture(scope="session")
def precise(classifier: Classifier) -> Classifier:
    """float64."""
    return classifier.double()


@pytest.fixture(scope="session")
def biasless() -> Classifier:
    """float64, its head without a bias."""
    return classifier_of(network(bias=False, seed=1)).double()


@pytest.fixture(scope="session")
def make_images() -> Callable[..., np.ndarray]:
    """make_images(n, seed=): uint8 (n, 3, 8, 8), noise of different strength and brightness. Read-only."""

    def make(n: int, *, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        contrast, level = rng.uniform(0.2, 1.0, (n, 1, 1, 1)), rng.uniform(0.0, 1.0, (n, 3, 1, 1))
        pixels = level * (1.0 - contrast) + contrast * rng.random((n, *SHAPE))
        images = (255.0 * pixels).round().astype(np.uint8)
        images.flags.writeable = False
        return images

    return make


@pytest.fixture(scope="session")
def make_store(make_images: Callable[..., np.ndarray]) -> Callable[..., MemoryStore]:
    """make_store(classifier, n, seed=, images=, ids=): with the classifier's own features. All arrays are read-only."""

    def make(
        classifier: Classifier,
        n: int,
        *,
        seed: int = 0,
        images: np.ndarray | None = None,
        ids: Sequence[str] | None = None,
    ) -> MemoryStore:
        images = make_images(n, seed=seed) if images is None else images
        dtype = classifier.head.weight.dtype
        with torch.no_grad():
            features = classifier.features(torch.tensor(images).to(dtype) / 255.0).float().numpy()
        labels = np.random.default_rng(seed).integers(0, classifier.num_classes, n)
        features.flags.writeable = labels.flags.writeable = False
        ids = ids or [f"exemplar {i:04}" for i in range(n)]
        return MemoryStore(images, {"feature": features}, labels, ids=ids)

    return make


@pytest.fixture(scope="session")
def make_queries(make_images: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """make_queries(q, seed=, dtype=): (q, 3, 8, 8) in [0, 1]."""

    def make(q: int, *, seed: int = 1000, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(make_images(q, seed=seed)).to(dtype) / 255.0

    return make


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """Ray on this machine, with room for two workers."""
    found: ModuleType = pytest.importorskip("ray")
    root = Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", f"{root}:{os.environ.get('PYTHONPATH', '')}")
        found.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
        yield found
        found.shutdown()
