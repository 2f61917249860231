"""A store of exemplars that are held as arrays. (The one on disk is `index.store.lance_store`.)"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from tmm_engine.index.columns import FEATURE, FeatureColumn, PlainColumn
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.records import ImageSource, Metadata
from tmm_engine.index.store.embedding import BuildReport, embedded
from tmm_engine.index.types import Rows


class MemoryStore:
    """Exemplars held as arrays: for `Engine.from_arrays`, tests, and scoring where there is no index on disk.

    Args:
        images: One per exemplar.
        features: By name of the column; FEATURE is one of them.
        labels: Of the exemplars.
        ids: Unique.
        label_is_predicted: Default: none is.
        predicted: Classes of the model's; default: the labels, which are such classes then.
        metadata: Default: there is none.

    Raises:
        InputError: a column of another length than the images, no column FEATURE, or an id that is there twice.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "n c h w"],
        features: Mapping[str, Float32[np.ndarray, "n _"]],
        labels: Int64[np.ndarray, "n"],
        *,
        ids: Sequence[str],
        label_is_predicted: Bool[np.ndarray, "n"] | None = None,
        predicted: Int64[np.ndarray, "n"] | None = None,
        metadata: Sequence[Mapping[str, str | int | float | bool | None]] | None = None,
    ) -> None:
        n = len(images)
        lengths = {name: len(column) for name, column in features.items()} | {"labels": len(labels), "ids": len(ids)}
        for name, length in (lengths | ({} if metadata is None else {"metadata": len(metadata)})).items():
            if length != n:
                raise InputError(f"expected {n} {name}, one per image, got {length}")
        if FEATURE not in features:
            raise InputError(f"expected a column {FEATURE!r} among the features, got {', '.join(features) or 'none'}")
        if len(set(ids)) != n:
            raise InputError("ids must be unique")
        self._images = images
        self._features = dict(features)
        self.feature_columns: Mapping[str, int] = {name: column.shape[1] for name, column in features.items()}
        self._metadata = [dict(row) for row in metadata] if metadata is not None else [{} for _ in range(n)]
        _, channels, height, width = images.shape
        self.image_shape = (channels, height, width)
        self.feature_dim = features[FEATURE].shape[1]
        self.ids = np.array(ids, dtype=object)
        self.labels = labels
        self._predicted = labels if predicted is None else predicted
        self.label_is_predicted = label_is_predicted if label_is_predicted is not None else np.zeros(n, dtype=bool)

    @classmethod
    def of(
        cls,
        source: ImageSource | AdaptedSource,
        classifier: Classifier,
        *,
        columns: Sequence[FeatureColumn] = (),
        report: BuildReport | None = None,
        progress: Progress = silent,
    ) -> "MemoryStore":
        """A source's readable images and their features, as an index of them would have them.

        Args:
            source: The images; decoded to `classifier.target`.
            classifier: Computes φ(x), and predicts labels where there are none.
            columns: Of features beside φ(x).
            report: What is skipped, guessed and found is told here.
            progress: Told of images done.

        Raises:
            InputError: a source of which no image can be read, or with a label that is no class.
            ModelError: the features of most images are not finite.
        """
        columns, report, batches = (PlainColumn(classifier), *columns), report or BuildReport(), []
        if not isinstance(source, AdaptedSource):
            source = AdaptedSource.of_new_index(source, classifier.class_names, named=classifier.names_given)
        for batch in embedded(source, classifier, columns, report):
            batches.append(batch)
            progress("embedding", report.exemplars, len(source))
        records = [record for batch in batches for record in batch.records]
        return cls(
            np.concatenate([batch.images for batch in batches]),
            {column.name: np.concatenate([batch.features[column.name] for batch in batches]) for column in columns},
            np.concatenate([batch.labels for batch in batches]),
            ids=[record.id for record in records],
            label_is_predicted=~np.concatenate([batch.given for batch in batches]),
            predicted=np.concatenate([batch.predicted for batch in batches]),
            metadata=[record.metadata for record in records],
        )

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: Rows) -> UInt8[np.ndarray, "rows c h w"]:
        """Images of the given rows, in their order."""
        return self._images[rows]

    def features(self, rows: Rows, *, column: str = FEATURE) -> Float32[np.ndarray, "rows d"]:
        """Features of the given rows, in their order."""
        return self._features[column][rows]

    def predictions(self, rows: Rows) -> Int64[np.ndarray, "rows"]:
        """Predicted classes of the given rows, in their order."""
        return self._predicted[rows]

    def metadata(self, rows: Rows) -> list[Metadata]:
        """Metadata of the given rows, in their order."""
        return [dict(self._metadata[row]) for row in rows]

    def scan_images(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "batch c h w"]]:
        """All images in row order."""
        for start in range(0, len(self), batch_size):
            yield self._images[start : start + batch_size]

    def scan_features(self, batch_size: int, *, column: str = FEATURE) -> Iterator[Float32[np.ndarray, "batch d"]]:
        """All features in row order."""
        for start in range(0, len(self), batch_size):
            yield self._features[column][start : start + batch_size]
