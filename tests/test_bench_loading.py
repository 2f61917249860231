"""Sources of a benchmark in the terms of its model."""

import numpy as np

from tests.conftest import SHAPE, network
from tmm_engine.bench.loading import in_classes
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.records import ImageRecord

CLASSIFIER = Classifier.from_module(network(), image_shape=SHAPE, class_names=("dog", "cat", "owl", "eel"))


def labels_of(names: list[str]) -> list[int | None]:
    source = ArraySource(np.zeros((4, *SHAPE), np.uint8), [0, 1, 2, 3], class_names=names)
    records = in_classes(source, CLASSIFIER).read(SHAPE)
    return [record.label for record in records if isinstance(record, ImageRecord)]


def test_labels_are_the_models_classes_by_name_and_by_number_where_their_names_are_others():
    assert labels_of(["cat", "dog", "eel", "owl"]) == [1, 0, 3, 2]
    assert labels_of(["a", "b", "c", "d"]) == [0, 1, 2, 3]
