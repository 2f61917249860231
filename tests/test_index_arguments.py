"""Arguments of the wrong kind."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from tests.builders import ROOT
from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError


@checked
def work(
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    model: nn.Module | str | None = None,
    count: int = 1,
    mean: Sequence[float] | None = None,
) -> tuple[object, ...]:
    """Does nothing."""
    return path, names, model, count, mean


@pytest.mark.parametrize(
    "given",
    [
        {"path": Path("a")},
        {"path": "a", "names": ["b"], "model": "c", "count": 3},
        {"path": "a", "names": np.array(["b"]), "count": np.int64(3)},
        {"path": "a", "mean": (0, 1)},
        {"path": "a", "mean": np.array([0.5, 0.5])},
        {"path": "a", "names": (), "model": nn.Identity()},
    ],
)
def test_what_fits_is_passed_on_as_it_is(given: dict):
    assert work(**given)[0] is given["path"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": None}, r"work: path: expected text or a path, got None \(NoneType\)"),
        ({"path": ""}, "path: expected text or a path, got ''"),
        ({"path": "a\0"}, "path: expected"),
        ({"path": b"a"}, r"got b'a' \(bytes\)"),
        ({"path": "a", "names": "abc"}, r"names: expected a list of text or None, got 'abc' \(str\)"),
        ({"path": "a", "names": [1]}, r"got \[1\] \(list\)"),
        ({"path": "a", "model": nn.Identity}, r"got the class Identity itself \(is an instance meant, Iden"),
        ({"path": "a", "count": "3"}, r"count: expected a whole number, got '3'"),
        ({"path": "a", "mean": np.array(["x"])}, "mean: expected a list of a number or None"),
        ({"path": "x", "names": {"y": "z" * 100}}, "z…"),
    ],
)
def test_what_does_not_is_named(given: dict, message: str):
    with pytest.raises(InputError, match=message):
        work(**given)


def test_every_public_function_says_in_words_what_it_cannot_take():
    done = subprocess.run([sys.executable, "-m", "tests.misuse"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
