"""Results as they go over the wire, and pixels as they come back."""

import base64
from typing import Any

import numpy as np
from pydantic_core import to_json

from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.views.showing import as_picture, png_bytes, tmm_views

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
        for hit, own in zip(found["hits"], result.hits, strict=True):
            hit["image"] = encoded(own.image)
    return found


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


def _pictures(result: SearchResult) -> dict[str, str]:
    views = [image for _, image in tmm_views(result)]
    named = zip(("query", "trigger", "triggered"), (result.query_image, *views), strict=False)
    return {name: _data_url(image) for name, image in named}


def _data_url(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(as_picture(image))).decode()
