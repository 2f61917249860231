"""Run by an interpreter that has cleanlab, which is under the AGPL and so no part of this: scores of labels.

    python cleanlab_scores.py IN.npz OUT.npz

IN holds `labels` (n) and `probabilities` (n, c); OUT `scores` (n): cleanlab's label quality, smaller is more likely
wrong, `issue` (n): whether it takes the label for wrong, and `version`.
"""

import sys

import numpy as np


def main(source: str, target: str) -> None:
    """Score labels by cleanlab's defaults."""
    import cleanlab
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    content = np.load(source)
    labels, probabilities = content["labels"], content["probabilities"]
    scores = get_label_quality_scores(labels, probabilities)
    issues = find_label_issues(labels, probabilities, n_jobs=1)
    np.savez(target, scores=scores, issues=issues, version=cleanlab.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
