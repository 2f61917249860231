"""cleanlab out of process: an interpreter that has it scores labels, files go back and forth."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from tmm_engine.index.errors import InputError

SCRIPT = Path(__file__).with_name("cleanlab_scores.py")


def cleanlab_scores(
    interpreter: Path, labels: Int64[np.ndarray, "n"], probabilities: Float64[np.ndarray, "n c"]
) -> Float64[np.ndarray, "n"]:
    """1 − cleanlab's label quality, in [0, 1]: larger is more likely wrong.

    Args:
        interpreter: A Python that has cleanlab.
        labels: Given.
        probabilities: Of a model that was not trained on these images.

    Raises:
        InputError: it cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, labels=labels, probabilities=probabilities)
        try:
            subprocess.run([interpreter, "-I", SCRIPT, source, target], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
            raise InputError(
                f"{interpreter}: expected a Python with cleanlab (python -m venv, then pip install cleanlab), got "
                f"{' '.join(said)}"
            ) from None
        with np.load(target) as content:
            return np.asarray(1 - content["scores"], dtype=np.float64)
