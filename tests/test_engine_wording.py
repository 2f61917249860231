"""What Python's messages become on the command line."""

import re
from pathlib import Path

import pytest

from tmm_engine.cli.main import main
from tmm_engine.cli.wording import COMMANDS, FLAGS, for_command_line

ROOT = Path(__file__).parents[1]


def code_of(*rooms: str) -> str:
    return "\n".join(path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        (
            "a.idx is an index already; `overwrite=True` replaces it",
            "a.idx is an index already; --overwrite replaces it",
        ),
        ("make one with `build_index`", "make one with `engine build-index`"),
        (
            "columns of odd names in backticks: `strict` and `a b`",
            "columns of odd names in backticks: `strict` and `a b`",
        ),
        ("strict=True", "strict=True"),
        ("one ` alone, `head=…`", "one ` alone, `head=…`"),
        ("a class \x1b[31mred\x07\n", "a class \\x1b[31mred\\x07\n"),
        ("", ""),
    ],
)
def test_only_what_is_known_and_in_backticks_is_said_otherwise(python, expected):
    assert for_command_line(python) == expected


def test_every_flag_and_command_exists_and_is_named_by_a_message():
    flags = {
        flag
        for command in main.commands.values()
        for each in command.params
        for flag in (*each.opts, *each.secondary_opts)
    }
    assert {flag.split()[0] for flag in FLAGS.values()} <= flags
    assert {name.removeprefix("engine ") for name in COMMANDS.values()} <= main.commands.keys()
    for name in FLAGS | COMMANDS:
        assert f"`{name}`" in code_of("index", "rerank", "engine")


def test_no_message_of_a_library_names_a_flag():
    literals = re.findall(r'"[^"\n]*"', re.sub(r'"""[\s\S]*?"""', "", code_of("index", "rerank")))
    assert [text for text in literals if re.search(r"(?<![\w-])--[a-z]|`engine ", text)] == []
