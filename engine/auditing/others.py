"""Images from elsewhere, described as an index's exemplars are: another index, or files."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from tmm_engine.auditing.findings import Evidence
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FEATURE, embed
from tmm_engine.index.descriptors.columns import CopyColumn
from tmm_engine.index.models.preprocessing import shape_of
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.images import decode_image
from tmm_engine.query import Query
from tmm_engine.snapshot import Snapshot
from tmm_engine.views.showing import as_picture


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """Some images from elsewhere.

    Attributes:
        ids: Theirs.
        labels: By name; the predicted class where there is none.
        predicted: The class that the model predicts, by name.
        images: Of the index's shape.
        features: As the column that recognises copies has them.
        kept: Pixels by position, where `images` has been let go of.
    """

    ids: list[str]
    labels: list[str]
    predicted: list[str]
    images: UInt8[np.ndarray, "m c h w"]
    features: Float32[np.ndarray, "m d"]
    kept: Mapping[int, UInt8[np.ndarray, "c h w"]] = field(default_factory=dict)

    def reduced(self, shown: Set[int]) -> "Described":
        """What is kept of many: pixels of those that will be shown."""
        kept = {place: self.images[place].copy() for place in shown}
        return replace(self, images=self.images[:0], features=self.features[:0], kept=kept)

    def evidence(self, place: int, similarity: float) -> Evidence:
        """One of them as evidence."""
        image = self.kept.get(place)
        return Evidence(self.ids[place], self.labels[place], self.predicted[place], similarity, image=image)


class Others:
    """Images from elsewhere, by batches.

    Args:
        name: What they are called.
        images: uint8 (n, c, h, w) by batches, of the shape of `own`.
        ids: Theirs.
        labels: By name; None where there is none.
        own: The snapshot that they are compared with, whose model describes them.
    """

    def __init__(
        self,
        name: str,
        images: Iterator[UInt8[np.ndarray, "n c h w"]],
        ids: Sequence[str],
        labels: Sequence[str | None],
        own: Snapshot,
    ) -> None:
        self.name, self._images, self._ids, self._labels, self._own = name, images, ids, labels, own

    def __len__(self) -> int:
        return len(self._ids)

    @classmethod
    def of_index(cls, other: Snapshot, own: Snapshot) -> "Others":
        """The exemplars of another index, brought to this one's shape."""
        store, names, target = other.store, other.vocabulary.names, own.classifier.target
        size = forward_batch_size(own.classifier.image_shape)

        def images() -> Iterator[UInt8[np.ndarray, "n c h w"]]:
            for batch in store.scan_images(size):
                if batch.shape[1:] == shape_of(target):
                    yield batch
                else:
                    yield np.stack([decode_image(as_picture(image), shape=target) for image in batch])

        labels = [
            None if predicted else names[label]
            for label, predicted in zip(store.labels.tolist(), store.label_is_predicted.tolist(), strict=True)
        ]
        name = str(other.path) if other.path is not None else "the other index"
        return cls(name, images(), [str(id_) for id_ in store.ids], labels, own)

    @classmethod
    def of_queries(cls, queries: Sequence[Query], own: Snapshot) -> "Others":
        """Images that have the index's shape."""
        size = forward_batch_size(own.classifier.image_shape)

        def images() -> Iterator[UInt8[np.ndarray, "n c h w"]]:
            for start in range(0, len(queries), size):
                yield np.stack(
                    [np.rint(query.pixels * 255).astype(np.uint8) for query in queries[start : start + size]]
                )

        names = [query.name for query in queries]
        return cls("images", images(), names, [None] * len(names), own)

    def described(self, column: str, progress: Progress) -> Iterator[Described]:
        """All of them, by batches."""
        start, classifier, names = 0, self._own.classifier, self._own.vocabulary.class_names
        describer = self._own.searcher.describer
        for images in map(np.ascontiguousarray, self._images):
            plain = embed(images, classifier)
            if column == FEATURE or describer is None:
                features = plain
            else:
                features = CopyColumn(describer, classifier).compute(images)
            with torch.inference_mode():
                logits = classifier.logits(torch.from_numpy(plain).to(classifier.device))
            predicted = [names[place] for place in logits.argmax(1).tolist()]
            places = slice(start, start + len(images))
            own = zip(self._labels[places], predicted, strict=True)
            labels = [said if label is None else label for label, said in own]
            yield Described(list(self._ids[places]), labels, predicted, images, features)
            start += len(images)
            progress(f"comparing {self.name}", start, len(self))
