"""Step 2 of TMM-NN for a query: its head tuned, or its discriminant, as the scorer that step 3 uses."""

from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.exemplars import FEATURE, GLOBAL_FEATURE, STRETCHED_FEATURE, ExemplarStore
from tmm_engine.rerank.discriminant import Discriminant
from tmm_engine.rerank.exemplars import ExemplarTensors
from tmm_engine.rerank.jobs import Job
from tmm_engine.rerank.score import DiscriminantScorer, FusedScorer, HeadScorer, Scorer
from tmm_engine.rerank.settings import TmmConfig, Trigger, Tuning
from tmm_engine.rerank.tuning import Fisher, TuningSet, fisher_diagonal, tune_head


class ScorerFitter:
    """Finds scorers over one store's exemplars; what is the same for every query is computed once.

    Args:
        classifier: f = head ∘ φ; never modified.
        store: The exemplars.
        tensors: Their features.
    """

    def __init__(self, classifier: Classifier, store: ExemplarStore, tensors: ExemplarTensors) -> None:
        self._classifier = classifier
        self._store = store
        self._tensors = tensors
        self._labels = torch.tensor(store.labels, device=classifier.device)  # a copy: a store's may be read-only
        self._fishers_of_all: dict[str, Fisher] = {}
        self._global_discriminants: dict[float, tuple[Discriminant, Tensor]] = {}

    def fit(
        self, job: Job, rows: Int64[np.ndarray, "n"] | None, triggered: Float[Tensor, "n d"], config: TmmConfig
    ) -> None:
        """Set the job's scorer, and its features and label where it has none.

        Args:
            job: After step 1.
            rows: The exemplars to tune on; None is all.
            triggered: φ(x_i^t) of them.
            config: The reading of TMM-NN.

        Raises:
            InputError: the configuration stretches, and the store has no features of stretched images.
        """
        if job.features is None:
            job.features = self._classifier.features(torch.stack([job.triggered_query(config), job.query]))
        both = job.features
        if job.label is None:
            job.label = int(self._classifier.logits(both[1:]).argmax())
        scorer: Scorer
        if config.tuning is Tuning.DISCRIMINANT:
            scorer = self._discriminant_scorer(both[0], triggered, config)
        else:
            scorer = HeadScorer(self._tuned_head(job.label, both, rows, triggered, config), config.score)
        if config.fusion > 0:
            clean = partial(self._tensors.features, dtype=triggered.dtype, column=self.clean_column(config))
            scorer = FusedScorer(scorer, config.fusion, both[1], clean)
        job.scorer = scorer

    def _tuned_head(
        self,
        label: int,
        query: Float[Tensor, "2 d"],
        rows: Int64[np.ndarray, "n"] | None,
        triggered: Float[Tensor, "n d"],
        config: TmmConfig,
    ) -> nn.Linear:
        labels = self._labels if rows is None else self._labels[torch.from_numpy(rows).to(self._labels.device)]
        column = self.clean_column(config)
        clean = self._tensors.features(rows, triggered.dtype, column=column)
        if rows is None and column not in self._fishers_of_all:
            self._fishers_of_all[column] = fisher_diagonal(self._classifier.head, clean)
        data = TuningSet(query[0], query[1], label, triggered, clean, labels)
        return tune_head(
            self._classifier.head, data, config, fisher=self._fishers_of_all[column] if rows is None else None
        )

    def _discriminant_scorer(
        self, query: Float[Tensor, "d"], triggered: Float[Tensor, "n d"], config: TmmConfig
    ) -> DiscriminantScorer:
        """Under the global trigger, of all exemplars and fitted once, whatever the candidates."""
        if config.trigger is not Trigger.GLOBAL:
            return DiscriminantScorer(Discriminant.fit([triggered], shrinkage=config.shrinkage), query)
        if config.shrinkage not in self._global_discriminants:
            features = partial(self._tensors.feature_chunks, triggered.dtype, column=GLOBAL_FEATURE)
            fitted = Discriminant.fit(features(), shrinkage=config.shrinkage)
            lengths = torch.cat([fitted.lengths(chunk) for chunk in features()])
            self._global_discriminants[config.shrinkage] = fitted, lengths
        fitted, lengths = self._global_discriminants[config.shrinkage]
        return DiscriminantScorer(fitted, query, lengths)

    def clean_column(self, config: TmmConfig) -> str:
        """The column of φ(x_i), or of φ of x_i with its contrast stretched.

        Raises:
            InputError: the store has no features of stretched images, and the configuration stretches.
        """
        if config.stretch and STRETCHED_FEATURE not in self._store.feature_columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with --global-trigger, "
                "or search with --no-stretch"
            )
        return STRETCHED_FEATURE if config.stretch else FEATURE
