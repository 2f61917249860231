"""Search results as a self-contained HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, StrictUndefined

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import visible
from tmm_engine.index.files import write_file
from tmm_engine.results import FailedQuery, Hit, SearchResult
from tmm_engine.views.reasons import reasons
from tmm_engine.views.showing import (
    agrees,
    as_picture,
    by_query,
    clip,
    confidence,
    facts,
    meanings,
    number,
    png_bytes,
    seconds,
    tmm_views,
)


@checked
def write_html(
    results: Sequence[SearchResult | FailedQuery],
    path: Path | str,
    *,
    title: str = "Nearest neighbours",
    index_name: str = "",
) -> None:
    """Write one HTML page that needs nothing else: no script, no network, images inline at their native size.

    Consecutive results of the same query share a card, one row per result. A query that could not be answered has a
    card that says why.

    Args:
        results: At least one; images of 1 or 3 channels.
        path: The file to write; replaced as a whole or not at all.
        title: The page's heading.
        index_name: What the index is called, shown beneath the heading.

    Raises:
        ImageError: An image has neither 1 nor 3 channels.
        InputError: There are no results, or the file cannot be written.
    """
    blocks = by_query(results)
    template = environment().from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        blocks=blocks,
        meanings=meanings(blocks),
        own_labels=any(not hit.label_is_class for block in blocks for result in block.results for hit in result.hits),
        exemplars=next((result.exemplars for block in blocks for result in block.results), None),
        title=title,
        index_name=index_name,
    )
    write_file(path, page.encode("utf-8", errors="backslashreplace"))  # file names may hold lone surrogates


def environment() -> Environment:
    """Templates of ours, with the filters that they use."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.filters |= {
        "clip": clip,
        "confidence": confidence,
        "data_uri": _data_uri,
        "facts": facts,
        "metadata": _metadata,
        "number": number,
        "reasons": reasons,
        "seconds": seconds,
        "tmm_views": tmm_views,
    }
    environment.tests["agreeing_with"] = agrees
    return environment


def _visible(value: object) -> object:
    """Texts with their control characters spelled out; what is HTML already was made of such."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _data_uri(image: UInt8[np.ndarray, "c h w"]) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(as_picture(image))).decode("ascii")


def _metadata(hit: Hit) -> str:
    return clip(" · ".join(f"{name}: {value}" for name, value in hit.metadata.items()))
