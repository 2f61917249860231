"""Real images for tests of whole paths: handwritten digits as files, and a ResNet-18 with seeded random weights."""

from pathlib import Path

from PIL import Image

from tmm_engine.digits import load_digits
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.settings import GlobalRecipe, preset

IMAGES, LABELS = load_digits()  # (1797, 8, 8), (1797,)

SHORT = (
    "--global-trigger",
    "--set",
    "trigger.steps=10",
)  # of build-index: a global trigger that is good enough for a test
SHORTLY = GlobalRecipe.of(preset("fast")).with_settings(["trigger.steps=10"])  # the same in Python


def make_classifier(*, seed: int = 0) -> Classifier:
    return Classifier.from_architecture("resnet18", image_shape=(1, 8, 8), seed=seed, num_classes=10, small_stem=True)


def write_photos(folder: Path, *, count: int = 120, start: int = 0) -> Path:
    """`count` digits in folders named by class."""
    for number in range(start, start + count):
        image, label = IMAGES[number], LABELS[number]
        path = folder / f"digit-{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_queries(folder: Path, *, count: int = 2, start: int = 200) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        Image.fromarray(IMAGES[number]).save(folder / f"query-{number}.png")
    return folder
