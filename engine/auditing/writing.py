"""What an audit leaves on disk: a page to go through, tables, decisions for other commands, tasks for labelling."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm_engine.auditing.findings import Audit, Finding, Kind
from tmm_engine.engine import Engine
from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError, printable
from tmm_engine.index.files import replacing
from tmm_engine.relabelling import line_of
from tmm_engine.views.audit import data_uri, render_audit

if TYPE_CHECKING:
    import pyarrow

PAGE, LINES, TABLE, DECISIONS, TASKS = (
    "audit.html", "findings.jsonl", "findings.parquet", "decisions", "label-studio.json",
)  # fmt: skip
LIMIT = 100


@checked
def write_audit(
    audit: Audit, engine: Engine, folder: str | Path, *, limit: int = LIMIT, overwrite: bool = False
) -> list[Path]:
    """Write a folder: the page, findings as JSON lines and Parquet, decisions, Label Studio tasks. Whole or not at all.

    Args:
        audit: What was found.
        engine: In whose exemplars.
        folder: Its folder must exist.
        limit: Findings of each kind that the page shows.
        overwrite: Replace an audit that is there.

    Returns:
        What was written.

    Raises:
        InputError: the folder cannot be written, or something else is there.
    """
    target = check_target(folder, overwrite=overwrite)
    try:
        with replacing(target) as written:
            written.mkdir()
            for name, content in _files(audit, engine, limit).items():
                (written / name).parent.mkdir(exist_ok=True)
                (written / name).write_bytes(content())
            names = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    except OSError as error:
        raise InputError(
            f"expected a folder's name in an existing, writable folder, got {target} ({error.strerror}; make that "
            f"folder, or name another)"
        ) from error
    return [target / name for name in names]


def check_target(folder: str | Path, *, overwrite: bool) -> Path:
    """The folder, where an audit can be written: to be asked before one is made.

    Raises:
        InputError: something is there, or its folder is not.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise InputError(f"{target} is there already; name another folder, or replace it with `overwrite=True`")
    if target.exists() and not (target / PAGE).is_file() and any(target.iterdir() if target.is_dir() else [target]):
        raise InputError(f"{target} is no audit (it has no {PAGE}), so it is not replaced; name another folder")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target}: its folder does not exist; create it first")
    return target


def _files(audit: Audit, engine: Engine, limit: int) -> dict[str, Callable[[], bytes]]:
    findings = audit.findings
    decided = {name: content for name, content in _decisions(findings).items() if content}
    return {
        PAGE: lambda: render_audit(audit, engine, limit=limit, decisions=list(decided)).encode(
            errors="backslashreplace"
        ),
        LINES: lambda: "".join(f"{json.dumps(finding.to_json())}\n" for finding in findings).encode(),
        TABLE: lambda: _parquet(findings),
        TASKS: lambda: json.dumps(
            [_task(finding, engine) for finding in findings if finding.kind in TO_LABEL]
        ).encode(),
    } | {f"{DECISIONS}/{name}": (lambda content=content: content.encode()) for name, content in decided.items()}


TO_LABEL = (Kind.LABELS, Kind.UNSURE)


def findings_table(findings: Iterable[Finding]) -> "pyarrow.Table":
    """A row for each finding; its evidence is a list of structs."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    evidence = pa.struct(
        [
            ("id", text),
            ("label", text),
            ("predicted", text),
            ("similarity", number),
            ("score", number),
            ("source", text),
        ]
    )
    names = ("kind", "score", "id", "label", "label_given", "predicted", "why", "suggestion", "confidence", "source")
    kinds = {"score": number, "confidence": number, "label_given": pa.bool_()}
    fields = [(name, kinds.get(name, text)) for name in names]
    schema = pa.schema([*fields, ("evidence", pa.list_(evidence))])
    return pa.Table.from_pylist([_printable(finding.to_json()) for finding in findings], schema=schema)


def _parquet(findings: Iterable[Finding]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.BufferOutputStream()
    pq.write_table(findings_table(findings), content)
    return bytes(content.getvalue().to_pybytes())


def _printable(value: Any) -> Any:
    """Texts as Arrow takes them: file names may hold lone surrogates."""
    if isinstance(value, dict):
        return {name: _printable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_printable(part) for part in value]
    return printable(value) if isinstance(value, str) else value


def _decisions(findings: Iterable[Finding]) -> dict[str, str]:
    """By name of the file: ids to delete, one a line, and labels."""
    by_kind: dict[Kind, list[Finding]] = {kind: [] for kind in Kind}
    for finding in findings:
        by_kind[finding.kind].append(finding)
    relabel = io.StringIO()
    rows = [
        (each.id, each.suggestion, each.label, f"{each.score:.3f}") for each in by_kind[Kind.LABELS] if each.suggestion
    ]
    if rows:
        csv.writer(relabel).writerows([("id", "label", "was", "score"), *rows])
    copies = [each.id for finding in by_kind[Kind.DUPLICATES] for each in finding.evidence]
    return {
        "delete-duplicates.txt": _lines(copies),
        "delete-leaks.txt": _lines([finding.id for finding in by_kind[Kind.LEAKS]]),
        "delete-foreign.txt": _lines([finding.id for finding in by_kind[Kind.FOREIGN]]),
        "relabel.csv": relabel.getvalue(),
    }


def _lines(ids: Iterable[str]) -> str:
    return "".join(f"{line_of(id_)}\n" for id_ in dict.fromkeys(ids))


def _task(finding: Finding, engine: Engine) -> dict[str, Any]:
    """For Label Studio: an image with choices named ``label``, and what is suggested."""
    row = engine._snapshot.rows[finding.id]
    image = engine.store.images(np.array([row]))[0]
    choice = finding.suggestion or finding.predicted
    result = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
    return {
        "data": {
            "image": data_uri(image),
            "id": finding.id,
            "label": finding.label,
            "predicted": finding.predicted,
            "kind": str(finding.kind),
            "why": finding.why,
        },
        "predictions": [{"model_version": "audit", "score": finding.score, "result": [result]}],
    }
