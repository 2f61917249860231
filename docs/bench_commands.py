"""The group `engine bench` with its commands loaded: the command line imports each only when it runs."""

import click

from tmm_engine.bench.cli import bench as lazily
from tmm_engine.bench.registry import SUMMARIES, load

loaded = {name: load(name).command if name in SUMMARIES else command for name, command in lazily.commands.items()}
bench = click.Group("bench", commands=loaded, help=lazily.help)
