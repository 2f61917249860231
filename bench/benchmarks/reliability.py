"""What is lost or wrong when writers are killed, files damaged, disks full? The command."""

import click

from tmm_engine.bench.benchmark import Benchmark
from tmm_engine.bench.reliability.bench import ReliabilityBench, print_reliability
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import IndexStateError


@click.command("reliability")
@click.option("--trials", type=click.IntRange(min=0), default=200, show_default=True, help="Writers killed.")
@click.option("--cases", type=click.IntRange(min=0), default=2100, show_default=True, help="Hostile inputs generated.")
@click.option("--searches", type=click.IntRange(min=1), default=500, show_default=True, help="In one process.")
@click.option("--rows", type=click.IntRange(min=10), default=2000, show_default=True, help="That a filter leaves.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def command(*, as_json: bool, **options: int) -> None:
    """What is lost or wrong under faults and hostile input? Writers are killed, disks filled. Exit code 1 if anything.

    \b
    Examples:
      engine bench reliability --json
      engine bench reliability --trials 10 --cases 70 --searches 50 --rows 200
    """
    with progress_bar() as progress:
        result = ReliabilityBench(**options, progress=progress).run()
    print_reliability(result, as_json=as_json)
    if result.failures:
        raise IndexStateError(f"{len(result.failures)} failures, see above")


BENCHMARK = Benchmark(command)
