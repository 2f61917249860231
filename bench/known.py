"""Label errors that people have confirmed, beside those that an audit suspects: of the MNIST test images.

    python -m tmm_engine.bench.known INDEX mturk/mnist_mturk.json --out FILE [--cleanlab PYTHON]

INDEX holds the test images in their order. The list is of github.com/cleanlab/label-errors (Northcutt, Athalye and
Mueller, NeurIPS 2021): confident learning proposed images, and five people said of each whether it shows what the label
says. What it did not propose nobody has looked at, so that a ranking can only be held to what is on the list.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from jaxtyping import Bool, Float
from scipy.special import softmax

from tmm_engine.auditing.findings import Kind
from tmm_engine.auditing.foreign import logits_of
from tmm_engine.bench.planting.cleanlab import cleanlab_scores
from tmm_engine.bench.planting.measures import auroc, average_precision
from tmm_engine.bench.records import describe_run
from tmm_engine.engine import Engine
from tmm_engine.index.errors import InputError
from tmm_engine.index.files import write_file

MAJORITY = 3  # of five people
FIRST = (15, 50, 100)  # of a ranking


def confirmed(votes: list[dict[str, Any]], count: int) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Which images were looked at, and of which a majority did not say that they show what their label says.

    Args:
        votes: For each image on the list its position, and votes for the given label and for others.
        count: How many images there are.
    """
    looked, wrong = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    for each in votes:
        looked[each["id"]] = True
        wrong[each["id"]] = each["mturk"]["given"] + each["mturk"].get("both", 0) < MAJORITY
    return looked, wrong


def compared(wrong: Bool[np.ndarray, "n"], scores: Float[np.ndarray, "n"]) -> dict[str, Any]:
    """How high a ranking of all images puts the confirmed errors."""
    order = np.argsort(-scores, kind="stable")
    found = {f"among_first_{count}": int(wrong[order[:count]].sum()) for count in FIRST}
    return {"ap": average_precision(wrong, scores), "auroc": auroc(wrong, scores)} | found


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("listed", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A JSON file.")
@click.option("--cleanlab", type=click.Path(path_type=Path), metavar="PYTHON", help="An interpreter that has cleanlab.")
def main(index: Path, listed: Path, out: Path, cleanlab: Path | None) -> None:
    """Compare an audit's ranking of labels with confirmed label errors."""
    votes = json.loads(listed.read_text(encoding="utf-8"))
    with Engine.open(index, backend="torch") as engine:
        labels = np.array([engine.label_names[label].split(" ")[0] for label in engine.store.labels])
        if any(labels[each["id"]] != each["given_original_label_name"] for each in votes):
            raise InputError(f"{index}: expected the images of {listed} in their order, got other labels")
        looked, wrong = confirmed(votes, len(engine))
        audit = engine.audit(kinds=["labels"])
        scores = audit.scores[Kind.LABELS]
        model = softmax(logits_of(engine.store, engine.classifier), axis=1)
        rankings = {"audit": scores, "softmax": 1 - model[np.arange(len(labels)), engine.store.labels]}
        if cleanlab is not None:
            rankings["cleanlab"] = cleanlab_scores(cleanlab, engine.store.labels, model)
    flagged = scores >= audit.rules[Kind.LABELS].threshold
    record = {
        "run": describe_run(),
        "images": len(labels),
        "on_the_list": int(looked.sum()),
        "confirmed": np.flatnonzero(wrong).tolist(),
        "found": np.flatnonzero(flagged).tolist(),
        "found_and_confirmed": np.flatnonzero(flagged & wrong).tolist(),
        "found_and_not_on_the_list": np.flatnonzero(flagged & ~looked).tolist(),
        "rankings": {name: compared(wrong, each) for name, each in rankings.items()},
    }
    write_file(out, (json.dumps(record, indent=1) + "\n").encode())
    click.echo(json.dumps(record["rankings"], indent=1))


if __name__ == "__main__":
    main()
