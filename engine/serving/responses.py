"""What goes out over the wire, for OpenAPI."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from tmm_engine.serving.jobs import JobState


class HitAnswer(BaseModel):
    """One exemplar that was found."""

    rank: int = Field(description="0 is the best.")
    id: str
    label: int = Field(description="Number of its label.")
    class_name: str = Field(description="The label's name; the predicted class's where it has none.")
    label_is_predicted: bool
    label_is_class: bool = Field(description="Whether the label is a class of the model's.")
    predicted_label: int
    predicted_class: str
    score: float = Field(description="Larger is better; `score_meaning` says what it is.")
    confidence: float | None
    metadata: dict[str, Any]
    image: "Pixels | None" = Field(default=None, description="With pixels=true.")


class Pixels(BaseModel):
    """An array (channels, height, width)."""

    dtype: Literal["uint8", "float32"]
    shape: list[int]
    data: str = Field(description="In base64, row by row, little-endian.")


class ExplanationAnswer(BaseModel):
    """Examples and counter-examples."""

    class_name: str
    unlike: list[HitAnswer]
    prototypes: list[HitAnswer]
    pulled_towards: list[HitAnswer]
    pulled_away: list[HitAnswer]
    notes: list[str]


class Pictures(BaseModel):
    """To look at, as data: URLs of PNG files."""

    query: str = Field(description="As the index sees it.")
    trigger: str | None = Field(default=None, description="tmm; mid-grey is zero.")
    triggered: str | None = Field(default=None, description="tmm.")


class ResultAnswer(BaseModel):
    """The answer to one query: what a line of `engine search --json` has, and what its numbers mean."""

    query: str
    mode: str
    hits: list[HitAnswer]
    predicted_label: int
    predicted_class: str
    true_label: int | None
    true_class: str | None
    scored: int
    exemplars: int
    config: dict[str, Any] | None
    backend: str
    timings: dict[str, float] = Field(description="Seconds by step.")
    notes: list[str]
    recognised_as: str | None = Field(description="Id of the exemplar that the query was taken for a copy of.")
    recognised_share: float | None
    put_first: bool = Field(
        description="Whether the first hit is so by what recognises copies, and has not the largest score."
    )
    explanation: ExplanationAnswer | None = None
    score_meaning: str
    confidence_meaning: str | None
    pictures: Pictures | None = None
    query_image: Pixels | None = None
    trigger: Pixels | None = None
    triggered_query: Pixels | None = None


class FailedAnswer(BaseModel):
    """In the place of an answer in a list: what is wrong with the query."""

    query: str
    error: str


class SearchAnswer(BaseModel):
    """Answers in the order of the queries: images first, in a form."""

    collection: str
    version: int = Field(description="Of the index that was searched.")
    results: list[ResultAnswer | FailedAnswer]


class CollectionSummary(BaseModel):
    """A collection in a list."""

    name: str
    version: int
    exemplars: int
    modes: list[str]


class CollectionsAnswer(BaseModel):
    """All collections."""

    collections: list[CollectionSummary]


class CollectionAnswer(CollectionSummary):
    """A collection."""

    changed: bool = Field(description="Whether the index on disk is newer than what is searched.")
    trouble: str | None = Field(description="Why the newest version could not be opened.")
    metadata: list[str] = Field(description="Columns that a filter may use beside id, label and predicted.")
    facts: dict[str, Any] = Field(description="What `engine info` says.")


class Usual(BaseModel):
    """Scores that are usual in one mode."""

    low: float = Field(description="A tenth of the pictures are less like the one nearest to them.")
    usual: float = Field(description="Half are.")
    high: float = Field(description="Nine tenths are.")
    any_two: float = Field(description="Half of all pairs are less alike.")


class LikenessAnswer(BaseModel):
    """What scores are usual among the exemplars, so that a score can be said in words."""

    sample: int = Field(description="How many exemplars were compared with all.")
    modes: dict[str, Usual] = Field(description="By mode; tmm has none.")


class ExemplarAnswer(BaseModel):
    """An exemplar."""

    id: str
    label: int
    class_name: str
    label_is_predicted: bool
    label_is_class: bool
    predicted_label: int
    predicted_class: str
    metadata: dict[str, Any]


class ExemplarsAnswer(BaseModel):
    """A part of the exemplars, in the order in which they are stored."""

    total: int = Field(description="How many match.")
    exemplars: list[ExemplarAnswer]


class ChangeAnswer(BaseModel):
    """What a change did."""

    version: int = Field(description="That there is now.")
    exemplars: int = Field(description="How many it holds.")
    added: int
    replaced: int
    deleted: int
    skipped: list[FailedAnswer] = Field(description="Images that could not be used, and why.")
    remarks: list[str]


class RefreshAnswer(CollectionSummary):
    """What is searched now."""

    refreshed: bool = Field(description="Whether there was a newer version.")


class CandidateAnswer(BaseModel):
    """A class that a query may have."""

    label: int
    class_name: str
    score: float
    p_value: float


class ClassificationAnswer(BaseModel):
    """The class of one query: what a line of `engine classify --json` has."""

    query: str
    mode: str
    label: int
    class_name: str
    credibility: float
    confidence: float
    candidates: list[CandidateAnswer]
    prediction_set: list[str]
    alpha: float
    familiarity: float
    outlier: bool
    abstains: str | None = Field(description="Why the class should not be relied upon.")
    predicted_class: str = Field(description="What the model itself says.")
    true_label: int | None
    true_class: str | None
    calibration: str
    guarantee: str
    notes: list[str]
    hits: list[HitAnswer]
    explanation: ExplanationAnswer | None = None
    search: ResultAnswer | None = Field(default=None, description="With pixels=true.")


class ClassifyAnswer(BaseModel):
    """Answers in the order of the queries: images first, in a form."""

    collection: str
    version: int
    notes: list[str] = Field(description="What is to be said of all of them together.")
    results: list[ClassificationAnswer | FailedAnswer]


class JobAnswer(BaseModel):
    """A job."""

    id: str
    kind: str
    collection: str
    state: str = Field(json_schema_extra={"enum": [*map(str, JobState)]})
    step: str = Field(description="What it is at.")
    done: int = Field(description="Of this step.")
    total: int
    created: float = Field(description="Seconds since 1970.")
    ended: float | None
    error: str | None = Field(description="Why it failed.")


class JobResultAnswer(JobAnswer):
    """A job with what came of it."""

    result: Any = Field(
        description="Once it is done: of an audit findings, rules and notes; of changes and builds what they did."
    )


class JobsAnswer(BaseModel):
    """All jobs."""

    jobs: list[JobAnswer]
