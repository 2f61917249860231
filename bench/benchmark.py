"""What every file in `benchmarks/` declares, and what its section of the report is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from tmm_engine.bench.plots import Panel, draw_panels
from tmm_engine.bench.records import Record, Records


@dataclass(frozen=True, slots=True)
class Run:
    """One file of records: where it is, and what it holds."""

    path: Path
    content: Records

    @property
    def records(self) -> list[Record]:
        """Of all runs that wrote to the file."""
        return self.content.records

    @property
    def data_set(self) -> str:
        """As the settings name it."""
        return str(self.content.settings["data_set"])


@dataclass(frozen=True, slots=True)
class Sheet:
    """Where a section's pictures go, how the methods of all files look, and the pictures drawn so far."""

    folder: Path
    styles: dict[str, dict[str, Any]]
    pictures: list[Path] = field(default_factory=list)

    def draw(self, name: str, title: str, panels: Sequence[Sequence[Panel | None]]) -> str:
        """Write the picture; the Markdown that shows it."""
        path = self.folder / f"{name}.png"
        draw_panels(panels, path, title=title, styles=self.styles)
        self.pictures.append(path)
        return f"![{title}]({path.name})"


@dataclass(frozen=True, slots=True)
class Reported:
    """The records of a benchmark, and what the report says of them.

    Attributes:
        title: Of its sections.
        key: The fields that tell its records apart: those that are there already are not measured again.
        fields: What its section reads; every record has them.
        section: One file as blocks of Markdown.
        across: What there is to say of all its files together, as blocks of Markdown; None is nothing.
    """

    title: str
    key: tuple[str, ...]
    fields: tuple[str, ...]
    section: Callable[[Run, Sheet], list[str]]
    across: Callable[[list[Run], Sheet], list[str]] | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        command: ``engine bench NAME``: its options, what it loads, measures and writes.
        reported: Its records; None where it writes none that `engine bench report` reads.
    """

    command: click.Command
    reported: Reported | None = None
