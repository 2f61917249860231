"""Search results as one PNG sheet.

Every function returns a tile; larger tiles are smaller ones beside or below each other.
"""

import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tmm_engine.index.errors import InputError
from tmm_engine.results import FailedQuery, Hit, SearchResult
from tmm_engine.views.showing import (
    Block,
    agrees,
    as_picture,
    by_query,
    clip,
    confidence,
    facts,
    meanings,
    number,
    png_bytes,
    tmm_views,
    write_file,
)

CELL = 128
"""Side in pixels that a picture in the PNG sheet is enlarged to at most; its frame comes on top."""

MAX_SHEET_PIXELS = 80_000_000
"""Larger PNG sheets are refused: most viewers, Pillow included, balk at them."""

_PAPER, _INK, _FAINT, _LINE = "#ffffff", "#16181d", "#667085", "#dfe2e8"
_SAME, _OTHER = "#1a7f4b", "#c4342d"
_TINY, _SMALL, _BODY, _HEADING = 12, 14, 16, 24  # font sizes
_GAP = 12
_MARGIN, _STROKE = 9, 4  # around a neighbour: the frame and the white between
_TILE = CELL + 2 * _MARGIN
_DRAWN_AS = str.maketrans({"×": "x", "−": "-", "–": "-", "—": "-", "ß": "ss"})  # the font has boxes for them
_LEAST_COLUMNS = 4  # a sheet of one neighbour still has room for its texts
_LEGEND = (
    "solid, check mark: the query’s class  ·  dashed, cross: another class  ·  (p): predicted, not given",
    "The query’s class is its true label where known, else the model’s prediction. Larger scores are nearer; compare "
    "them within a row only.",
)


def write_png(results: Sequence[SearchResult | FailedQuery], path: Path, *, columns: int = 10) -> None:
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
    blocks = by_query(results)
    if columns < 1:
        raise InputError(f"expected at least 1 column, got {columns}")
    write_file(path, png_bytes(_sheet(blocks, columns=columns)))


def _sheet(blocks: list[Block], *, columns: int) -> Image.Image:
    longest = max((len(result.hits) for block in blocks for result in block.results), default=0)
    width = (_TILE + _GAP) * (1 + max(min(columns, longest), _LEAST_COLUMNS))
    tiles = []
    if explained := meanings(blocks):
        phrases = [f"{mode} · {phrase}" for mode, found in explained.items() for phrase in found]
        tiles.append(_below([_text(line, width=width, size=_SMALL) for line in (*_LEGEND, *phrases)], gap=2))
    for block in blocks:
        tiles += [Image.new("RGB", (width, 2), _LINE), _block(block, columns=columns, width=width)]
        if (pixels := width * sum(tile.height for tile in tiles)) > MAX_SHEET_PIXELS:
            raise InputError(
                f"expected a sheet of at most {MAX_SHEET_PIXELS:,} pixels, got {pixels:,} or more "
                "(pass fewer results, or write an HTML page instead)"
            )
    return ImageOps.expand(_below(tiles, gap=_GAP + _GAP // 2), border=2 * _GAP, fill=_PAPER)


def _block(block: Block, *, columns: int, width: int) -> Image.Image:
    tiles = [_line(block.query, width=width, size=_HEADING)]
    tiles += [_text(failure, width=width, size=_BODY, colour=_OTHER) for failure in block.failures]
    if block.results:
        query = block.results[0]
        classes = f"predicted: {query.predicted_class}"
        if query.true_class is not None:
            classes += f"  ·  true: {query.true_class}"
        rows = [_row(result, block, columns=columns, width=width - _TILE - 2 * _GAP) for result in block.results]
        tiles.append(_line(classes, width=width, size=_BODY, colour=_FAINT))
        tiles.append(_beside([_query_column(block.results), _below(rows, gap=2 * _GAP)], gap=2 * _GAP))
    return _below(tiles, gap=_GAP // 2)


def _query_column(results: Sequence[SearchResult]) -> Image.Image:
    """The query and, at half its size, what each TMM result triggered it with."""
    tiles = [_line("query", width=_TILE, size=_BODY), _enlarged(results[0].query_image, side=CELL)]
    label = partial(_line, width=CELL // 2, size=_TINY, colour=_FAINT)
    for views in filter(None, map(tmm_views, results)):
        pair = [
            _below([_enlarged(image, side=CELL // 2), *map(label, caption.split())], gap=2) for caption, image in views
        ]
        tiles.append(_beside(pair, gap=_GAP))
    return _below(tiles, gap=_GAP // 2)


def _row(result: SearchResult, block: Block, *, columns: int, width: int) -> Image.Image:
    """One mode's heading and notes, then its neighbours in lines of ``columns``."""
    mode = _line(result.mode, width=width, size=_BODY)
    indent = round(ImageFont.load_default(_BODY).getlength(_plain(result.mode))) + _GAP
    if indent < width:
        mode.paste(_line(facts(result, block), width=width - indent, size=_SMALL, colour=_FAINT), (indent, 1))
    notes = [_text(note, width=width, size=_SMALL) for note in result.notes]
    hits = [_hit(hit, result) for hit in result.hits]
    lines = [_beside(hits[start : start + columns], gap=_GAP) for start in range(0, len(hits), columns)]
    return _below([mode, *notes, *lines], gap=_GAP // 2)


def _hit(hit: Hit, result: SearchResult) -> Image.Image:
    score = number(hit.score)
    if hit.confidence is not None:
        score += f"  ·  {result.confidence_word} {confidence(hit.confidence)}"
    name = f"(p) {hit.class_name}" if hit.label_is_predicted else hit.class_name
    texts = [_line(name, width=_TILE, size=_BODY), _line(score, width=_TILE, size=_SMALL, colour=_FAINT)]
    return _below([_framed(_enlarged(hit.image, side=CELL), same=agrees(hit, result)), *texts], gap=2)


def _framed(picture: Image.Image, *, same: bool) -> Image.Image:
    """The picture in the middle of a cell, whose frame and corner mark say whether the class is the query's."""
    colour = _SAME if same else _OTHER
    tile = Image.new("RGB", (_TILE, _TILE), colour)
    draw = ImageDraw.Draw(tile)
    if not same:
        dash = 7
        for start in range(dash, _TILE, 2 * dash):
            draw.rectangle((start, 0, start + dash - 1, _TILE), fill=_PAPER)
            draw.rectangle((0, start, _TILE, start + dash - 1), fill=_PAPER)
    draw.rectangle((_STROKE, _STROKE, _TILE - _STROKE - 1, _TILE - _STROKE - 1), fill=_PAPER)
    tile.paste(picture, ((_TILE - picture.width) // 2, (_TILE - picture.height) // 2))
    badge = _badge(colour, same=same)
    tile.paste(badge, (_TILE - badge.width, 0), mask=badge)
    return tile


def _badge(colour: str, *, same: bool) -> Image.Image:
    """A disc with a check mark or a cross, drawn large and reduced, because Pillow's lines have hard edges."""
    side, large = 24, 96
    badge = Image.new("RGBA", (large, large))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, large - 1, large - 1), fill=colour)
    strokes = [[(26, 50), (43, 67), (71, 33)]] if same else [[(32, 32), (64, 64)], [(64, 32), (32, 64)]]
    for stroke in strokes:
        draw.line(stroke, fill=_PAPER, width=12, joint="curve")
    return badge.resize((side, side), Image.Resampling.LANCZOS)


def _enlarged(image: UInt8[np.ndarray, "c h w"], *, side: int) -> Image.Image:
    """Small images grow by a whole factor, pixels staying square; large ones shrink to fit."""
    picture = as_picture(image).convert("RGB")
    factor = side // max(picture.size)
    if factor < 1:
        return ImageOps.contain(picture, (side, side))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _line(text: str, *, width: int, size: int, colour: str = _INK) -> Image.Image:
    """One line of text, cut to the width."""
    font = ImageFont.load_default(size)
    line = _plain(text)
    while font.getlength(line) > width and len(line) > 1:
        line = line[:-2] + "…"
    tile = Image.new("RGB", (width, round(size * 1.3)), _PAPER)
    ImageDraw.Draw(tile).text((0, 0), line, fill=colour, font=font)
    return tile


def _text(text: str, *, width: int, size: int, colour: str = _FAINT) -> Image.Image:
    """As many lines as it takes; a word that is wider than a line is cut."""
    font = ImageFont.load_default(size)
    first, *words = _plain(text).split() or [""]
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return _below([_line(line, width=width, size=size, colour=colour) for line in lines], gap=0)


def _plain(text: str) -> str:
    """What the built-in font can draw: no accents, no line breaks, no lone surrogates."""
    decomposed = unicodedata.normalize("NFKD", clip(text).translate(_DRAWN_AS)).replace("...", "…")
    return "".join(c if c.isprintable() else " " for c in decomposed if not unicodedata.combining(c))


def _beside(tiles: Sequence[Image.Image], *, gap: int) -> Image.Image:
    whole = Image.new(
        "RGB", (sum(tile.width + gap for tile in tiles) - gap, max(tile.height for tile in tiles)), _PAPER
    )
    left = 0
    for tile in tiles:
        whole.paste(tile, (left, 0))
        left += tile.width + gap
    return whole


def _below(tiles: Sequence[Image.Image], *, gap: int) -> Image.Image:
    whole = Image.new(
        "RGB", (max(tile.width for tile in tiles), sum(tile.height + gap for tile in tiles) - gap), _PAPER
    )
    top = 0
    for tile in tiles:
        whole.paste(tile, (0, top))
        top += tile.height + gap
    return whole
