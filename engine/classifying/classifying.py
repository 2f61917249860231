"""From queries to classes: neighbours, p-values, sets, and when to abstain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from jaxtyping import Float64

from tmm_engine.classifying.calibration import Calibration
from tmm_engine.classifying.classification import SHOWN, Candidate, Classification, Classifications
from tmm_engine.classifying.conformal import margins
from tmm_engine.classifying.labels import PresentLabels
from tmm_engine.classifying.nearness import class_scores
from tmm_engine.index.errors import InputError
from tmm_engine.results import SearchResult
from tmm_engine.scanning import RankedBy
from tmm_engine.snapshot import Snapshot

STRANGE = 0.1  # of calibration images are as far from their nearest class as what is counted in a batch
BATCH = 20  # queries from which on a shift is looked for
SIGMAS = 4.0
SMALLEST = 1e-6  # share that is told from none


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """How much doubt is too much.

    Attributes:
        alpha: How often a set may miss the right class, from a millionth to below 1.
        outliers: The largest familiarity of an outlier, likewise, or 0: nothing is one.

    Raises:
        InputError: out of range.
    """

    alpha: float = 0.05
    outliers: float = 0.01

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, Real) and SMALLEST <= self.alpha < 1.0):
            raise InputError(f"alpha: expected a share from {SMALLEST:g} to below 1, as in 0.05, got {self.alpha!r}")
        if not (isinstance(self.outliers, Real) and (self.outliers == 0 or SMALLEST <= self.outliers < 1.0)):
            raise InputError(
                f"outliers: expected 0, or a share from {SMALLEST:g} to below 1, as in 0.01, got {self.outliers!r}"
            )


def classified(
    snapshot: Snapshot,
    answers: Sequence[tuple[SearchResult, RankedBy]],
    calibration: Calibration,
    doubt: Doubt,
    *,
    k: int,
) -> Classifications:
    """The class of every query.

    Args:
        snapshot: What was searched.
        answers: Of its searcher, one for every query, with what each is ranked by.
        calibration: Of this snapshot and these options.
        doubt: When to abstain.
        k: Exemplars of each class that are looked at.
    """
    present = PresentLabels.of(snapshot.store, snapshot.vocabulary)
    scores = class_scores(snapshot.store, [ranked_by for _, ranked_by in answers], present.places, k=k)
    strange = margins(scores)
    p_values = calibration.of_classes(strange)
    familiar = calibration.familiarity(-scores.max(axis=1))
    about = (*present.notes, *calibration.notes, *_too_few(len(calibration), doubt))
    found = Classifications()
    for place, (result, _) in enumerate(answers):
        order = np.lexsort((-scores[place], -p_values[place]))
        kept = max(SHOWN, int((p_values[place] > doubt.alpha).sum()))
        candidates = tuple(
            Candidate(
                label=int(present.numbers[one]),
                class_name=present.names[one],
                score=float(scores[place, one]),
                p_value=float(p_values[place, one]),
            )
            for one in order[:kept]
        )
        second = float(p_values[place, order[1]]) if len(order) > 1 else 0.0
        found.append(
            _answer(
                result,
                candidates,
                second=second,
                familiar=float(familiar[place]),
                calibration=calibration,
                doubt=doubt,
                about=about,
            )
        )
    found.notes = shift(familiar, calibration)
    return found


def _answer(
    result: SearchResult,
    candidates: tuple[Candidate, ...],
    *,
    second: float,
    familiar: float,
    calibration: Calibration,
    doubt: Doubt,
    about: tuple[str, ...],
) -> Classification:
    inside = tuple(each.class_name for each in candidates if each.p_value > doubt.alpha)
    outlier = familiar <= doubt.outliers
    first = candidates[0]
    return Classification(
        query=result.query,
        mode=result.mode,
        label=first.label,
        class_name=first.class_name,
        credibility=first.p_value,
        confidence=1.0 - second,
        candidates=candidates,
        prediction_set=inside,
        alpha=doubt.alpha,
        familiarity=familiar,
        outlier=outlier,
        abstains=_why(outlier, inside, familiar, doubt.alpha),
        predicted_class=result.predicted_class,
        true_label=result.true_label,
        true_class=result.true_class,
        calibration=calibration.name,
        guarantee=calibration.guarantee(doubt.alpha),
        notes=(*result.notes, *about),
        search=result,
    )


def _why(outlier: bool, inside: tuple[str, ...], familiar: float, alpha: float) -> str | None:
    if outlier:
        return f"unlike everything: only {familiar:.2%} of the calibration images are as far from their nearest class"
    if not inside:
        return f"stranger in every class than {1 - alpha:.0%} of the calibration images are in theirs"
    if len(inside) > 1:
        return f"it may be any of {len(inside)} classes: {', '.join(inside)}"
    return None


def _too_few(images: int, doubt: Doubt) -> tuple[str, ...]:
    least, notes = 1 / (images + 1), []
    if doubt.alpha < least:
        notes.append(
            f"alpha {doubt.alpha:g} needs {math.ceil(1 / doubt.alpha) - 1:,} calibration images, there are "
            f"{images:,}: every set holds all classes"
        )
    if 0 < doubt.outliers < least:
        notes.append(
            f"outliers at {doubt.outliers:g} need {math.ceil(1 / doubt.outliers) - 1:,} calibration images, "
            f"there are {images:,}: nothing is called one"
        )
    return tuple(notes)


def shift(familiar: Float64[np.ndarray, "q"], calibration: Calibration) -> tuple[str, ...]:
    """Whether many queries together are stranger than the calibration images, so that nothing is promised for them.

    Of exchangeable images a tenth has a familiarity of at most a tenth; told where the share is four standard
    deviations of the difference of two such shares above that.

    Args:
        familiar: Of each query.
        calibration: The familiarity is by.
    """
    if len(familiar) < BATCH:
        return ()
    share = float((familiar <= STRANGE).mean())
    deviation = math.sqrt(STRANGE * (1 - STRANGE) * (1 / len(familiar) + 1 / len(calibration)))
    if share <= STRANGE + SIGMAS * deviation:
        return ()
    return (
        f"these {len(familiar):,} images are not like the calibration images: {share:.0%} of them are as far from "
        f"their nearest class as {STRANGE:.0%} of those; sets may miss the right class more often than said",
    )
