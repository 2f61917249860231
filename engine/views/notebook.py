"""Search results as they look in a notebook: the query, and its neighbours as pictures."""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ImageOps

from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.views.page import environment
from tmm_engine.views.showing import as_picture, by_query, meanings, png_bytes
from tmm_engine.views.tiles import CELL

MAX_HITS = 50
"""Neighbours of a result that are shown; the rest is counted."""
MAX_RESULTS = 20
"""Results of a list that are shown; the rest is counted."""


def notebook_html(results: Sequence[SearchResult | FailedQuery]) -> str:
    """HTML for the output of a notebook's cell: styles in the elements, for viewers that drop style sheets.

    Args:
        results: Any number; consecutive ones of the same query share a block. Images of 1 or 3 channels.
    """
    shown = results[:MAX_RESULTS]
    blocks = by_query(shown) if shown else []
    own = environment()
    own.filters["thumbnail"] = _thumbnail
    template = own.from_string(Path(__file__).with_name("notebook.html.j2").read_text(encoding="utf-8"))
    return template.render(blocks=blocks, meanings=meanings(blocks), left=len(results) - len(shown), max_hits=MAX_HITS)


def _thumbnail(image: UInt8[np.ndarray, "c h w"]) -> str:
    """A small image as it is, a large one reduced: a notebook is kept with its pictures."""
    picture = as_picture(image)
    if max(picture.size) > CELL:
        picture = ImageOps.contain(picture, (CELL, CELL))
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")
