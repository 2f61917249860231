"""Step 2 of TMM-NN for a query: its head tuned, or its discriminant, as the scorer that step 3 uses."""

from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.rerank.classes import ExemplarClasses
from tmm_engine.rerank.columns import GLOBAL_FEATURE, STRETCHED_FEATURE
from tmm_engine.rerank.discriminant import Discriminant
from tmm_engine.rerank.exemplars import ExemplarTensors
from tmm_engine.rerank.score import DiscriminantScorer, FusedScorer, HeadScorer, Scorer
from tmm_engine.rerank.settings import ClosedForm, IndexTrigger, TmmConfig, TunedHead, View
from tmm_engine.rerank.tuning import Fisher, TuningSet, fisher_diagonal, tune_head
from tmm_engine.rerank.view import QueryView


class HeadFinder:
    """Finds scorers over one store's exemplars; what is the same for every query is computed once.

    Args:
        classifier: f = head ∘ φ; never modified.
        store: The exemplars.
        tensors: Their features.
    """

    def __init__(self, classifier: Classifier, store: ExemplarStore, tensors: ExemplarTensors) -> None:
        self._classifier = classifier
        self._tensors = tensors
        self._columns = store.feature_columns
        self._store = store
        self._fishers_of_all: dict[str, Fisher] = {}
        self._global_discriminants: dict[float, tuple[Discriminant, Tensor]] = {}

    @cached_property
    def classes(self) -> ExemplarClasses:
        """y_i of all exemplars."""
        return ExemplarClasses.of(self._store, self._classifier.num_classes)

    @cached_property
    def _labels(self) -> Int64[Tensor, "n"]:
        return torch.from_numpy(self.classes.numbers).to(self._classifier.device)

    def scorer(
        self, view: QueryView, rows: Int64[np.ndarray, "n"] | None, triggered: Float[Tensor, "n d"], config: TmmConfig
    ) -> Scorer:
        """The scorer of a query.

        Args:
            view: The query.
            rows: The exemplars to find the head on; None is all.
            triggered: φ(x_i^t) of them.
            config: The reading of TMM-NN.

        Raises:
            InputError: the configuration stretches, and the store has no features of stretched images.
        """
        scorer: Scorer
        if isinstance(config.head, ClosedForm):
            scorer = self._discriminant_scorer(view.features[0], triggered, config.head, config)
        else:
            scorer = HeadScorer(self._tuned_head(view, rows, triggered, config.head, config), config.head.score)
        if config.rank.fusion > 0:
            clean = partial(self._tensors.features, dtype=triggered.dtype, column=self.clean_column(config.view))
            scorer = FusedScorer(scorer, config.rank.fusion, view.features[1], clean)
        return scorer

    def clean_column(self, view: View) -> str:
        """The column of φ(x_i), or of φ of x_i with its contrast stretched.

        Raises:
            InputError: the store has no features of stretched images, and exemplars are to be stretched.
        """
        column = STRETCHED_FEATURE if view.stretch else FEATURE
        if column not in self._columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with a global trigger "
                "(global_trigger=…), or search with stretch=False"
            )
        return column

    def _tuned_head(
        self,
        view: QueryView,
        rows: Int64[np.ndarray, "n"] | None,
        triggered: Float[Tensor, "n d"],
        settings: TunedHead,
        config: TmmConfig,
    ) -> nn.Linear:
        labels = self._labels if rows is None else self._labels[torch.from_numpy(rows).to(self._labels.device)]
        column = self.clean_column(config.view)
        clean = self._tensors.features(rows, triggered.dtype, column=column)
        if rows is None and column not in self._fishers_of_all:
            self._fishers_of_all[column] = fisher_diagonal(self._classifier.head, clean)
        fisher = self._fishers_of_all[column] if rows is None else None
        data = TuningSet(view.features[0], view.features[1], view.label, triggered, clean, labels)
        return tune_head(self._classifier.head, data, settings, seed=config.seed, fisher=fisher)

    def _discriminant_scorer(
        self, query: Float[Tensor, "d"], triggered: Float[Tensor, "n d"], settings: ClosedForm, config: TmmConfig
    ) -> DiscriminantScorer:
        """Under the global trigger, of all exemplars and fitted once, whatever the candidates."""
        shrinkage = settings.shrinkage
        if not isinstance(config.trigger, IndexTrigger):
            return DiscriminantScorer(Discriminant.fit([triggered], shrinkage=shrinkage), query)
        if shrinkage not in self._global_discriminants:
            self._global_discriminants[shrinkage] = self._fitted(shrinkage, triggered.dtype)
        fitted, lengths = self._global_discriminants[shrinkage]
        return DiscriminantScorer(fitted, query, lengths)

    def _fitted(self, shrinkage: float, dtype: torch.dtype) -> tuple[Discriminant, Float[Tensor, "all"]]:
        """Of all exemplars under the global trigger, and their lengths by it."""
        features = partial(self._tensors.feature_chunks, dtype, column=GLOBAL_FEATURE)
        fitted = Discriminant.fit(features(), shrinkage=shrinkage)
        return fitted, torch.cat([fitted.lengths(chunk) for chunk in features()])
