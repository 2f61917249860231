"""Results as they go over the wire, and pixels as they come back."""

import base64
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from pydantic_core import to_json

from tmm_engine.classifying.classification import Candidate, Classification
from tmm_engine.results import Explanation, FailedQuery, Hit, SearchResult
from tmm_engine.views.showing import as_picture, png_bytes, tmm_views

KINDS = ("unlike", "prototypes", "pulled_towards", "pulled_away")
DTYPES = ("uint8", "float32")


def as_json(content: Any) -> bytes:
    """As a document of JSON, where numbers that are not finite are null."""
    return to_json(content, inf_nan_mode="null")


def told(result: SearchResult | FailedQuery, *, pictures: bool = False, pixels: bool = False) -> dict[str, Any]:
    """An answer as plain values.

    Args:
        result: The answer.
        pictures: With what was searched with, to look at.
        pixels: With all arrays.
    """
    if isinstance(result, FailedQuery):
        return result.to_json()
    found = result.to_json()
    found |= {"score_meaning": result.score_meaning, "confidence_meaning": result.confidence_meaning}
    if pictures:
        found["pictures"] = _pictures(result)
    if pixels:
        for name in ("query_image", "trigger", "triggered_query"):
            if (array := getattr(result, name)) is not None:
                found[name] = encoded(array)
        _add_images(found["hits"], result.hits)
        for kind in KINDS if result.explanation else ():
            _add_images(found["explanation"][kind], getattr(result.explanation, kind))
    return found


def result_of(found: dict[str, Any]) -> SearchResult | FailedQuery:
    """The inverse of `told` with pixels."""
    if "error" in found:
        return FailedQuery(**found)
    own = {each.name: found[each.name] for each in fields(SearchResult) if each.name in found}
    for name in ("query_image", "trigger", "triggered_query"):
        if own.get(name) is not None:
            own[name] = decoded(own[name])
    if "explanation" in own:
        explained = own["explanation"]
        hits = {kind: _hits_of(explained[kind]) for kind in KINDS}
        own["explanation"] = Explanation(explained["class_name"], **hits, notes=tuple(explained["notes"]))
    return SearchResult(**own | {"hits": _hits_of(own["hits"]), "notes": tuple(own["notes"])})


def classified(answer: Classification | FailedQuery, *, pixels: bool = False) -> dict[str, Any]:
    """A classification as plain values; with all pixels, its neighbours as the search that they are from."""
    found = answer.to_json()
    if pixels and isinstance(answer, Classification):
        found["search"] = told(answer.search, pixels=True)
    return found


def classification_of(found: dict[str, Any]) -> Classification:
    """The inverse of `classified` with pixels."""
    search = result_of(found["search"])
    assert isinstance(search, SearchResult)
    own = {each.name: found[each.name] for each in fields(Classification) if each.name != "search"}
    for name in ("prediction_set", "notes"):
        own[name] = tuple(own[name])
    candidates = tuple(Candidate(**each) for each in own["candidates"])
    return Classification(**own | {"candidates": candidates}, search=search)


def encoded(array: np.ndarray) -> dict[str, Any]:
    """Pixels in base64; `decoded` is the inverse."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(plain.tobytes()).decode()}


def decoded(pixels: dict[str, Any]) -> np.ndarray:
    """The inverse of `encoded`.

    Raises:
        ValueError: it is none.
    """
    if pixels["dtype"] not in DTYPES:
        raise ValueError(f"expected pixels of {' or '.join(DTYPES)}, got {pixels['dtype']!r}")
    dtype = np.dtype(pixels["dtype"])
    content = np.frombuffer(base64.b64decode(pixels["data"]), dtype.newbyteorder("<"))
    return content.astype(dtype).reshape(pixels["shape"])


def _add_images(told_hits: list[dict[str, Any]], hits: Sequence[Hit]) -> None:
    for hit, own in zip(told_hits, hits, strict=True):
        hit["image"] = encoded(own.image)


def _hits_of(found: list[dict[str, Any]]) -> tuple[Hit, ...]:
    return tuple(Hit(**each | {"image": decoded(each["image"])}) for each in found)


def _pictures(result: SearchResult) -> dict[str, str]:
    views = [image for _, image in tmm_views(result)]
    named = zip(("query", "trigger", "triggered"), (result.query_image, *views), strict=False)
    return {name: _data_url(image) for name, image in named}


def _data_url(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(as_picture(image))).decode()
