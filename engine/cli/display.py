"""What a person sees in a terminal: progress on stderr, tables on stdout."""

import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich import markup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from tmm_engine.cli.wording import for_command_line
from tmm_engine.index.errors import visible
from tmm_engine.index.progress import Progress
from tmm_engine.results import Explanation, FailedQuery, SearchResult
from tmm_engine.views.reasons import reasons

if TYPE_CHECKING:
    from tmm_engine.classifying.classification import Classification
    from tmm_engine.index.store.changes import ChangeReport
    from tmm_engine.index.store.embedding import BuildReport
    from tmm_engine.index.store.syncing import SyncReport

FALLBACK_WIDTH = 120  # of a table that is not printed to a terminal
LOG_SECONDS = 30.0  # between two lines of progress in a log file


def escape(text: str) -> str:
    """A text in which nothing is Rich's markup or steers the terminal."""
    return markup.escape(visible(text))


class _RateColumn(ProgressColumn):
    """Images a second."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


class ProgressLog:
    """A `Progress` for a log file: of a step that takes long a line now and then, and one when it ends.

    Args:
        write: Takes a line.
        clock: Seconds, from any start.
    """

    def __init__(self, write: Callable[[str], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._step, self._done, self._started, self._written = "", 0, 0.0, 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        """As `Progress`."""
        now = self._clock()
        if step != self._step or done < self._done:  # another step, or a new round of the same
            self._step, self._started, self._written = step, now, now
        self._done = done
        ended = done == total and self._written > self._started
        if ended or now - self._written >= LOG_SECONDS:
            rate = done / max(now - self._started, 1e-9)
            self._write(f"{step}: {done:,} of {total:,}, {rate:,.3g}/s")
            self._written = now


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `Progress` that draws one bar a step on stderr, and removes them at the end; in a log file it writes lines."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as progress:
            yield progress
    else:
        yield ProgressLog(lambda line: click.echo(line, err=True))


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            task = tasks.get(step)
            if task is None or bars.tasks[bars.task_ids.index(task)].completed > done:  # a new round of the same step
                if task is not None:
                    bars.remove_task(task)
                task = tasks[step] = bars.add_task(step, total=total)
            bars.update(task, completed=done, total=total)

        yield show


def say_remarks(remarks: Iterable[str], *, said: Container[str] = ()) -> None:
    """On stderr, what a source of images guessed, left out or converted, but for what was said before."""
    for remark in remarks:
        if remark not in said:
            click.echo(f"note: {for_command_line(remark)}", err=True)


def say_skipped(report: "BuildReport | ChangeReport | SyncReport") -> None:
    """On stderr, which images were left out."""
    for image in report.skipped:
        click.echo(visible(f"skipped {image.id}: {image.reason}"), err=True)
    if report.skipped_count:
        click.echo(f"{report.skipped_count} images could not be read and were skipped", err=True)


def say_agreement(report: "BuildReport | ChangeReport | SyncReport") -> None:
    """On stderr, how far the model's predictions agree with the labels."""
    for sentence in report.agreement.sentences() if report.agreement else ():
        click.echo(sentence, err=True)


def print_result(result: SearchResult) -> None:
    """One result as a table on stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FALLBACK_WIDTH)
    truth = "" if result.true_class is None else f", labelled {escape(result.true_class)}"
    console.print(
        f"[bold]{escape(result.query)}[/bold] — {result.mode}: the model says {escape(result.predicted_class)}{truth}; "
        f"{result.scored:,} of {result.exemplars:,} exemplars scored in {result.seconds:.2f} s",
        highlight=False,
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("#", "score", *([result.confidence_word] if result.confidence_meaning else [])):
        table.add_column(heading, justify="right")
    told = any(hit.predicted_class != hit.class_name for hit in result.hits)
    for heading in ("label", *(["predicted"] if told else []), "id"):
        table.add_column(heading)
    for hit in result.hits:
        confidence = [] if hit.confidence is None else [f"{hit.confidence:.4f}"]
        label = escape(hit.class_name) + (" (predicted)" if hit.label_is_predicted else "")
        predicted = [escape(hit.predicted_class)] if told else []
        table.add_row(str(hit.rank + 1), f"{hit.score:.4f}", *confidence, label, *predicted, escape(hit.id))
    console.print(table)
    meanings = (f"score: {result.score_meaning}", result.confidence_meaning)
    console.print(f"[dim]{'; '.join(filter(None, meanings))}[/dim]", highlight=False)
    for note in result.notes:
        console.print(f"[dim]note: {escape(note)}[/dim]")
    if result.explanation is not None:
        _print_explanation(console, result.explanation)
    console.print()


def _print_explanation(console: Console, explanation: Explanation) -> None:
    """A line for each kind of exemplar."""
    for title, _, hits in reasons(explanation):
        found = ", ".join(f"{escape(hit.id)} ({escape(hit.class_name)}, {hit.score:.4g})" for hit in hits)
        console.print(f"{escape(title)}: {found or '–'}", highlight=False)
    for note in explanation.notes:
        console.print(f"[dim]note: {escape(note)}[/dim]")


def print_classified(answers: "Sequence[Classification | FailedQuery]") -> None:
    """Classifications as one table on stdout, and beneath it what is to be known of them, each once."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FALLBACK_WIDTH)
    table = Table("image", "class", box=None, header_style="dim", pad_edge=False)
    for heading in ("credibility", "confidence"):
        table.add_column(heading, justify="right")
    table.add_column("set")
    table.add_column("no answer, because")
    for answer in answers:
        if isinstance(answer, FailedQuery):
            table.add_row(escape(answer.query), "", "", "", "", escape(answer.error))
            continue
        inside = ", ".join(answer.prediction_set) or "–"
        doubt = escape(answer.abstains or "")
        numbers = (f"{answer.credibility:.3f}", f"{answer.confidence:.3f}")
        table.add_row(escape(answer.query), escape(answer.class_name), *numbers, escape(inside), doubt)
    console.print(table)
    known = [answer for answer in answers if not isinstance(answer, FailedQuery)]
    told = dict.fromkeys([answer.guarantee for answer in known] + [note for answer in known for note in answer.notes])
    for note in told:
        console.print(f"[dim]note: {escape(note)}[/dim]", highlight=False)


def print_descriptors(descriptors: dict[str, Any]) -> None:
    """What mode robust looks at, and the measurements by which it was chosen."""
    console = Console()
    weights = ", ".join(f"{weight:g} · {source}" for source, weight in descriptors["robust"].items())
    console.print(
        f"\nmode robust ranks by {weights}, over {descriptors['views']} views of an image\n"
        f"and recognises copies by {descriptors['recogniser']}",
        highlight=False,
    )
    if not descriptors["recognisers"]:
        console.print("the default: there were too few images to measure on", highlight=False)
        return
    title = (
        f"measured on {descriptors['sample']} of the images, {descriptors['changed']} of them changed "
        f"({', '.join(descriptors['changes'])})"
    )
    table = Table("recogniser", title=title, title_justify="left", box=None)
    table.add_column("finds itself (MRR)", justify="right")
    table.add_column("distance to the nearest other = 1", justify="right")
    for each in descriptors["recognisers"]:
        chosen = " (chosen)" if each["layer"] == descriptors["recogniser"] else ""
        table.add_row(each["layer"] + chosen, f"{each['mrr']:.3f}", f"{each['ratio']:.3f}")
    console.print(table)
    plain, *mixtures = descriptors["mixtures"]
    own = next(each for each in mixtures if _weights(each) == descriptors["robust"])
    table = Table("ranking by", title="neighbours of a changed image", title_justify="left", box=None)
    for heading in ("the same as before", "of its class, unchanged", "of its class, changed"):
        table.add_column(heading, justify="right")
    for name, each in (("features alone", plain), ("mode robust", own)):
        table.add_row(name, *(f"{each[key]:.3f}" for key in ("overlap", "label_clean", "label_noisy")))
    console.print(table)


def _weights(mixture: dict[str, Any]) -> dict[str, float]:
    return {name: weight for name, weight in mixture.items() if name not in ("overlap", "label_clean", "label_noisy")}


def print_fields(fields: dict[str, Any]) -> None:
    """Names and values in two columns on stdout."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name.replace("_", " "), escape(str(value)))
    console = Console()
    (console if console.is_terminal else Console(width=FALLBACK_WIDTH)).print(table)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows of the same fields on stdout, under their names."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console = Console()
    (console if console.is_terminal else Console(width=FALLBACK_WIDTH)).print(table)


def print_failure(failure: FailedQuery) -> None:
    """On stdout, in the place of a query's answer."""
    Console(width=FALLBACK_WIDTH).print(
        f"[bold]{escape(failure.query)}[/bold] — cannot be answered: {escape(failure.error)}\n", highlight=False
    )
