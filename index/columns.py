"""Columns of stored features: each declares its name, how it is computed from stored images, and what it needs.

An index says which columns it has by their names. Building, adding, repairing and verifying find the classes by these
names among those that are `registered`; everything else treats columns as names with a dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.models.classifier import Classifier

FEATURE = "feature"
"""φ(x), which every store has. The names of all others end in ``_feature``."""

OF_SOURCES = "source_"
"""What the name of a source's own column begins with where it would else be taken: never that of a column here."""


def is_column_name(name: str) -> bool:
    """Whether a name is kept for columns of features, so that no metadata can have it."""
    return (name == FEATURE or name.endswith(f"_{FEATURE}")) and not name.startswith(OF_SOURCES)


class FeatureColumn(ABC):
    """One column of features, and how it is computed.

    Args:
        classifier: The index's.
    """

    name: ClassVar[str]
    """In the index, for good: ``…_feature``."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @property
    def dimension(self) -> int:
        """d: numbers for one exemplar; those of φ(x) unless a column says otherwise."""
        return self.classifier.feature_dim

    @abstractmethod
    def compute(self, images: UInt8[np.ndarray, "n c h w"]) -> Float32[np.ndarray, "n d"]:
        """The features of images as stored, at most `forward_batch_size` of them in one pass."""

    def save(self, index: Path) -> None:  # noqa: B027 - most have nothing to save
        """Write into an index's folder, as a file of its own, what `load` needs beside the classifier: here nothing."""

    @classmethod
    def load(cls, index: Path, classifier: Classifier) -> "FeatureColumn":
        """The column of an index.

        Raises:
            IndexStateError: what was saved is missing, damaged or of another form.
        """
        return cls(classifier)


Column = TypeVar("Column", bound=type[FeatureColumn])

_registered: dict[str, type[FeatureColumn]] = {}


def registered(column: Column) -> Column:
    """Decorates a class of columns: indexes that have one of this name are opened, changed and verified with it."""
    if not is_column_name(column.name):
        raise ValueError(f"expected a name such as 'my_{FEATURE}' for a column of features, got {column.name!r}")
    if column.name in _registered:
        raise ValueError(f"expected one class for the column {column.name!r}, got another: {column.__qualname__}")
    _registered[column.name] = column
    return column


def is_registered(name: str) -> bool:
    """Whether this program can compute the column of this name."""
    return name in _registered


def load_columns(index: Path, names: Collection[str], classifier: Classifier) -> list[FeatureColumn]:
    """The columns of an index, in order, ready to compute.

    Args:
        index: Its folder.
        names: Of the columns that it has.
        classifier: The index's.

    Raises:
        IndexStateError: this program does not know one of them, or what one needs is missing or damaged.
    """
    if unknown := [name for name in names if not is_registered(name)]:
        raise IndexStateError(
            f"{index}: expected columns of features among {', '.join(_registered)}, got {unknown[0]!r}, which this "
            f"program cannot compute; use the version of tmm-engine, or import the code, that it was built with"
        )
    return [_registered[name].load(index, classifier) for name in names]


@registered
class PlainColumn(FeatureColumn):
    """φ(x)."""

    name = FEATURE

    def compute(self, images: UInt8[np.ndarray, "n c h w"]) -> Float32[np.ndarray, "n d"]:
        """In one pass."""
        return embed(images, self.classifier)


def embed(images: UInt8[np.ndarray, "n c h w"], classifier: Classifier) -> Float32[np.ndarray, "n d"]:
    """φ of stored images, in one pass."""
    with torch.inference_mode():
        pixels = torch.from_numpy(images).to(classifier.device).float() / 255.0
        return classifier.features(pixels).float().cpu().numpy()
