"""Search results to look at: a self-contained HTML page and a PNG sheet."""

import base64
import io
import unicodedata
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.files import replacing
from tmm_engine.results import Hit, SearchResult

MAX_TEXT = 300
"""Characters of any one text (id, class name, metadata …) that a report holds; the rest is an ellipsis."""

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
_LEAST_COLUMNS = 4  # a sheet of one neighbour still has room for its texts
_LEGEND = "solid, check mark: the query's class  ·  dashed, cross: another class  ·  (p): predicted, not given"


def write_html(
    results: Sequence[SearchResult],
    path: Path,
    *,
    title: str = "Nearest neighbours",
    index_name: str = "",
) -> None:
    """Write one HTML page that needs nothing else: no script, no network, images inline at their native size.

    Consecutive results of the same query share a card, one row per result.

    Args:
        results: At least one; images of 1 or 3 channels.
        path: The file to write; replaced as a whole or not at all.
        title: The page's heading.
        index_name: What the index is called, shown beneath the heading.

    Raises:
        ImageError: An image has neither 1 nor 3 channels.
        InputError: There are no results, or the file cannot be written.
    """
    blocks = _by_query(results)
    template = _environment().from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    page = template.render(blocks=blocks, title=title, index_name=index_name)
    _write(path, page.encode("utf-8", errors="backslashreplace"))  # file names may hold lone surrogates


def write_png(results: Sequence[SearchResult], path: Path, *, columns: int = 10) -> None:
    """Write one picture: a block per query, a row per result, neighbours enlarged and framed by agreement.

    The font is Pillow's own: accents are dropped, and scripts other than Latin show as boxes.

    Args:
        results: At least one; images of 1 or 3 channels. Consecutive ones of the same query share a block.
        path: The file to write; replaced as a whole or not at all.
        columns: Neighbours per line, at least 1; more neighbours wrap.

    Raises:
        ImageError: An image has neither 1 nor 3 channels.
        InputError: There are no results, ``columns`` is below 1, the sheet would be larger than
            ``MAX_SHEET_PIXELS``, or the file cannot be written.
    """
    blocks = _by_query(results)
    if columns < 1:
        raise InputError(f"expected at least 1 column, got {columns}")
    _write(path, _png(_sheet(blocks, columns=columns)))


# ------------------------------------------------------------------------------------------------ what both show


def _by_query(results: Sequence[SearchResult]) -> list[list[SearchResult]]:
    if not results:
        raise InputError("expected at least one search result to report, got none")
    return [list(block) for _, block in groupby(results, key=lambda result: result.query)]


def _agrees(hit: Hit, result: SearchResult) -> bool:
    """Whether the neighbour has the query's true label or, where that is unknown, the predicted one."""
    return hit.label == (result.predicted_label if result.true_label is None else result.true_label)


def _agreeing(result: SearchResult) -> int:
    return sum(_agrees(hit, result) for hit in result.hits)


def _clip(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _number(value: float) -> str:
    """Four significant digits, trailing zeros kept, so that scores line up."""
    return f"{value:#.4g}".rstrip(".")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _tmm_views(result: SearchResult) -> list[tuple[str, UInt8[np.ndarray, "c h w"]]]:
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


def _picture(image: UInt8[np.ndarray, "c h w"]) -> Image.Image:
    if image.shape[0] not in (1, 3):
        raise ImageError(f"expected an image of 1 or 3 channels, got {image.shape[0]} (pick or merge channels first)")
    return Image.fromarray(image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Replace the file as a whole."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"expected a file to write the report to, got {path}, which is a folder or a device")
        with replacing(path) as written:
            written.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"expected a file name in an existing, writable folder, got {path} ({error.strerror}; "
            "make the folder or name another)"
        ) from error


# ------------------------------------------------------------------------------------------------ HTML


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "agreeing": _agreeing,
        "clip": _clip,
        "data_uri": _data_uri,
        "metadata": _metadata,
        "number": _number,
        "seconds": _seconds,
        "tmm_views": _tmm_views,
    }
    environment.tests["agreeing_with"] = _agrees
    return environment


def _data_uri(image: UInt8[np.ndarray, "c h w"]) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(_picture(image))).decode("ascii")


def _metadata(hit: Hit) -> str:
    return _clip(" · ".join(f"{name}: {value}" for name, value in hit.metadata.items()))


# ------------------------------------------------------------------------------------------------ PNG
# Every function returns a tile; larger tiles are smaller ones beside or below each other.


def _sheet(blocks: list[list[SearchResult]], *, columns: int) -> Image.Image:
    longest = max(len(result.hits) for block in blocks for result in block)
    width = (_TILE + _GAP) * (1 + max(min(columns, longest), _LEAST_COLUMNS))
    tiles = [_line(_LEGEND, width=width, size=_BODY, colour=_FAINT)]
    for block in blocks:
        tiles += [Image.new("RGB", (width, 2), _LINE), _block(block, columns=columns, width=width)]
        if (pixels := width * sum(tile.height for tile in tiles)) > MAX_SHEET_PIXELS:
            raise InputError(
                f"expected a sheet of at most {MAX_SHEET_PIXELS:,} pixels, got {pixels:,} or more "
                "(pass fewer results, or write an HTML page instead)"
            )
    return ImageOps.expand(_below(tiles, gap=_GAP + _GAP // 2), border=2 * _GAP, fill=_PAPER)


def _block(block: list[SearchResult], *, columns: int, width: int) -> Image.Image:
    query = block[0]
    classes = f"predicted: {query.predicted_class}"
    if query.true_class is not None:
        classes += f"  ·  true: {query.true_class}"
    heading = [_line(query.query, width=width, size=_HEADING), _line(classes, width=width, size=_BODY, colour=_FAINT)]
    rows = [_row(result, columns=columns, width=width - _TILE - 2 * _GAP) for result in block]
    body = _beside([_query_column(block), _below(rows, gap=2 * _GAP)], gap=2 * _GAP)
    return _below([*heading, body], gap=_GAP // 2)


def _query_column(block: list[SearchResult]) -> Image.Image:
    """The query and, at half its size, what each TMM result triggered it with."""
    tiles = [_line("query", width=_TILE, size=_BODY), _enlarged(block[0].query_image, side=CELL)]
    label = partial(_line, width=CELL // 2, size=_TINY, colour=_FAINT)
    for views in filter(None, map(_tmm_views, block)):
        pair = [
            _below([_enlarged(image, side=CELL // 2), *map(label, caption.split())], gap=2) for caption, image in views
        ]
        tiles.append(_beside(pair, gap=_GAP))
    return _below(tiles, gap=_GAP // 2)


def _row(result: SearchResult, *, columns: int, width: int) -> Image.Image:
    """One mode's heading, then its neighbours in lines of ``columns``."""
    mode = _line(result.mode, width=width, size=_BODY)
    facts = f"{_agreeing(result)} of {len(result.hits)} in the query's class"
    facts += f"  ·  {result.scored:,} of {result.exemplars:,} scored  ·  {_seconds(result.seconds)}"
    if result.recognised_as is not None:
        facts += f"  ·  recognised as {_clip(result.recognised_as)}"
    indent = round(ImageFont.load_default(_BODY).getlength(_plain(result.mode))) + _GAP
    if indent < width:
        mode.paste(_line(facts, width=width - indent, size=_SMALL, colour=_FAINT), (indent, 1))
    hits = [_hit(hit, result) for hit in result.hits]
    lines = [_beside(hits[start : start + columns], gap=_GAP) for start in range(0, len(hits), columns)]
    return _below([mode, *lines], gap=_GAP // 2)


def _hit(hit: Hit, result: SearchResult) -> Image.Image:
    score = _number(hit.score)
    if hit.confidence is not None:
        score += f"  ·  {result.confidence_word} {hit.confidence:.2g}"
    name = f"(p) {hit.class_name}" if hit.label_is_predicted else hit.class_name
    texts = [_line(name, width=_TILE, size=_BODY), _line(score, width=_TILE, size=_SMALL, colour=_FAINT)]
    return _below([_framed(_enlarged(hit.image, side=CELL), same=_agrees(hit, result)), *texts], gap=2)


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
    picture = _picture(image).convert("RGB")
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


def _plain(text: str) -> str:
    """What the built-in font can draw: no accents, no line breaks, no lone surrogates."""
    decomposed = unicodedata.normalize("NFKD", _clip(text)).replace("...", "…")
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
