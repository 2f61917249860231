"""What page and picture both show, and how: grouped by query, texts cut, numbers rounded, files replaced whole."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.results import FailedQuery, Hit, SearchResult

MAX_TEXT = 300
"""Characters of any one text (id, class name, metadata …) that is shown; the rest is an ellipsis."""


@dataclass(frozen=True, slots=True)
class Block:
    """What is shown of one query.

    Attributes:
        query: Its name.
        results: Its answers.
        errors: Why it could not be answered, each once.
    """

    query: str
    results: list[SearchResult]
    errors: list[str]

    @property
    def failures(self) -> list[str]:
        """The errors as sentences."""
        what = "Not answered in every mode" if self.results else "Cannot be answered"
        return [f"{what}: {error}" for error in self.errors]


def by_query(results: Sequence[SearchResult | FailedQuery]) -> list[Block]:
    """Consecutive results of the same query together.

    Raises:
        InputError: There are no results.
    """
    if len(results) == 0:
        raise InputError("expected at least one search result to report, got none")
    blocks = []
    for query, group in groupby(results, key=lambda result: result.query):
        block = Block(query, [], [])
        for result in group:
            if isinstance(result, SearchResult):
                block.results.append(result)
            elif result.error not in block.errors:
                block.errors.append(result.error)
        blocks.append(block)
    return blocks


def meanings(blocks: Sequence[Block]) -> dict[str, list[str]]:
    """For each mode, in phrases, what its scores and confidences are; all that they are, where settings differ."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    for result in (result for block in blocks for result in block.results):
        both = result.score_meaning, result.confidence_meaning
        if both not in found.setdefault(result.mode, []):
            found[result.mode].append(both)
    return {
        mode: [
            phrase
            for number, (score, confidence) in enumerate(alternatives)
            for phrase in (f"{'or, by a row’s own settings, ' if number else ''}score: {score}", confidence)
            if phrase is not None
        ]
        for mode, alternatives in found.items()
    }


def facts(result: SearchResult, block: Block) -> str:
    """A row's heading: how many agree, what it took, and what is not in the query's heading or in a note."""
    count = f"{sum(agrees(hit, result) for hit in result.hits)} of {len(result.hits)} in"
    unknown = result.true_class is not None and result.true_label is None
    parts = [f"{count} the class predicted for it" if unknown else f"{count} the query’s class"]
    if result.predicted_label != block.results[0].predicted_label:  # a row may have stretched the query, or not
        predicted = f"here predicted {clip(result.predicted_class)}"
        parts = [predicted, f"{count} that class"] if result.true_class is None else [predicted, *parts]
    parts += [f"{result.scored:,} of {result.exemplars:,} scored", seconds(result.seconds)]
    recognised = f"recognised as {result.recognised_as}"
    if result.recognised_as is not None and not any(note.startswith(recognised) for note in result.notes):
        parts.append(clip(recognised))
    return " · ".join(parts)


def agrees(hit: Hit, result: SearchResult) -> bool:
    """Whether the neighbour has the query's true label or, where that is none of the index's, the predicted class.

    A label that is no class of the model's is compared with no class: the neighbour's predicted one is.
    """
    if result.true_label is not None:
        return hit.label == result.true_label
    return (hit.label if hit.label_is_class else hit.predicted_label) == result.predicted_label


def clip(value: object) -> str:
    """As text of at most `MAX_TEXT` characters."""
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def number(value: float) -> str:
    """Four significant digits, trailing zeros kept, so that scores line up."""
    return f"{value:#.4g}".rstrip(".")


def confidence(value: float) -> str:
    """Of [0, 1], two places; what would round to 0 is told from 0."""
    return f"{value:.2f}" if value == 0 or value >= 0.005 else "<0.01"


def seconds(value: float) -> str:
    """With its unit."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def tmm_views(result: SearchResult) -> list[tuple[str, UInt8[np.ndarray, "c h w"]]]:
    """Caption and pixels of the trigger and of the triggered query; nothing in other modes.

    The trigger's colours are symmetric: -max|τ| is 0, zero is mid-grey, max|τ| is 255.
    """
    views = []
    if result.trigger is not None:
        reach = float(np.abs(result.trigger).max())
        unit = result.trigger.astype(np.float64) / (reach or 1.0)
        views.append((f"trigger ±{reach:.2g}", np.rint(127.5 + 127.5 * unit).astype(np.uint8)))
    if result.triggered_query is not None:
        views.append(("triggered", np.rint(result.triggered_query.clip(0, 1) * 255).astype(np.uint8)))
    return views


def as_picture(image: UInt8[np.ndarray, "c h w"]) -> Image.Image:
    """Grey or RGB.

    Raises:
        ImageError: The image has neither 1 nor 3 channels.
    """
    if image.shape[0] not in (1, 3):
        raise ImageError(f"expected an image of 1 or 3 channels, got {image.shape[0]} (pick or merge channels first)")
    return Image.fromarray(image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def png_bytes(picture: Image.Image) -> bytes:
    """As the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
