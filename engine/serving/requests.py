"""What comes in over the wire: held to these before anything is done, and shown in OpenAPI."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tmm_engine.auditing.findings import Kind
from tmm_engine.auditing.options import NEIGHBOURS, RATE
from tmm_engine.describing import DEFAULT_VIEWS
from tmm_engine.index.descriptors.views import MAX_VIEWS
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.factories import EXACT
from tmm_engine.options import OF_TMM, Mode, Prefilter, SearchOptions
from tmm_engine.rerank.settings import DEFAULT_PRESET, MIN_RECOGNITION, PRESETS, TmmConfig, preset
from tmm_engine.serving.settings import MAX_K

NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Of a collection that clients build."""

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNkEIQAJkGKGACW0QQ/5dbbJgAAAABJRU5ErkJggg=="
"""For examples: an image of 8 × 8 pixels."""


class Given(BaseModel):
    """What comes in: nothing that is not known, and no truth value where a number is meant."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_truth(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            kind = cls.model_fields[name].annotation if name in cls.model_fields else bool
            if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
                raise ValueError(f"{name}: expected no truth value, got {str(value).lower()}")
        return values


class Options(Given):
    """Of a search, as of `engine search`; what would have no effect is refused."""

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


class ImageQuery(Given):
    """An image."""

    image: Annotated[str, Field(description="An image file in base64, or a data: URL of one.", examples=[PICTURE])]
    name: Annotated[str | None, Field(description="How the answer refers to it.", max_length=1000)] = None


class ExemplarQuery(Given):
    """An exemplar of the collection."""

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

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": {"image": PICTURE}, "alpha": 0.1}]})


class ClassifyForm(ClassifyParameters, QueriesForm):
    """A classification as a form with files."""


class NewExemplar(Given):
    """An image that becomes an exemplar."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": PICTURE, "label": "cat"}]})

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

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "new.png", "image": PICTURE, "label": "cat"}]})

    id: Annotated[str, Field(min_length=1, max_length=1000)]


class NewExemplars(Given):
    """Images that become exemplars."""

    exemplars: Annotated[list[NamedExemplar], Field(min_length=1)]
    replace: Annotated[bool, Field(description="Those whose id is there take the old one's place.")] = False


class NewCollection(Given):
    """An index that is built, of images in the request or of those that the server has; as `engine build-index`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "summer", "like": "photos", "source": "2026/summer"},
                {"name": "two", "like": "photos", "exemplars": [{"id": "a.png", "image": PICTURE, "label": "cat"}]},
            ]
        },
    )

    name: Annotated[str, Field(description="Of the new collection.", pattern=f"^{NAME.pattern}$")]
    like: Annotated[str, Field(description="The collection whose classifier computes the features.")]
    exemplars: Annotated[
        list[NamedExemplar] | None, Field(description="Images in the request; or `source`.", min_length=1)
    ] = None
    source: Annotated[
        str | None,
        Field(
            description="A folder, a table, Parquet or tar shards among the server's sources; or `exemplars`.",
            min_length=1,
            max_length=1000,
        ),
    ] = None
    views: Annotated[
        int, Field(ge=0, le=MAX_VIEWS, description="Views that the descriptors of mode robust look at; 0: none.")
    ] = DEFAULT_VIEWS
    recogniser: Annotated[
        str | None, Field(description="The layer that recognises copies; by default what does best on a sample.")
    ] = None
    neighbours: Annotated[str, Field(description="FAISS factory string; Flat is exact.")] = EXACT


class AuditBody(Given):
    """What an audit looks for, as `engine audit`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kinds": ["duplicates", "labels"], "rate": 0.05}]})

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
