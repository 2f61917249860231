"""What a search is asked with: JSON, a form with files, or an image as the whole body; held to limits, then decoded."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from tmm_engine.engine import Engine
from tmm_engine.index.errors import ImageError
from tmm_engine.index.sources.images import pixels_of
from tmm_engine.query import Query, as_query
from tmm_engine.results import FailedQuery
from tmm_engine.serving.requests import (
    ClassifyBody,
    ClassifyForm,
    ClassifyParameters,
    ExemplarQuery,
    ImageQuery,
    Options,
    QueriesBody,
    QueriesForm,
    SearchBody,
    SearchForm,
    SearchParameters,
)
from tmm_engine.serving.settings import Limits

Model = TypeVar("Model", bound=BaseModel)
Parameters = TypeVar("Parameters", bound=Options)
RAW = re.compile(r"image/.+|application/octet-stream")
FORM = "multipart/form-data"
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
MAX_FIELD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """An image as it came, not decoded.

    Attributes:
        name: How answers refer to it.
        content: Of the file.
    """

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Named:
    """An exemplar, by its id."""

    id: str


@dataclass(frozen=True, slots=True)
class Asked(Generic[Parameters]):
    """What is asked for.

    Attributes:
        queries: At least one.
        parameters: How.
        single: Whether it is one query and no list.
    """

    queries: list[Upload | Named]
    parameters: Parameters
    single: bool


@dataclass(frozen=True, slots=True)
class Forms(Generic[Parameters]):
    """In which a request may come.

    Attributes:
        parameters: In its address.
        body: As JSON.
        form: With files.
    """

    parameters: type[Parameters]
    body: type[Parameters]
    form: type[Parameters]


SEARCH = Forms(SearchParameters, SearchBody, SearchForm)
CLASSIFY = Forms(ClassifyParameters, ClassifyBody, ClassifyForm)


def described(forms: Forms[Parameters]) -> dict[str, Any]:
    """For OpenAPI: what a request's address and body may be, which `read_queries` holds them to, and nothing before."""

    def schema(model: type[Options]) -> dict[str, Any]:
        return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}

    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {"application/json": schema(forms.body), FORM: schema(forms.form), "image/png": binary}
    own = forms.parameters.model_json_schema(ref_template="#/components/schemas/{model}")
    address = [
        {"name": name, "in": "query", "required": False, "schema": each}
        | ({"description": each["description"]} if "description" in each else {})
        for name, each in own["properties"].items()
    ]
    return {"parameters": address, "requestBody": {"required": True, "content": content}}


async def read_queries(request: Request, forms: Forms[Parameters], limits: Limits) -> Asked[Parameters]:
    """Whatever form they come in.

    Args:
        request: Its address has parameters too; those in its body win.
        forms: What they are checked with.
        limits: Of images.

    Raises:
        HTTPException: another kind of body, or too many images.
        RequestValidationError: not what the schema says.
    """
    kind = kind_of(request)
    address = _several(request.query_params.multi_items(), forms.parameters)
    if kind == "application/json":
        body = valid(forms.body, address | json_object(await request.body()))
        assert isinstance(body, QueriesBody)
        items = body.query if isinstance(body.query, list) else [body.query]
        asked = Asked([_of_json(each, position) for position, each in enumerate(items)], body, items is not body.query)
    elif kind == FORM:
        asked = await _of_form(request, forms.form, address, limits)
    elif RAW.fullmatch(kind):
        asked = Asked([Upload("query 0", await request.body())], valid(forms.parameters, address), single=True)
    else:
        raise HTTPException(
            415, f"expected a body of application/json, {FORM}, or image/…, got {kind or 'no content-type'!r}"
        )
    if not 0 < len(asked.queries) <= limits.images:
        few = "an image or the id of an exemplar, got none"
        many = f"at most {limits.images} queries in a request, got {len(asked.queries)}; ask in several"
        raise HTTPException(422 if not asked.queries else 413, f"expected {many if asked.queries else few}")
    return asked


def kind_of(request: Request) -> str:
    """Of its body, without parameters; empty where it does not say."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def decoded(asked: Sequence[Upload | Named], engine: Engine, limits: Limits) -> list[Query | FailedQuery]:
    """The queries, or what is wrong with them.

    Args:
        asked: What came.
        engine: Whose exemplars are meant, and for whose classifier images are brought into shape.
        limits: Of pixels, before they are decoded.

    Raises:
        InputError: no exemplar has such an id.
        HTTPException: they are too large together.
    """
    check_together([item.content for item in asked if isinstance(item, Upload)], limits)
    found: list[Query | FailedQuery] = []
    for item in asked:
        if isinstance(item, Named):
            found.append(engine.exemplar(item.id))
            continue
        try:
            target = engine.classifier.target
            found.append(as_query(item.content, shape=target, name=item.name, max_pixels=limits.pixels))
        except ImageError as error:
            found.append(FailedQuery(item.name, str(error)))
    return found


def check_together(images: Sequence[bytes], limits: Limits) -> None:
    """Refuse image files that are too large together; one that is unreadable or too large alone is not counted.

    Args:
        images: Files' contents, not decoded.
        limits: Of pixels.

    Raises:
        HTTPException: 413.
    """
    if len(images) * limits.pixels <= limits.pixels_together:
        return
    total = 0
    for image in images:
        with suppress(ImageError):
            total += pixels_of(image, max_pixels=limits.pixels)
    if total > limits.pixels_together:
        raise HTTPException(
            413,
            f"expected images of at most {limits.pixels_together:,} pixels together, got {total:,}; send them in "
            f"several requests",
        )


async def _of_form(
    request: Request, model: type[Parameters], address: dict[str, Any], limits: Limits
) -> Asked[Parameters]:
    async with request.form(
        max_files=limits.images + 1, max_fields=limits.images + 100, max_part_size=MAX_FIELD_BYTES
    ) as form:
        items = form.multi_items()
        fields = [(name, value) for name, value in items if isinstance(value, str)]
        files = [(name, value) for name, value in items if isinstance(value, UploadFile)]
        uploads = [
            (name, Upload(file.filename or f"query {place}", await file.read()))
            for place, (name, file) in enumerate(files)
        ]
    named: dict[str, Any] = {}
    for name, upload in uploads:
        named.setdefault(name, []).append(upload.content)
    body = valid(model, address | _several(fields, model) | named)
    assert isinstance(body, QueriesForm)
    queries = [*(upload for _, upload in uploads), *map(Named, body.id)]
    return Asked(queries, body, single=len(queries) == 1)


def _of_json(query: ImageQuery | ExemplarQuery, position: int) -> Upload | Named:
    if isinstance(query, ExemplarQuery):
        return Named(query.id)
    name = query.name or f"query {position}"
    return Upload(name, from_base64(query.image, name))


def from_base64(text: str, name: str) -> bytes:
    """An image file's content.

    Args:
        text: In base64, or a data: URL.
        name: Of the image, for the error.

    Raises:
        HTTPException: other text.
    """
    try:
        return base64.b64decode(DATA_URL.sub("", text, count=1), validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(422, f"{name}: expected an image file in base64, got other text") from None


async def json_of(request: Request) -> dict[str, Any]:
    """The object that the body of a request is.

    Raises:
        HTTPException: it is none.
    """
    kind = kind_of(request)
    if kind != "application/json":
        raise HTTPException(415, f"expected a body of application/json, got {kind or 'no content-type'!r}")
    return json_object(await request.body())


def json_object(body: bytes) -> dict[str, Any]:
    """What a body of JSON says.

    Raises:
        HTTPException: it is none, or no object.
    """
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"expected JSON, got something else: {error}") from None
    if not isinstance(found, dict):
        raise HTTPException(422, f"expected an object of JSON, got {type(found).__name__}")
    return found


def _several(pairs: Sequence[tuple[str, Any]], model: type[BaseModel]) -> dict[str, Any]:
    """Values by name, of which those that a model takes several of are lists."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        field = model.model_fields.get(name)
        if field is not None and isinstance(field.default, list):
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found


def valid(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Values as a model has them.

    Raises:
        RequestValidationError: they are others.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
