"""What goes over the wire, for OpenAPI and for checking what comes in."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tmm_engine.auditing.findings import Kind
from tmm_engine.auditing.options import NEIGHBOURS, RATE
from tmm_engine.index.errors import InputError
from tmm_engine.options import OF_TMM, Mode, Prefilter, SearchOptions
from tmm_engine.rerank.settings import DEFAULT_PRESET, MIN_RECOGNITION, PRESETS, TmmConfig, preset
from tmm_engine.serving.jobs import JobState
from tmm_engine.serving.settings import MAX_K

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNkEIQAJkGKGACW0QQ/5dbbJgAAAABJRU5ErkJggg=="
"""For examples: an image of 8 × 8 pixels."""


class Options(BaseModel):
    """Of a search, as of `engine search`; what would have no effect is refused."""

    model_config = ConfigDict(extra="forbid")

    mode: Annotated[
        str | None,
        Field(
            description="robust, tmm, l2 or cosine. By default robust, or tmm where an option of tmm is given.",
            json_schema_extra={"enum": [*map(str, Mode), None]},
        ),
    ] = None
    k: Annotated[int, Field(ge=1, le=MAX_K, description="How many exemplars to return.")] = 10
    where: Annotated[
        str | None,
        Field(
            description="SQL over id, label, predicted and metadata.", examples=["label = 'cat' AND predicted = 'dog'"]
        ),
    ] = None
    candidates: Annotated[int | None, Field(ge=1, description="tmm: score only so many.")] = None
    prefilter: Annotated[
        str | None,
        Field(
            description="tmm: what chooses the candidates. By default union.",
            json_schema_extra={"enum": [*map(str, Prefilter), None]},
        ),
    ] = None
    preset: Annotated[
        str | None,
        Field(description="tmm: by default paper.", json_schema_extra={"enum": [*PRESETS, None]}),
    ] = None
    settings: Annotated[
        list[str],
        Field(description="tmm: NAME=VALUE each, as of --set.", examples=[["blend=added"]], max_length=64),
    ] = []
    label: Annotated[
        int | None, Field(description="tmm: y_q, a class by number; by default the model's prediction.")
    ] = None
    together: Annotated[bool, Field(description="tmm: optimise the triggers of a list jointly.")] = False
    stretch: Annotated[bool | None, Field(description="Stretch the queries' contrast first.")] = None
    recognition: Annotated[
        Annotated[float, Field(ge=MIN_RECOGNITION, le=1)] | Literal["off"] | None,
        Field(description="The ratio below which a query is answered for as its nearest exemplar, or off."),
    ] = None
    explain: Annotated[bool, Field(description="Say why, by examples and counter-examples.")] = False
    alone: Annotated[
        bool, Field(description="Pass each query of a list alone: bit for bit the answer that it has without others.")
    ] = False

    def asked(self) -> SearchOptions:
        """As the engine takes them.

        Raises:
            InputError: as `SearchOptions`.
        """
        own = {name: getattr(self, name) for name in ("k", "where", "stretch", "explain", "alone")}
        tmm = {name: getattr(self, name) for name in OF_TMM if name != "config"}
        for name in ("preset", "settings"):
            if getattr(self, name) and self.mode not in (None, Mode.TMM):
                raise InputError(f"{name} has no effect with mode {self.mode}: it is an option of tmm")
        recognition = False if self.recognition == "off" else self.recognition
        return SearchOptions(mode=self.mode, recognition=recognition, config=self._config(), **own, **tmm)

    def _config(self) -> TmmConfig | None:
        if self.preset is None and not self.settings:
            return None
        return preset(self.preset or DEFAULT_PRESET).with_settings(self.settings)


class SearchParameters(Options):
    """Of a search over HTTP; those in the body of the request win over those in its address."""

    pictures: Annotated[
        bool, Field(description="Add what was searched with, trigger and triggered image as data: URLs to look at.")
    ] = False
    pixels: Annotated[bool, Field(description="Add the pixels of query and hits, and the trigger, as arrays.")] = False
    darken: Annotated[
        float, Field(ge=0, le=1, description="Search with less light, to see what holds: the share that is taken away.")
    ] = 0.0
    blur: Annotated[
        float, Field(ge=0, le=0.5, description="Blurred: σ of a Gaussian, as a share of the picture's shorter side.")
    ] = 0.0
    noise: Annotated[float, Field(ge=0, le=1, description="With noise: σ, where black is 0 and white is 1.")] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="Of the noise.")] = 0


class ClassifyParameters(Options):
    """Of a classification over HTTP; those in the body of the request win over those in its address."""

    alpha: Annotated[float, Field(ge=1e-6, lt=1, description="How often a set may miss the right class.")] = 0.05
    outliers: Annotated[
        float, Field(ge=0, lt=1, description="What share of calibration images may be as far from everything.")
    ] = 0.01
    calibration: Annotated[
        str | None, Field(description="One that the index keeps, or leave-one-out; by default the mode's.")
    ] = None
    pixels: Annotated[bool, Field(description="Add the search that it comes from, with all arrays.")] = False


class ImageQuery(BaseModel):
    """An image."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[str, Field(description="An image file in base64, or a data: URL of one.", examples=[PICTURE])]
    name: Annotated[str | None, Field(description="How the answer refers to it.", max_length=1000)] = None


class ExemplarQuery(BaseModel):
    """An exemplar of the collection."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(description="Its id.", examples=["cat/001.png"])]


AnyQuery = ImageQuery | ExemplarQuery


class QueriesBody(BaseModel):
    """Queries as JSON."""

    query: Annotated[AnyQuery | list[AnyQuery], Field(description="One, or a list.")]


class QueriesForm(BaseModel):
    """Queries in a form."""

    image: Annotated[
        list[Annotated[bytes, Field(json_schema_extra={"format": "binary"})]],
        Field(description="Image files; repeatable."),
    ] = []
    id: Annotated[list[str], Field(description="Exemplars of the collection; repeatable.")] = []


class SearchBody(SearchParameters, QueriesBody):
    """A search as JSON."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"query": {"image": PICTURE}, "k": 5},
                {"query": [{"id": "cat/001.png"}, {"image": PICTURE}], "mode": "cosine", "where": "label = 'cat'"},
            ]
        },
    )


class SearchForm(SearchParameters, QueriesForm):
    """A search as a form with files."""


class ClassifyBody(ClassifyParameters, QueriesBody):
    """A classification as JSON."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"query": {"image": PICTURE}, "alpha": 0.1}]}
    )


class ClassifyForm(ClassifyParameters, QueriesForm):
    """A classification as a form with files."""


class NewExemplar(BaseModel):
    """An image that becomes an exemplar."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"image": PICTURE, "label": "cat"}]})

    image: Annotated[str, Field(description="An image file in base64, or a data: URL of one.")]
    label: Annotated[str | None, Field(description="Its label's name; without one the predicted class stands in.")] = (
        None
    )
    metadata: Annotated[
        dict[str, str | int | float | bool | None],
        Field(description="Of the collection's columns; those that are left out stay empty."),
    ] = {}


class NamedExemplar(NewExemplar):
    """One of many."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"id": "new.png", "image": PICTURE, "label": "cat"}]}
    )

    id: Annotated[str, Field(min_length=1, max_length=1000)]


class NewExemplars(BaseModel):
    """Images that become exemplars."""

    model_config = ConfigDict(extra="forbid")

    exemplars: Annotated[list[NamedExemplar], Field(min_length=1)]
    replace: Annotated[bool, Field(description="Those whose id is there take the old one's place.")] = False


class AuditBody(BaseModel):
    """What an audit looks for, as `engine audit`."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"kinds": ["duplicates", "labels"], "rate": 0.05}]}
    )

    kinds: Annotated[
        list[str],
        Field(
            description="By default everything.",
            min_length=1,
            json_schema_extra={"items": {"type": "string", "enum": [*map(str, Kind)]}},
        ),
    ] = [*map(str, Kind)]
    k: Annotated[int, Field(ge=1, le=MAX_K, description="Neighbours that have a vote.")] = NEIGHBOURS
    rate: Annotated[float, Field(gt=0, lt=1, description="Of false findings that is accepted.")] = RATE
    against: Annotated[str | None, Field(description="A collection to look for leaks from.")] = None
    sources: Annotated[
        str | None, Field(description="A column of metadata: no image should be under two of its values.")
    ] = None
    where: Annotated[str | None, Field(description="Only exemplars that match, as of a search.")] = None


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

    result: Any = Field(description="Once it is done: of an audit findings, rules and notes; of changes what they did.")


class JobsAnswer(BaseModel):
    """All jobs."""

    jobs: list[JobAnswer]
