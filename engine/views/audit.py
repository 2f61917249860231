"""An audit as a self-contained HTML page: findings by kind, each with its pictures and why it is one."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from tmm_engine.auditing.findings import MEANINGS, Audit, Finding, Kind
from tmm_engine.views.page import environment
from tmm_engine.views.showing import as_picture

if TYPE_CHECKING:
    from tmm_engine.engine import Engine

THUMBNAIL = 160
"""Pixels of the longer side that larger images are reduced to."""
READ = 256
TITLES = {
    Kind.DUPLICATES: "Near-duplicates",
    Kind.LEAKS: "Leaks",
    Kind.LABELS: "Likely wrong labels",
    Kind.FOREIGN: "Foreign images",
    Kind.UNSURE: "Images the model is least sure of",
}
DOING = {
    Kind.DUPLICATES: "Keep the first picture of each row, delete the others, unless they are meant to be there.",
    Kind.LEAKS: "A picture that is in both makes a test look better than it is: delete it from one.",
    Kind.LABELS: "Compare the picture with its neighbours. If the suggestion is right, relabel it.",
    Kind.FOREIGN: "Delete what does not belong here. Some may just be unusual.",
    Kind.UNSURE: "Nothing need be wrong: these are the pictures worth a second look, or more examples.",
}


def render_audit(audit: Audit, engine: "Engine", *, limit: int, decisions: Sequence[str]) -> str:
    """The page.

    Args:
        audit: What was found.
        engine: In whose exemplars.
        limit: Findings of each kind that are shown.
        decisions: Names of the files of decisions that are written beside it.
    """
    sections = [
        {
            "kind": str(kind),
            "title": TITLES[kind],
            "meaning": MEANINGS[kind],
            "doing": DOING[kind],
            "rule": audit.rules[kind],
            "count": len(audit.of(kind)),
            "shown": audit.of(kind)[:limit],
            "suspicious": audit.suspicious.get(kind, ())[:limit],
        }
        for kind in Kind
        if kind in audit.rules
    ]
    shown = [
        finding
        for kind in audit.rules
        for part in (audit.of(kind), audit.suspicious.get(kind, ()))
        for finding in part[:limit]
    ]
    templates = environment()
    templates.filters["picture"] = data_uri
    template = templates.from_string(Path(__file__).with_name("audit.html.j2").read_text(encoding="utf-8"))
    return template.render(
        sections=sections,
        pictures=_pictures(shown, engine),
        notes=audit.notes,
        exemplars=audit.exemplars,
        index_name="" if engine.path is None else engine.path.name,
        index_path="INDEX" if engine.path is None else str(engine.path),
        decisions=decisions,
    )


def _pictures(findings: Sequence[Finding], engine: "Engine") -> dict[str, str]:
    """Data URIs by id, of all exemplars that are shown."""
    rows = engine._snapshot.rows
    ids = [finding.id for finding in findings]
    ids += [each.id for finding in findings for each in finding.evidence if each.image is None]
    ids = [id_ for id_ in dict.fromkeys(ids) if id_ in rows]
    found: dict[str, str] = {}
    for start in range(0, len(ids), READ):
        some = ids[start : start + READ]
        images = engine.store.images(np.array([rows[id_] for id_ in some]))
        found |= {id_: data_uri(image) for id_, image in zip(some, images, strict=True)}
    return found


def data_uri(image: UInt8[np.ndarray, "c h w"]) -> str:
    """A small image as it is, a large one reduced."""
    picture, content = as_picture(image), io.BytesIO()
    if max(picture.size) <= THUMBNAIL:
        picture.save(content, "PNG")
        kind = "png"
    else:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(content, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode("ascii")
