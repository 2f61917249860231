"""Dockerfile and compose.yaml agree with the code; building them needs a daemon, which tests do not have."""

import re
import tomllib
from pathlib import Path

import click
import yaml

from tmm_engine.cli.main import main

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parsed(arguments: list[str]) -> dict[str, object]:
    """What the command line makes of what a container is started with."""
    name, *rest = arguments
    command = main.commands[name]
    return command.make_context(name, rest, parent=click.Context(main)).params


def instruction(name: str) -> list[str]:
    [text] = re.findall(rf"^{name} (?:.*?CMD )?(\[.*\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    return yaml.safe_load(text)


def test_the_dockerfile_asks_for_the_floors_and_extras_of_the_project():
    floors = [each for each in PROJECT["dependencies"] if each.startswith("torch")]
    assert re.findall(r'"(torch\w*>=[\d.]+)"', DOCKERFILE) == floors
    [extras] = re.findall(r'pip install "\.\[(.*)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_all_that_is_copied_into_the_image_reaches_the_builder():
    copied = [name for line in re.findall(r"^COPY ([^-].*)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(let_in)


def test_containers_start_the_server_where_others_reach_it():
    for command in (instruction("CMD"), COMPOSE["services"]["engine"]["command"]):
        assert parsed(command)["host"] == "0.0.0.0"
        assert parsed(command)["port"] == 8000
    assert "http://127.0.0.1:8000/livez" in " ".join(instruction("HEALTHCHECK"))
    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE) == ["8000"]


def test_prometheus_scrapes_the_server():
    [job] = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["engine:8000"]}]


def test_nothing_runs_as_root_or_needs_a_root_that_can_be_written():
    assert re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE) == ["10001"]
    for service in COMPOSE["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
