"""What a classification returns: a class, how far to trust it, and the neighbours that say so."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tmm_engine.results import SearchResult

if TYPE_CHECKING:
    import pyarrow

SHOWN = 5  # classes of an answer at least, likeliest first


@dataclass(frozen=True, slots=True)
class Candidate:
    """A class that a query may have.

    Attributes:
        label: Its number in the index (`Engine.label_names`).
        class_name: Its name, in the user's words.
        score: The mean score of its k exemplars nearest to the query, as the mode's scores are; larger is nearer.
        p_value: The share of calibration images that look at least as strange in their right class, in (0, 1].
    """

    label: int
    class_name: str
    score: float
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """The class of one query by its neighbours.

    Attributes:
        query: The query's name.
        mode: What ranked the neighbours.
        label: Number of the class whose k nearest exemplars are nearest on average.
        class_name: Its name, in the user's words.
        credibility: Its p-value: small where the query is like nothing of any class.
        confidence: 1 − the second largest p-value: small where another class is as likely.
        candidates: The likeliest classes, at least those in the set and `SHOWN` in all, where there are as many.
        prediction_set: Names of the classes with a p-value above alpha, likeliest first. None: like no class. Several:
            it cannot be told which.
        alpha: How often the set may miss the right class.
        familiarity: The share of calibration images at least as far from their nearest class, in (0, 1].
        outlier: Whether the query is unlike everything: its familiarity is at most what was asked for.
        abstains: Why the class should not be relied upon, or None: an outlier, or not exactly one class in the set.
        predicted_class: What the model itself says.
        true_label: Number of the query's own label, where it has one that the index has too.
        true_class: Its name, where it has one.
        calibration: Name of the calibration.
        guarantee: What the set promises, and where that does not hold.
        notes: What a user should know about this answer, in sentences.
        search: The neighbours.
    """

    query: str
    mode: str
    label: int
    class_name: str
    credibility: float
    confidence: float
    candidates: tuple[Candidate, ...]
    prediction_set: tuple[str, ...]
    alpha: float
    familiarity: float
    outlier: bool
    abstains: str | None
    predicted_class: str
    true_label: int | None
    true_class: str | None
    calibration: str
    guarantee: str
    notes: tuple[str, ...]
    search: SearchResult

    def __repr__(self) -> str:
        doubt = f", abstains: {self.abstains}" if self.abstains else ""
        return f"<Classification of {self.query!r}: {self.class_name}, credibility {self.credibility:.3g}{doubt}>"

    def to_json(self) -> dict[str, Any]:
        """As plain values, the neighbours without their pixels."""
        told = {name: getattr(self, name) for name in self.__slots__ if name not in ("candidates", "search")}
        found = self.search.to_json()
        explained = {name: found[name] for name in ("explanation",) if name in found}
        return told | {"candidates": [each.to_json() for each in self.candidates], "hits": found["hits"]} | explained

    def to_arrow(self) -> "pyarrow.Table":
        """A table with one row; the set is a list of names, the neighbours a list of ids."""
        return Classifications([self]).to_arrow()


class Classifications(list[Classification]):
    """Answers in the order of their queries.

    Attributes:
        notes: What is to be said of all of them together, in sentences.
    """

    notes: tuple[str, ...] = ()

    def to_arrow(self) -> "pyarrow.Table":
        """A table with a row for every query; sets are lists of names, neighbours lists of ids."""
        from tmm_engine.views.classified import classified_table

        return classified_table(self)
