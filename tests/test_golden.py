"""Answers are the recorded ones: bit for bit on such a CPU with such a torch, elsewhere as near as rounding allows."""

import json
from pathlib import Path

import pytest

from tests.golden import GROUPS, RECORDED, Search, close, environment, hangs_on_rounding, same_shape

GOLDEN = json.loads(RECORDED.read_text())
EXACT = GOLDEN["environment"] == environment()
OF_ITS_TORCH = ("transformer", "in_format_2")  # whose random weights, and whose printed form, are another torch's own


@pytest.mark.parametrize("group", GROUPS)
def test_answers_are_the_recorded_ones(group: str, tmp_path: Path):
    if group in OF_ITS_TORCH and GOLDEN["environment"]["torch"] != environment()["torch"]:
        pytest.skip(f"recorded with torch {GOLDEN['environment']['torch']}, which makes another {group}")
    recorded, searches = GOLDEN["answers"][group], list(GROUPS[group](tmp_path))
    assert [each.name for each in searches] == list(recorded)
    wrong = [each.name for each in searches if not agree(each, recorded[each.name], group)]
    assert wrong == [], f"{len(wrong)} of {len(searches)} searches answer otherwise"


def agree(found: Search, recorded: list[dict], group: str) -> bool:
    """Exactly, in the environment of the record; elsewhere by `close`.

    A trigger that was optimised in float32 is another one with another rounding: of its answers only lengths and types
    can be compared elsewhere.
    """
    if EXACT:
        return found.answers == recorded
    compare = same_shape if hangs_on_rounding(group, found.options) else close
    return len(found.answers) == len(recorded) and all(map(compare, found.answers, recorded))
