"""Training on handwritten digits: it learns, it is reproducible, and what it saves is complete."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.digits import IMAGES, LABELS
from tmm_engine.bench.train import LabelledImages, TrainConfig, accuracy, train_classifier
from tmm_engine.index.errors import InputError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.folders import FolderSource

TRAIN, TEST = slice(0, 512), slice(1500, 1797)
LARGE = IMAGES.repeat(4, axis=1).repeat(4, axis=2)  # (1797, 32, 32), as the paper's data sets are
CONFIG = TrainConfig(architecture="resnet18", epochs=3, batch=64)
CPU = torch.device("cpu")


def read(part: slice) -> LabelledImages:
    return LabelledImages.read(ArraySource(LARGE[part], LABELS[part], class_names=list("0123456789")))


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(read(TRAIN), CONFIG, device=CPU)


def test_it_learns(trained: Classifier):
    assert accuracy(trained, read(TEST)) > 0.5  # chance is 0.1
    assert trained.class_names == tuple("0123456789")


def test_normalisation_is_the_training_images_and_inside(trained: Classifier):
    pixels = LARGE[TRAIN] / 255
    assert trained.spec.mean == pytest.approx([pixels.mean()], abs=1e-5)
    assert trained.spec.std == pytest.approx([pixels.std()], abs=1e-3)


def test_what_is_saved_needs_no_mean_and_std_to_load(trained: Classifier, tmp_path: Path):
    trained.save(tmp_path / "w.safetensors")
    loaded = Classifier.from_architecture("resnet18", image_shape=(1, 32, 32), weights=tmp_path / "w.safetensors")
    assert loaded.fingerprint == trained.fingerprint
    assert (loaded.spec, loaded.class_names) == (trained.spec, trained.class_names)
    assert accuracy(loaded, read(TEST)) == accuracy(trained, read(TEST))


def test_the_seed_decides_and_the_global_one_stays_as_it_was():
    few, config = read(slice(0, 32)), TrainConfig(architecture="resnet18", epochs=1, batch=16, seed=3)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    once = train_classifier(few, config, device=CPU).fingerprint
    assert torch.equal(torch.rand(3), expected)
    assert train_classifier(few, config, device=CPU).fingerprint == once
    other = TrainConfig(architecture="resnet18", epochs=1, batch=16, seed=4)
    assert train_classifier(few, other, device=CPU).fingerprint != once


def test_accuracy_is_the_share_of_right_predictions(trained: Classifier):
    test = read(TEST)
    with torch.inference_mode():
        predicted = trained.logits(trained.features(test.images.float() / 255)).argmax(dim=1)
    assert accuracy(trained, test) == pytest.approx((predicted == test.labels).double().mean().item())
    relabelled = LabelledImages(test.images, predicted, test.class_names)
    assert accuracy(trained, relabelled) == 1.0


def test_sources_without_labels_or_images_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="expected labels to train with"):
        LabelledImages.read(ArraySource(IMAGES[:4]))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.png").write_bytes(b"no picture")
    source = FolderSource(tmp_path)
    with pytest.raises(InputError):
        LabelledImages.read(source)


def test_what_cannot_be_read_is_left_out(tmp_path: Path):
    from tests.digits import write_photos

    write_photos(tmp_path, count=12)
    (tmp_path / "digit-3" / "zzz.png").write_bytes(b"no picture")
    data = LabelledImages.read(FolderSource(tmp_path))
    assert len(data) == 12
    assert data.images.dtype == torch.uint8
    assert data.class_names == tuple(f"digit-{label}" for label in range(10))
    np.testing.assert_array_equal(np.sort(data.labels.numpy()), np.sort(LABELS[:12]))


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ModelError, match="resnet81"):
        train_classifier(read(slice(0, 4)), TrainConfig(architecture="resnet81"), device=CPU)


def test_a_cpu_trains_in_float32(monkeypatch: pytest.MonkeyPatch):
    """Its gradients in bf16 are garbage now and then, where a convolution with stride 2 meets a map of one cell."""
    seen, plain = set(), torch.nn.functional.conv2d

    def watched(*args, **kwargs):
        found = plain(*args, **kwargs)
        seen.add(found.dtype)
        return found

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    small = LabelledImages.read(ArraySource(IMAGES[:32], LABELS[:32], class_names=list("0123456789")))
    train_classifier(small, TrainConfig(architecture="resnet18", epochs=1, batch=16), device=CPU)
    assert seen == {torch.float32}
