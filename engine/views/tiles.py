"""Tiles: pictures, framed and enlarged, and lines of text; larger tiles are smaller ones beside or below each other."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tmm_engine.index.errors import visible
from tmm_engine.views.showing import as_picture, clip

CELL = 128
"""Side in pixels that a picture is enlarged to at most; its frame comes on top."""

PAPER, INK, FAINT, RULE = "#ffffff", "#16181d", "#667085", "#dfe2e8"
SAME, OTHER = "#1a7f4b", "#c4342d"  # the frame of a neighbour of the same class, of another
TINY, SMALL, BODY, HEADING = 12, 14, 16, 24  # font sizes
GAP = 12
_MARGIN, _STROKE = 9, 4  # around a neighbour: the frame and the white between
TILE = CELL + 2 * _MARGIN
_DRAWN_AS = str.maketrans({"×": "x", "−": "-", "–": "-", "—": "-", "ß": "ss"})  # the font has boxes for them


def framed(picture: Image.Image, *, same: bool) -> Image.Image:
    """The picture in the middle of a cell, whose frame and corner mark say whether the class is the query's."""
    colour = SAME if same else OTHER
    tile = Image.new("RGB", (TILE, TILE), colour)
    draw = ImageDraw.Draw(tile)
    if not same:
        dash = 7
        for start in range(dash, TILE, 2 * dash):
            draw.rectangle((start, 0, start + dash - 1, TILE), fill=PAPER)
            draw.rectangle((0, start, TILE, start + dash - 1), fill=PAPER)
    draw.rectangle((_STROKE, _STROKE, TILE - _STROKE - 1, TILE - _STROKE - 1), fill=PAPER)
    tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    badge = _badge(colour, same=same)
    tile.paste(badge, (TILE - badge.width, 0), mask=badge)
    return tile


def _badge(colour: str, *, same: bool) -> Image.Image:
    """A disc with a check mark or a cross, drawn large and reduced, because Pillow's lines have hard edges."""
    side, large = 24, 96
    badge = Image.new("RGBA", (large, large))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, large - 1, large - 1), fill=colour)
    strokes = [[(26, 50), (43, 67), (71, 33)]] if same else [[(32, 32), (64, 64)], [(64, 32), (32, 64)]]
    for stroke in strokes:
        draw.line(stroke, fill=PAPER, width=12, joint="curve")
    return badge.resize((side, side), Image.Resampling.LANCZOS)


def enlarged(image: UInt8[np.ndarray, "c h w"], *, side: int) -> Image.Image:
    """Small images grow by a whole factor, pixels staying square; large ones shrink to fit."""
    picture = as_picture(image).convert("RGB")
    factor = side // max(picture.size)
    if factor < 1:
        return ImageOps.contain(picture, (side, side))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def text_line(text: str, *, width: int, size: int, colour: str = INK) -> Image.Image:
    """One line of text, cut to the width."""
    font = ImageFont.load_default(size)
    line = drawable(text)
    while font.getlength(line) > width and len(line) > 1:
        line = line[:-2] + "…"
    tile = Image.new("RGB", (width, round(size * 1.3)), PAPER)
    ImageDraw.Draw(tile).text((0, 0), line, fill=colour, font=font)
    return tile


def text_block(text: str, *, width: int, size: int, colour: str = FAINT) -> Image.Image:
    """As many lines as it takes; a word that is wider than a line is cut."""
    font = ImageFont.load_default(size)
    first, *words = drawable(text).split() or [""]
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return below([text_line(line, width=width, size=size, colour=colour) for line in lines], gap=0)


def drawable(text: str) -> str:
    """What the built-in font can draw: no accents, line breaks or lone surrogates; control characters spelled out."""
    decomposed = unicodedata.normalize("NFKD", clip(visible(text)).translate(_DRAWN_AS)).replace("...", "…")
    return "".join(c if c.isprintable() else " " for c in decomposed if not unicodedata.combining(c))


def beside(tiles: Sequence[Image.Image], *, gap: int) -> Image.Image:
    """Tiles in a row, tops aligned."""
    whole = Image.new("RGB", (sum(tile.width + gap for tile in tiles) - gap, max(tile.height for tile in tiles)), PAPER)
    left = 0
    for tile in tiles:
        whole.paste(tile, (left, 0))
        left += tile.width + gap
    return whole


def below(tiles: Sequence[Image.Image], *, gap: int) -> Image.Image:
    """Tiles in a column, left edges aligned."""
    whole = Image.new("RGB", (max(tile.width for tile in tiles), sum(tile.height + gap for tile in tiles) - gap), PAPER)
    top = 0
    for tile in tiles:
        whole.paste(tile, (0, top))
        top += tile.height + gap
    return whole
