"""The report: its figures are what the records say, its pictures are there, and what is missing is said."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmm_engine.bench.benchmarks.radius import KINDS, Kind
from tmm_engine.bench.noise import FAMILIES, Family
from tmm_engine.bench.plots import Curve, Panel, draw_panels, styles_of
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.report import reported_benchmarks, write_report
from tmm_engine.bench.statistics import Interval, bootstrap_interval, by_query, wilson_interval
from tmm_engine.bench.tables import grouped, mean, plain_text, rate, table
from tmm_engine.index.errors import InputError

METHODS = ("cosine", "l2", "tmm")
NOISE = (
    ("clean", 0.0),
    ("brightness", 0.8),
    ("brightness", 0.4),
    ("gaussian", 2.5),
    ("melting", 1.0),
    ("adaptive", 1.0),
)


def write(folder: Path, name: str, benchmark: str, records: list[dict], **settings) -> None:
    chosen = {"benchmark": benchmark, "data_set": "digits", "seed": 0, "methods": {"tmm": {"clamp": True}}} | settings
    keys = ("query", "perturbation", "method", "kind", "direction", "setting", "value", "foreign", "level")
    key = tuple(name for name in keys if records and name in records[0])
    with RecordFile.open(folder / f"{name}.jsonl", chosen, key, ("benchmark",)) as file:
        for record in records:
            file.append(record)


def robustness(queries: int = 6) -> list[dict]:
    """tmm is better than l2, l2 than cosine, on every query."""
    generator = np.random.default_rng(0)
    records = []
    for query in range(queries):
        for family, level in NOISE:
            rank = 0 if family == "clean" else int(generator.integers(1, 9))
            for method, factor in {"cosine": 9, "l2": 3, "tmm": 1}.items():
                found = {"query": f"q{query}", "perturbation": f"{family} {level:g}", "family": family, "level": level}
                found |= {"method": method, "rank": factor * rank, "reciprocal_rank": 1 / (1 + factor * rank)}
                records.append(found | {"overlap": None if family == "clean" else 0.5, "label_precision": 0.75})
    return records


def rows_of(page: str, *header: str) -> list[dict[str, str]]:
    """The first table of the page whose header begins so."""
    lines = iter(page.splitlines())
    start = "| " + " | ".join(header)
    columns = next(line for line in lines if line.startswith(start)).strip("| ").split(" | ")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(columns, line.strip("| ").split(" | "), strict=True)))
    return rows


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[str, list[Path]]:
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out") / "new" / "folder"
    write(folder, "robust-a", "robustness", robustness(), exemplars=1797, commit="abc", machine={"torch": "2.11"})
    write(folder, "robust-b", "robustness", [r for r in robustness() if r["family"] != "gaussian"], data_set="signs")
    radii = [
        {"query": q, "method": m, "kind": kind, "direction": d, "radius": r, "censored": r == 5, "evaluations": 9}
        for m in METHODS
        for q in range(5)
        for d in range(2)
        for kind, r in {
            "gaussian": 1 + q + 10 * d,
            "brightness": min(3 + q, 5),
            "feature": None,
            "seed": q / 10,
        }.items()
    ]
    write(folder, "radius", "radius", radii)
    write(
        folder,
        "semantic",
        "semantic",
        [
            {"query": q, "method": m, "label_precision": 0.5, "knn_correct": q != 3, "ssim": q / 4}
            for q in range(4)
            for m in METHODS
        ],
    )
    write(
        folder,
        "ablation",
        "ablation",
        [
            {
                "setting": "clamp",
                "value": v,
                "query": q,
                "perturbation": p,
                "method": "tmm",
                "rank": r,
                "reciprocal_rank": 1 / (1 + r),
                "label_precision": 0.5,
            }
            for v, noisy in ((True, 0), (False, 3))
            for q in range(3)
            for p, r in (("clean", 0), ("blur 1", noisy), ("blur 2", noisy))
        ],
    )
    write(
        folder,
        "ood",
        "ood",
        [
            {
                "query": q,
                "method": "tmm",
                "foreign": "signs",
                "level": 0.5,
                "outranked": q,
                "foreign_count": 100,
                "bound": 0.25,
            }
            for q in range(5)
        ],
    )
    write(
        folder,
        "oracle",
        "oracle",
        [
            {
                "query": q,
                "method": "tmm",
                "alike": None if q == 4 else 2 * q,
                "k": 10,
                "preferred": None if q == 4 else q > 2,
            }
            for q in range(5)
        ],
    )
    (folder / "other.jsonl").write_text('{"path": "exact"}\n')
    write(folder, "started", "ood", [])
    paths = write_report(folder, out)
    assert paths[0] == out / "report.md"
    return paths[0].read_text(), paths


def test_every_benchmark_has_a_section_with_its_settings(reported):
    page, _ = reported
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Self-retrieval under noise: digits",
        "## Self-retrieval under noise: signs",
        "## Brightness and Gaussian noise, all data sets (the paper's Fig. 3)",
        *(
            f"## {reported_benchmarks()[name].title}: digits"
            for name in ("radius", "semantic", "ablation", "ood", "oracle")
        ),
    ]
    told = {row["setting"]: row["value"] for row in rows_of(page, "setting", "value")}
    assert told["exemplars"] == "1797"
    assert told["commit"] == "abc"
    assert told["machine"] == "torch 2.11"
    assert told["measured"] == "6 queries, 108 records (robust-a.jsonl)"
    assert "methods" not in told
    assert '"clamp": true' in page
    assert "other.jsonl (no settings of a known benchmark), started.jsonl (no records yet)" in page


def test_pictures_are_written_and_shown(reported):
    page, paths = reported
    assert [path.name for path in paths[1:]] == [
        "robust-a-mrr.png",
        "robust-b-mrr.png",
        "fig3-robustness.png",
        "radius-curves.png",
    ]
    for path in paths[1:]:
        assert f"]({path.name})" in page
        with Image.open(path) as image:
            assert min(image.size) > 400
            assert np.asarray(image.convert("L")).std() > 5  # not an empty sheet


def test_the_summary_compares_with_the_better_baseline_the_best_first(reported):
    page, _ = reported
    rows = rows_of(page, "method", "queries", "MRR, clean")
    assert [row["method"] for row in rows] == ["tmm", "l2", "cosine"]
    noisy = {m: [r for r in robustness() if (r["method"] == m) and r["family"] != "clean"] for m in METHODS}
    scores = {
        m: by_query(np.array([r["reciprocal_rank"] for r in rs]), np.array([r["query"] for r in rs]))
        for m, rs in noisy.items()
    }
    for row in rows:
        assert row["MRR, noise"] == str(bootstrap_interval(scores[row["method"]]))
        assert row["MRR, clean"] == "1.00 [1.00, 1.00]"
        assert row["overlap, noise"] == "0.50 [0.50, 0.50]"
    assert [row["difference to l2"] for row in rows] == [
        f"{bootstrap_interval(scores['tmm'] - scores['l2']):+z.2f}",
        "–",
        f"{bootstrap_interval(scores['cosine'] - scores['l2']):+z.2f}",
    ]


def test_methods_are_compared_over_what_all_of_them_met(tmp_path: Path):
    few = ("clean 0", "gaussian 2.5")  # a slow method, on fewer queries and perturbations
    records = [
        record
        for record in robustness()
        if record["method"] != "tmm" or (record["query"] in ("q0", "q1") and record["perturbation"] in few)
    ]
    write(tmp_path, "uneven", "robustness", records)
    page = write_report(tmp_path, tmp_path / "out")[0].read_text()
    rows = rows_of(page, "method", "queries", "MRR, clean")
    assert {row["queries"] for row in rows} == {"2"}
    of_both = [r for r in records if r["query"] in ("q0", "q1") and r["perturbation"] == "gaussian 2.5"]
    expected = {
        method: f"{np.mean([r['reciprocal_rank'] for r in of_both if r['method'] == method]):.2f}" for method in METHODS
    }
    assert {row["method"]: row["MRR, noise"].split()[0] for row in rows} == expected
    assert "All methods, over what every one of them met (2 queries, gaussian 2.5):" in page
    more = page.split("Those that met the most, over all of that:")[1]
    assert {(row["method"], row["queries"]) for row in rows_of(more, "method", "queries", "MRR, clean")} == {
        ("l2", "6"),
        ("cosine", "6"),
    }
    assert "Curves over fewer queries: digits: tmm 2 (the others 6)." in page
    levels = [row for row in rows_of(page, "level", "method") if row["method"] == "l2"]
    assert {row["queries"] for row in levels} == {"6"}, "the tables by level keep all that was measured"


def test_without_common_noise_nothing_is_compared(tmp_path: Path):
    own = {"cosine": "gaussian 2.5", "l2": "brightness 0.4", "tmm": "brightness 0.8"}
    records = [r for r in robustness() if r["perturbation"] in ("clean 0", own[r["method"]])]
    write(tmp_path, "apart", "robustness", records)
    page = write_report(tmp_path, tmp_path / "out")[0].read_text()
    assert "Under no noise have all methods met the same. Not in this table: l2, tmm." in page
    assert len(rows_of(page, "method", "queries", "MRR, clean")) == 1


def test_each_family_has_a_table_by_level_and_method(reported):
    page, _ = reported
    section = page.split("<summary>Brightness</summary>")[1]
    rows = rows_of(section, "level", "method")
    assert [(row["level"], row["method"]) for row in rows] == [(level, m) for level in ("0.8", "0.4") for m in METHODS]
    chosen = [r for r in robustness() if (r["family"], r["level"], r["method"]) == ("brightness", 0.4, "l2")]
    row = rows[4]
    assert row["top-1"] == str(wilson_interval(0, 6))
    assert row["median rank"] == f"{np.median([r['rank'] for r in chosen]):g}"
    assert row["MRR"].startswith(f"{np.mean([r['reciprocal_rank'] for r in chosen]):.2f} [")
    clean = rows_of(page.split("<summary>Clean</summary>")[1], "level", "method")
    assert clean[0]["overlap"] == "–"
    assert clean[0]["top-1"] == str(wilson_interval(6, 6))
    assert "<summary>Melting</summary>" in page
    adaptive = rows_of(
        page.split("<summary>Adaptive (PGD on what the method ranks by)</summary>")[1], "level", "method"
    )
    assert [row["method"] for row in adaptive] == list(METHODS)


def test_a_radius_is_the_smallest_over_directions_and_a_censored_median_a_bound(reported):
    page, _ = reported
    rows = {(row["kind"], row["method"]): row for row in rows_of(page, "kind", "method")}
    assert rows.keys() == {(kind, m) for kind in ("Gaussian noise", "Brightness") for m in METHODS}
    noise = rows["Gaussian noise", "tmm"]
    assert noise["median radius"] == str(bootstrap_interval(np.arange(1.0, 6), np.median))
    assert noise["censored"] == "1"
    darker = rows["Brightness", "tmm"]
    assert darker["median radius"].startswith("≥ 5.00 [")
    assert darker["censored"] == "3"
    control = rows_of(page.split("Control: ")[1], "method", "share")
    assert control[0]["share"].startswith("0.20 [")


def test_the_other_tables(reported):
    page, _ = reported
    semantic = rows_of(page, "method", "queries", "label precision")[0]
    assert semantic["k-NN accuracy"] == str(wilson_interval(3, 4))
    assert semantic["SSIM of the top 3"].startswith("0.38 [")
    ablation = rows_of(page, "setting", "value", "method")
    assert [row["value"] for row in ablation] == ["True", "False"]
    assert [row["top-1, noise"] for row in ablation] == ["1.00 [1.00, 1.00]", "0.00 [0.00, 0.00]"]
    assert ablation[1]["MRR, noise"] == "0.25 [0.25, 0.25]"
    assert ablation[1]["MRR, clean"] == "1.00 [1.00, 1.00]"
    ood = rows_of(page, "foreign")[0]
    assert ood["observed rate"].startswith("0.020 [")
    assert ood["mean bound"] == "0.250 [0.250, 0.250]"
    assert ood["queries with any"] == str(wilson_interval(4, 5))
    oracle = rows_of(page, "method", "queries", "judged alike")[0]
    assert oracle["judged alike"].startswith("0.30 [")
    assert oracle["preferred"] == str(wilson_interval(1, 4))
    assert oracle["no verdict"] == "1"


def test_runs_under_different_settings_are_told(tmp_path: Path):
    records = robustness()
    write(tmp_path, "r", "robustness", records[:50], commit="abc")
    with RecordFile.open(
        tmp_path / "r.jsonl",
        {"benchmark": "robustness", "data_set": "digits", "commit": "def"},
        ("query", "perturbation", "method"),
        (),
    ) as file:
        for record in records[50:]:
            file.append(record)
    page = write_report(tmp_path, tmp_path)[0].read_text()
    told = {row["setting"]: row["value"] for row in rows_of(page, "setting", "value")}
    assert told["commit"] == "abc; def"


def test_every_family_and_every_kind_of_radius_has_a_title():
    assert list(FAMILIES) == list(Family)
    assert KINDS.keys() == set(map(str, Kind)) - {"seed"}


def test_an_interrupted_run_still_has_a_report(tmp_path: Path):
    """One query, one method has nothing in common with the baseline, and there is no Fig. 3 family."""
    records = [r for r in robustness(1) if r["family"] in ("clean", "melting")]
    records = [r for r in records if (r["method"], r["family"]) != ("l2", "melting") and r["method"] != "cosine"]
    write(tmp_path, "r", "robustness", records)
    paths = write_report(tmp_path, tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "r-mrr.png"]
    row = rows_of(paths[0].read_text(), "method", "queries", "MRR, clean")[0]
    assert (row["method"], row["difference to a baseline"]) == ("tmm", "–")
    assert row["MRR, noise"].endswith(" [–, –]")


@pytest.mark.parametrize(
    "content", [None, '{"path": "exact"}\n', '{"settings": {"benchmark": "latency"}}\n', "", "[[]]\n"]
)
def test_a_folder_without_known_records_is_refused(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "other.jsonl").write_text(content)
    with pytest.raises(InputError, match=rf"records of robustness, .*got {'none' if content is None else 'other'}"):
        write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_fields_are_named(tmp_path: Path):
    records = robustness()
    del records[7]["overlap"]
    write(tmp_path, "r", "robustness", records)
    with pytest.raises(InputError, match=r"r\.jsonl: expected .*record 8 lacks overlap \(measure again"):
        write_report(tmp_path, tmp_path / "out")
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"settings": {"benchmark": "ood"}}) + "\n{}\n")
    with pytest.raises(InputError, match="expected the data_set"):
        write_report(tmp_path, tmp_path / "out")


def test_a_damaged_file_is_refused(tmp_path: Path):
    write(tmp_path, "r", "robustness", robustness())
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(InputError, match="line 110"):
        write_report(tmp_path, tmp_path / "out")


def test_an_unwritable_target_is_an_error_that_says_so(tmp_path: Path):
    write(tmp_path, "r", "robustness", robustness(2))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*choose another folder"):
        write_report(tmp_path, tmp_path / "file")


def test_methods_look_different_and_baselines_always_the_same():
    styles = styles_of(["tmm", "l2", *map(str, range(16))])
    assert len({(style["color"], style["ls"]) for style in styles.values()}) == len(styles) == 19
    assert styles["l2"] == styles_of(["l2"])["l2"]


def test_a_legend_lies_beside_the_panels(tmp_path: Path):
    """Below them: the last panel's x axis ends above it."""
    panel = Panel("t", "x", "y", {"l2": Curve([0.0, 1.0], [1.0, 0.0], [0.9, 0.0], [1.0, 0.1])}, falling=True)
    draw_panels([[panel, None], [panel]], tmp_path / "p.png", title="T", styles=styles_of(["l2", "unused"]))
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("L"))
    right = pixels[int(0.1 * len(pixels)) : int(0.85 * len(pixels)), int(0.55 * pixels.shape[1]) :]
    assert (right == 255).all()  # the empty places


def test_cells():
    records = [{"query": q, "x": x} for q, x in (("a", 1.0), ("a", None), ("b", 0.0))]
    assert mean(records, "x") == str(bootstrap_interval(np.array([1.0, 0.0])))
    assert mean(records[1:2], "x") == "–"
    assert rate([True, False], [records[0], records[2]]) == str(wilson_interval(1, 2))
    assert rate([True, False, True], records) == str(bootstrap_interval(np.array([0.5, 1.0])))
    assert rate([], []) == "–"
    assert grouped(records, "query") == {("a",): records[:2], ("b",): records[2:]}
    assert (
        table([{"a|b": "1", "c": f"{Interval(1.0, 0.0, 2.0)}"}])
        == "| a\\|b | c |\n| --- | --- |\n| 1 | 1.00 [0.00, 2.00] |"
    )
    assert table([]) == "No records."
    assert [plain_text(value) for value in (None, True, 0.001, 7, ["a", 1])] == ["–", "True", "0.001", "7", "a, 1"]
