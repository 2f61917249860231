"""What an audit found: findings with their evidence, the rules that made them findings, and what could not be done."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from tmm_engine.auditing.copies import Pairs

SUSPICIOUS = 10
"""Images of a kind that are shown where nothing is a finding."""


class Kind(StrEnum):
    """What may be wrong with an image."""

    DUPLICATES = "duplicates"
    LEAKS = "leaks"
    LABELS = "labels"
    FOREIGN = "foreign"
    UNSURE = "unsure"


MEANINGS = {
    Kind.DUPLICATES: "one picture more than once, be it resized, recompressed, slightly cropped, turned or darkened",
    Kind.LEAKS: "a picture of one source that is in another too",
    Kind.LABELS: "the given label is likely wrong",
    Kind.FOREIGN: "unlike the other images: not what the model knows",
    Kind.UNSURE: "no label is more likely than all others together",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """An exemplar that speaks for a finding.

    Attributes:
        id: Its id.
        label: Its label's name; the predicted class where it has none.
        predicted: The class that the model predicts for it.
        similarity: To the image of the finding, cosine, by the descriptors that the finding is made of.
        score: Of a pair of copies, as a finding's; None where the neighbour is only shown.
        source: Of a leak: the index or the value that it belongs to.
        image: Its pixels, uint8 (c, h, w), where it is no exemplar of the index.
    """

    id: str
    label: str
    predicted: str
    similarity: float
    score: float | None = None
    source: str | None = None
    image: UInt8[np.ndarray, "c h w"] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "image"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One image, or one group of copies, that somebody should look at.

    Attributes:
        kind: What may be wrong.
        score: How sure that is, in [0, 1].
        id: The image's id; of copies that of the first, which would be kept.
        label: Its label's name; the predicted class where it has none.
        label_given: Whether the label is its own.
        predicted: The class that the model predicts for it.
        why: In a sentence.
        evidence: The copies, or its nearest neighbours.
        suggestion: Of a wrong label another.
        confidence: What the model gives to the class that it predicts, in [0, 1].
        source: Of a leak: the index or the value that it belongs to.
    """

    kind: Kind
    score: float
    id: str
    label: str
    label_given: bool
    predicted: str
    why: str
    evidence: tuple[Evidence, ...]
    suggestion: str | None = None
    confidence: float | None = None
    source: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "evidence"}
        evidence = [each.to_json() for each in self.evidence]
        return fields | {"kind": str(self.kind), "evidence": evidence}


@dataclass(frozen=True, slots=True)
class Rule:
    """What made findings of one kind.

    Attributes:
        text: The rule.
        threshold: The score from which on it is a finding, in [0, 1].
        looked_at: How many images were.
    """

    text: str
    threshold: float
    looked_at: int


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Of one kind.

    Attributes:
        findings: In any order.
        rule: What made them findings; None where nothing could be said.
        scores: As `Audit.scores`.
        suspicious: As `Audit.suspicious`.
    """

    findings: list[Finding] = field(default_factory=list)
    rule: Rule | None = None
    scores: Float64[np.ndarray, "_"] | None = None
    suspicious: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Audit:
    """What `Engine.audit` answers.

    Attributes:
        findings: By kind, the surest first.
        rules: For every kind that was looked for.
        notes: What could not be done and why, what was left out, in sentences.
        exemplars: How many were looked at.
        seconds: What each part took.
        scores: What every exemplar was ranked by, in the order of the store's rows, NaN where nothing can be said: of
            labels and unsure images a probability, of foreign images their strangeness; of duplicates the score of
            each of `pairs`.
        pairs: Of exemplars that may be copies, findings or not; None where that was not looked for.
        suspicious: Of a kind of which there is no finding the likeliest, at most `SUSPICIOUS`, the likeliest first: no
            findings, since as many as likely would be there by chance.
    """

    findings: tuple[Finding, ...]
    rules: dict[Kind, Rule]
    notes: tuple[str, ...]
    exemplars: int
    seconds: dict[str, float] = field(default_factory=dict)
    scores: dict[Kind, Float64[np.ndarray, "_"]] = field(default_factory=dict, repr=False)
    pairs: Pairs | None = field(default=None, repr=False)
    suspicious: dict[Kind, tuple[Finding, ...]] = field(default_factory=dict, repr=False)

    def of(self, kind: Kind | str) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)


@dataclass(frozen=True, slots=True)
class Known:
    """Whether an image is in an index already.

    Attributes:
        image: Its name.
        there: Whether it is.
        score: How sure that is, in [0, 1].
        evidence: The nearest exemplars, the likeliest copy first.
    """

    image: str
    there: bool
    score: float
    evidence: tuple[Evidence, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        evidence = [each.to_json() for each in self.evidence]
        return {"image": self.image, "there": self.there, "score": self.score, "evidence": evidence}
