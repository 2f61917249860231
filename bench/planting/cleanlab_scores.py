"""Run by an interpreter that has cleanlab, which is under the AGPL and so no part of this: scores of labels.

    python cleanlab_scores.py IN.npz OUT.npz

IN holds `labels` (n) and `probabilities` (n, c); OUT `scores` (n): cleanlab's label quality, smaller is more likely
wrong.
"""

import sys

import numpy as np


def main(source: str, target: str) -> None:
    """Score labels by cleanlab's defaults."""
    from cleanlab.rank import get_label_quality_scores

    content = np.load(source)
    np.savez(target, scores=get_label_quality_scores(content["labels"], content["probabilities"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
