"""Search results as one PNG sheet, made of tiles."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image, ImageFont, ImageOps

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError
from tmm_engine.index.files import write_file
from tmm_engine.results import FailedQuery, Hit, SearchResult
from tmm_engine.views.showing import (
    Block,
    agrees,
    by_query,
    confidence,
    facts,
    meanings,
    number,
    png_bytes,
    tmm_views,
)
from tmm_engine.views.tiles import (
    BODY,
    CELL,
    FAINT,
    GAP,
    HEADING,
    OTHER,
    PAPER,
    RULE,
    SMALL,
    TILE,
    TINY,
    below,
    beside,
    drawable,
    enlarged,
    framed,
    text_block,
    text_line,
)

MAX_SHEET_PIXELS = 80_000_000
"""Larger PNG sheets are refused: most viewers, Pillow included, balk at them."""

_LEAST_COLUMNS = 4  # a sheet of one neighbour still has room for its texts
_LEGEND = (
    "solid, check mark: the query’s class  ·  dashed, cross: another class  ·  (p): predicted, not given",
    "The query’s class is its true label where known, else the model’s prediction. Larger scores are nearer; compare "
    "them within a row only.",
)


@checked
def write_png(results: Sequence[SearchResult | FailedQuery], path: Path | str, *, columns: int = 10) -> None:
    """Write one picture: a block per query, a row per result, neighbours enlarged and framed by agreement.

    A query that could not be answered has a block that says why. The font is Pillow's own: accents are dropped, and
    scripts other than Latin show as boxes.

    Args:
        results: At least one; images of 1 or 3 channels. Consecutive ones of the same query share a block.
        path: The file to write; replaced as a whole or not at all.
        columns: Neighbours per line, at least 1; more neighbours wrap.

    Raises:
        ImageError: An image has neither 1 nor 3 channels.
        InputError: There are no results, ``columns`` is below 1, the sheet would be larger than
            ``MAX_SHEET_PIXELS``, or the file cannot be written.
    """
    write_file(path, png_bytes(draw_sheet(results, columns=columns)))


def draw_sheet(results: Sequence[SearchResult | FailedQuery], *, columns: int = 10) -> Image.Image:
    """The picture that `write_png` writes; raises as it does."""
    blocks = by_query(results)
    if columns < 1:
        raise InputError(f"expected at least 1 column, got {columns}")
    return _sheet(blocks, columns=columns)


def _sheet(blocks: list[Block], *, columns: int) -> Image.Image:
    longest = max((len(result.hits) for block in blocks for result in block.results), default=0)
    width = (TILE + GAP) * (1 + max(min(columns, longest), _LEAST_COLUMNS))
    tiles = []
    if explained := meanings(blocks):
        phrases = [f"{mode} · {phrase}" for mode, found in explained.items() for phrase in found]
        tiles.append(below([text_block(line, width=width, size=SMALL) for line in (*_LEGEND, *phrases)], gap=2))
    for block in blocks:
        tiles += [Image.new("RGB", (width, 2), RULE), _block(block, columns=columns, width=width)]
        if (pixels := width * sum(tile.height for tile in tiles)) > MAX_SHEET_PIXELS:
            raise InputError(
                f"expected a sheet of at most {MAX_SHEET_PIXELS:,} pixels, got {pixels:,} or more "
                "(pass fewer results, or write an HTML page instead)"
            )
    return ImageOps.expand(below(tiles, gap=GAP + GAP // 2), border=2 * GAP, fill=PAPER)


def _block(block: Block, *, columns: int, width: int) -> Image.Image:
    tiles = [text_line(block.query, width=width, size=HEADING)]
    tiles += [text_block(failure, width=width, size=BODY, colour=OTHER) for failure in block.failures]
    if block.results:
        query = block.results[0]
        classes = f"predicted: {query.predicted_class}"
        if query.true_class is not None:
            classes += f"  ·  true: {query.true_class}"
        rows = [_row(result, block, columns=columns, width=width - TILE - 2 * GAP) for result in block.results]
        tiles.append(text_line(classes, width=width, size=BODY, colour=FAINT))
        tiles.append(beside([_query_column(block.results), below(rows, gap=2 * GAP)], gap=2 * GAP))
    return below(tiles, gap=GAP // 2)


def _query_column(results: Sequence[SearchResult]) -> Image.Image:
    """The query and, at half its size, what each TMM result triggered it with."""
    tiles = [text_line("query", width=TILE, size=BODY), enlarged(results[0].query_image, side=CELL)]
    label = partial(text_line, width=CELL // 2, size=TINY, colour=FAINT)
    for views in filter(None, map(tmm_views, results)):
        pair = [
            below([enlarged(image, side=CELL // 2), *map(label, caption.split())], gap=2) for caption, image in views
        ]
        tiles.append(beside(pair, gap=GAP))
    return below(tiles, gap=GAP // 2)


def _row(result: SearchResult, block: Block, *, columns: int, width: int) -> Image.Image:
    """One mode's heading and notes, then its neighbours in lines of ``columns``."""
    mode = text_line(result.mode, width=width, size=BODY)
    indent = round(ImageFont.load_default(BODY).getlength(drawable(result.mode))) + GAP
    if indent < width:
        mode.paste(text_line(facts(result, block), width=width - indent, size=SMALL, colour=FAINT), (indent, 1))
    notes = [text_block(note, width=width, size=SMALL) for note in result.notes]
    hits = [_hit(hit, result) for hit in result.hits]
    lines = [beside(hits[start : start + columns], gap=GAP) for start in range(0, len(hits), columns)]
    return below([mode, *notes, *lines], gap=GAP // 2)


def _hit(hit: Hit, result: SearchResult) -> Image.Image:
    score = number(hit.score)
    if hit.confidence is not None:
        score += f"  ·  {result.confidence_word} {confidence(hit.confidence)}"
    name = f"(p) {hit.class_name}" if hit.label_is_predicted else hit.class_name
    texts = [text_line(name, width=TILE, size=BODY), text_line(score, width=TILE, size=SMALL, colour=FAINT)]
    if hit.predicted_class != hit.class_name:
        texts.insert(1, text_line(f"predicted {hit.predicted_class}", width=TILE, size=SMALL, colour=FAINT))
    return below([framed(enlarged(hit.image, side=CELL), same=agrees(hit, result)), *texts], gap=2)
