"""Exemplars from data sets that torchvision knows by name."""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.records import Encoded, EncodedSource, ImageRecord, UnreadableImage

DATASET_ROOT = Path("~/.cache/tmm-engine/datasets")
DATASETS = {
    "mnist": "MNIST/raw/*-ubyte",
    "cifar10": "cifar-10-batches-py/",
    "svhn": "*_32x32.mat",
    "gtsrb": "gtsrb/GTSRB/",
}
"""Data sets by name, and where below their root torchvision expects them."""


class TorchvisionSource(EncodedSource):
    """A data set that torchvision knows, fetched to `root` if it is not there.

    Ids are ``<split>/<row>``. MNIST, CIFAR-10 and SVHN come as arrays and have no metadata; images of another shape
    than the one asked for are resized as files are. GTSRB comes as files; metadata: ``path``.

    Raises:
        InputError: An unknown name or split, or files that are neither there nor to be fetched.
    """

    def __init__(self, name: str, *, root: Path = DATASET_ROOT, split: str = "train", limit: int | None = None) -> None:
        if split not in ("train", "test"):
            raise InputError(f"{name}: expected the split train or test, got {split!r}")
        images, labels, class_names = _fetched(name, root.expanduser(), split)
        self.name = f"{name} ({split})"
        self.class_names = class_names
        self.labelled = True
        self._labels = [int(label) for label in labels[:limit]]
        self.limited = limit is not None
        self._ids = [f"{split}/{row:08d}" for row in range(len(self._labels))]
        self._files = images[:limit] if isinstance(images, list) else None
        self._arrays = None if isinstance(images, list) else ArraySource(images[:limit], self._labels, ids=self._ids)
        self.metadata_types = {} if self._files is None else {"path": str}

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order."""
        if self._arrays is not None and self._arrays.natural_shape() == shape:
            return self._arrays.read(shape)
        return super().read(shape)

    def _encoded(self) -> Iterator[Encoded]:
        if self._arrays is not None:
            for record in self._arrays.read(self._arrays.natural_shape()):
                grey = len(record.image) == 1
                pixels = record.image[0] if grey else record.image.transpose(1, 2, 0)
                yield Encoded(record.id, Image.fromarray(pixels), record.label, record.metadata)
        for id_, file, label in zip(self._ids, self._files or (), self._labels, strict=self._files is not None):
            yield Encoded(id_, file, label, {"path": str(file)})


def _fetched(
    name: str, root: Path, split: str
) -> tuple[np.ndarray | list[Path], Sequence[int] | np.ndarray, tuple[str, ...]]:
    """The data set's images (an array of them, or files), its labels and its class names."""
    from torchvision import datasets

    train = split == "train"
    try:
        # torchvision prints its progress, and unpickles CIFAR-10: after checking its MD5, but NumPy 2.4 warns of it
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=np.exceptions.VisibleDeprecationWarning)
            match name:
                case "mnist":
                    mnist = datasets.MNIST(root, train=train, download=True)
                    return mnist.data.numpy(), mnist.targets.numpy(), tuple(mnist.classes)
                case "cifar10":
                    cifar = datasets.CIFAR10(root, train=train, download=True)
                    return cifar.data, cifar.targets, tuple(cifar.classes)
                case "svhn":
                    svhn = datasets.SVHN(root, split=split, download=True)
                    return svhn.data, svhn.labels, tuple("0123456789")
                case "gtsrb":
                    # `_samples`, as indexing the data set would decode its images, and without our checks
                    files, labels = zip(*datasets.GTSRB(root, split=split, download=True)._samples, strict=True)
                    return [Path(file) for file in files], labels, tuple(str(label) for label in range(43))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{name}: expected {root / DATASETS[name]}, or a connection to fetch it, got {error}; put the data set's "
            "original files there, or name another root"
        ) from error
    raise InputError(f"expected a data set of {', '.join(DATASETS)}, got {name!r}{nearest(name, DATASETS)}")
