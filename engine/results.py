"""What a search returns: frozen, documented, and convertible to JSON."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, overload

import numpy as np
from jaxtyping import Float, UInt8

from tmm_engine.exports import Exports
from tmm_engine.index.sources.records import Metadata

if TYPE_CHECKING:
    import pyarrow

SHOWN = 3  # hits in a result's printed form


@dataclass(frozen=True, slots=True)
class Hit:
    """One retrieved exemplar. Larger scores are better in every mode. Hits are equal if all but their pixels are.

    Attributes:
        rank: Position in the answer, 0 first.
        id: The exemplar's id in the index.
        label: Number of its label: a class of the model's, or from C on another label of the index's
            (`Engine.label_names` has the names of all).
        class_name: The label's name, in the user's words (the number as text where no names are known).
        label_is_predicted: True if it has no label of its own, and the predicted class stands in.
        label_is_class: True if the label is a class of the model's: then Eq. 3 uses it, else the predicted class.
        predicted_label: The class that the model predicts for it.
        predicted_class: Its name, in the model's words.
        score: Log-odds, logit, similarity or a fusion (tmm, as its configuration says), minus the L2 distance (l2),
            cosine similarity of features (cosine) or of descriptors (robust).
        confidence: In [0, 1] for tmm, None otherwise: P(dummy class), or with a head in closed form the positive part
            of the decorrelated similarity, which is 1 for the query itself. Recognition does not change it.
        metadata: The source's other columns; ``path`` where it had files.
        image: uint8 (c, h, w), the stored exemplar.
    """

    rank: int
    id: str
    label: int
    class_name: str
    label_is_predicted: bool
    label_is_class: bool
    predicted_label: int
    predicted_class: str
    score: float
    confidence: float | None
    metadata: Metadata
    image: UInt8[np.ndarray, "c h w"] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "image"}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the model decided so: a few exemplars of each kind, as hits. Their `Hit.score` is said with each.

    An exemplar's class is its label where that is a class of the model's, else the class predicted for it.

    Attributes:
        class_name: The class decided for, which is explained: the model's prediction on the query.
        unlike: The nearest exemplars of another class (nearest unlike neighbours); scores as in the search.
        prototypes: The medoid of the class decided for and, second, that of the nearest unlike neighbour's; scores are
            their similarity to the query by what ranks (for tmm the cosine similarity of features).
        pulled_towards: The exemplars whose training pulled most towards the decision; scores are the influence (TracIn
            of the last layer on one checkpoint; `tmm_engine.influence`), above 0.
        pulled_away: Those that pulled most away from it; scores below 0.
        notes: What there is none of, and why.
    """

    class_name: str
    unlike: tuple[Hit, ...]
    prototypes: tuple[Hit, ...]
    pulled_towards: tuple[Hit, ...]
    pulled_away: tuple[Hit, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        kinds = ("unlike", "prototypes", "pulled_towards", "pulled_away")
        hits = {kind: [hit.to_json() for hit in getattr(self, kind)] for kind in kinds}
        return {"class_name": self.class_name, **hits, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class FailedQuery:
    """In the place of an answer: a query that cannot be answered.

    Attributes:
        query: The query's name.
        error: What is wrong with it, and what to do.
    """

    query: str
    error: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"query": self.query, "error": self.error}


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult(Exports):
    """The answer to one query in one mode.

    Attributes:
        query: The query's name: its path, its id, or its position in the list that was passed.
        mode: ``robust``, ``tmm``, ``l2`` or ``cosine``.
        hits: At most k hits, best first; ties in order of id. In mode ``robust`` the first may be so by what
            recognises copies, whatever its score (`put_first`).
        predicted_label: The model's prediction on the query.
        predicted_class: Its name.
        true_label: The number of the query's own label, where it has one that the index has too.
        true_class: Its name, where it has one.
        scored: How many exemplars were scored (the candidates, or all).
        exemplars: How many the index holds.
        config: The settings that had an effect, by name, as plain values (tmm only).
        backend: What computed it: for tmm the backbone's software, precision and device.
        timings: Seconds by step; a step done for several queries together counts as shared equally.
        notes: What a user should know about this answer, in sentences.
        query_image: uint8 (c, h, w), the query in the index's shape, before its contrast is stretched.
        recognised_as: Id of the exemplar that the query was taken for a copy of, and answered for (`recognised_share`
            is at least a half); else None.
        recognised_share: How far the query's features moved to those of the exemplar nearest to it, in [0, 1]
            (`rerank.recognise`); None where recognition is off.
        put_first: Whether the first hit is so by what recognises copies, and has not the largest score
            (`rerank.recognise.comes_first`).
        trigger: float32 (c, h, w) in pixel units, τ (tmm only).
        triggered_query: float32 (c, h, w), the blended query (tmm only).
        explanation: Examples and counter-examples, where they were asked for.
        complete: False where some exemplars could not be seen, since workers that hold them were lost: the first note
            says which.
    """

    query: str
    mode: str
    hits: tuple[Hit, ...]
    predicted_label: int
    predicted_class: str
    true_label: int | None
    true_class: str | None
    scored: int
    exemplars: int
    config: dict[str, Any] | None
    backend: str
    timings: dict[str, float]
    notes: tuple[str, ...]
    query_image: UInt8[np.ndarray, "c h w"]
    recognised_as: str | None = None
    recognised_share: float | None = None
    put_first: bool = False
    trigger: Float[np.ndarray, "c h w"] | None = None
    triggered_query: Float[np.ndarray, "c h w"] | None = None
    explanation: Explanation | None = None
    complete: bool = True

    def __repr__(self) -> str:
        shown = ", ".join(f"{hit.id} ({hit.class_name}, {hit.score:.4g})" for hit in self.hits[:SHOWN])
        more = f", and {len(self.hits) - SHOWN} more" if len(self.hits) > SHOWN else ""
        return f"<SearchResult of {self.query!r} by {self.mode}, predicted {self.predicted_class}: {shown}{more}>"

    @property
    def seconds(self) -> float:
        """The whole search's wall time."""
        return sum(self.timings.values())

    @property
    def score_meaning(self) -> str:
        """What the hits' scores are; larger is nearer."""
        if self.config is None:
            return {
                "robust": "cosine similarity of robust descriptors",
                "l2": "minus the Euclidean distance between features",
                "cosine": "cosine similarity of features",
            }[self.mode]
        own, fusion = self.config, self.config["fusion"]
        if fusion > 0:
            return f"{self.confidence_word} + {fusion:g} · cosine similarity of features"
        if own["head"] == "discriminant":
            return "similarity to the triggered query, decorrelated"
        return "log-odds of the dummy class" if own["head.score"] == "log-odds" else "logit of the dummy class"

    @property
    def confidence_word(self) -> str:
        """What the hits' confidences are called where there is little room."""
        return "alike" if self.config is not None and self.config["head"] == "discriminant" else "P"

    @property
    def confidence_meaning(self) -> str | None:
        """What the hits' confidences are, in [0, 1]; None where they have none."""
        if self.config is None:
            return None
        if self.confidence_word == "P":
            return "P: the probability that the tuned head gives to the dummy class"
        return "alike: decorrelated similarity to the triggered query, where positive; 1 is the query itself"

    def to_json(self) -> dict[str, Any]:
        """Everything but pixel arrays; one JSON line of ``engine search --json``."""
        pixels = ("hits", "query_image", "trigger", "triggered_query", "explanation", "complete")
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in pixels}
        explained: dict[str, Any] = {} if self.explanation is None else {"explanation": self.explanation.to_json()}
        explained |= {} if self.complete else {"complete": False}
        return fields | {"hits": [hit.to_json() for hit in self.hits]} | explained

    def to_arrow(self) -> "pyarrow.Table":
        """A table with a row per hit: what it says of the query, the hit's attributes but the image, its metadata.

        Metadata of a name that is taken are called ``source_…``.
        """
        from tmm_engine.views.table import hits_table

        return hits_table([self], errors=False)

    def _answers(self) -> "list[SearchResult | FailedQuery]":
        return [self]


Answer = TypeVar("Answer", bound=SearchResult | FailedQuery)


class SearchResults(list[Answer], Exports):
    """Answers in the order of their queries: a list that can be turned into what one answer can.

    Consecutive answers to the same query are shown together. A part of it is one too.
    """

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Answer: ...

    @overload
    def __getitem__(self, index: slice, /) -> "SearchResults[Answer]": ...

    def __getitem__(self, index: SupportsIndex | slice, /) -> "Answer | SearchResults[Answer]":
        if isinstance(index, slice):
            return SearchResults(super().__getitem__(index))
        return super().__getitem__(index)

    def to_arrow(self) -> "pyarrow.Table":
        """As `SearchResult.to_arrow`, one after the other, with a column ``error``.

        A query that could not be answered has one row, where everything but its name and the error is null.
        """
        from tmm_engine.views.table import hits_table

        return hits_table(self, errors=True)

    def _answers(self) -> "list[Answer]":
        return self
