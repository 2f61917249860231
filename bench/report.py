"""Raw records of benchmarks as one page of Markdown with tables, and as plots: `engine bench report`."""

import json
from pathlib import Path

from tmm_engine.bench.benchmark import Reported, Run, Sheet
from tmm_engine.bench.plots import styles_of
from tmm_engine.bench.records import read_records
from tmm_engine.bench.registry import SUMMARIES, load
from tmm_engine.bench.tables import count, folded, plain_text, table
from tmm_engine.index.errors import InputError


def write_report(folder: Path, out: Path) -> list[Path]:
    """Tables and plots of every file of records in a folder.

    Args:
        folder: Searched for ``*.jsonl``; files without settings of a known benchmark are named and left out.
        out: A folder, made if it is missing; gets ``report.md`` and its pictures.

    Returns:
        The files written, the page first.

    Raises:
        InputError: no records of a known benchmark, a damaged file, records without a field that their benchmark
            has, an unwritable ``out``, or matplotlib is missing.
    """
    runs, skipped = _runs(folder)
    methods = list(dict.fromkeys(record["method"] for run in runs for record in run.records if "method" in record))
    sheet = Sheet(out, styles_of(methods))
    try:
        out.mkdir(parents=True, exist_ok=True)
        blocks = _blocks(runs, skipped, sheet)
        page = out / "report.md"
        page.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror} (choose another folder)") from None
    return [page, *sheet.pictures]


def reported_benchmarks() -> dict[str, Reported]:
    """By name, in the report's order: the benchmarks whose records it reads."""
    found = {name: load(name).reported for name in SUMMARIES}
    return {name: reported for name, reported in found.items() if reported is not None}


def _blocks(runs: list[Run], skipped: list[str], sheet: Sheet) -> list[str]:
    """The page; the pictures are drawn on the way."""
    blocks = [
        "# Benchmark report",
        "Numbers in brackets, and bands in pictures, are 95 % confidence intervals over queries.",
    ]
    for name, reported in reported_benchmarks().items():
        chosen = [run for run in runs if run.content.settings["benchmark"] == name]
        for run in chosen:
            blocks += [f"## {reported.title}: {run.data_set}", *_settings(run), *reported.section(run, sheet)]
        if chosen and reported.across is not None:
            blocks += reported.across(chosen, sheet)
    return blocks + (["Not in this report: " + ", ".join(skipped) + "."] if skipped else [])


def _runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Every file of a known benchmark, checked; and the names of the others, with the reason."""
    runs, skipped, benchmarks = [], [], reported_benchmarks()
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            first = file.readline()
        try:
            known = json.loads(first)["settings"]["benchmark"] in benchmarks
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            skipped.append(f"{path.name} (no settings of a known benchmark)")
            continue
        run = Run(path, read_records(path))
        if run.records:
            _check(run, benchmarks)
            runs.append(run)
        else:
            skipped.append(f"{path.name} (no records yet)")
    if not runs:
        raise InputError(
            f"{folder}: expected *.jsonl files with records of {', '.join(benchmarks)}, got "
            f"{', '.join(skipped) or 'none'} (run a benchmark with --out in this folder first)"
        )
    return runs, skipped


def _check(run: Run, benchmarks: dict[str, Reported]) -> None:
    if "data_set" not in run.content.settings:
        raise InputError(f"{run.path}: expected the data_set in its settings, got none (measure again)")
    needed = benchmarks[run.content.settings["benchmark"]].fields
    for number, record in enumerate(run.records, start=1):
        if missing := [name for name in needed if name not in record]:
            raise InputError(
                f"{run.path}: expected {', '.join(needed)} in every record, but record {number} lacks "
                f"{', '.join(missing)} (measure again with this version)"
            )


def _settings(run: Run) -> list[str]:
    """What the figures were made with: plain settings as a table, all of them folded away."""
    names = dict.fromkeys(name for settings in run.content.runs for name in settings if name != "benchmark")
    rows = []
    for name in names:
        values = [settings[name] for settings in run.content.runs if name in settings]
        if isinstance(values[-1], dict) and name != "machine":
            continue
        rows.append({"setting": name.replace("_", " "), "value": "; ".join(dict.fromkeys(map(plain_text, values)))})
    one_each = "query" in run.records[0]  # else a record holds a list over queries
    queries = f"{count(run.records):,} queries, " if one_each else ""
    measured = f"{queries}{len(run.records):,} records ({run.path.name})"
    rows.append({"setting": "measured", "value": measured})
    everything = json.dumps(run.content.runs, indent=1, ensure_ascii=False)
    return [table(rows), *folded("All settings, of every run", f"```json\n{everything}\n```")]
