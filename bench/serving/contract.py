"""The server's OpenAPI held to its answers by schemathesis, which generates requests from it."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tmm_engine.index.errors import InputError

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
PHASES = "examples,coverage,fuzzing"


@dataclass(frozen=True, slots=True)
class Contract:
    """What came of it.

    Attributes:
        failures: Checks that failed, as operation and check.
        statuses: How often an operation was answered so.
    """

    failures: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def cases(self) -> int:
        """Requests that were made."""
        return self.statuses.total()

    def records(self) -> list[dict[str, Any]]:
        """Raw: a line for every operation and answer, and for every check that failed."""
        counted = (("answer", self.statuses), ("failure", self.failures))
        return [
            {"part": "contract", "kind": kind, "what": what, "count": count}
            for kind, counter in counted
            for what, count in sorted(counter.items())
        ]


def measure_contract(
    address: str, name: str, *, examples: int, seconds: int, seed: int = 0, phases: str = PHASES
) -> Contract:
    """Requests from the server's own description, right ones and wrong ones.

    Args:
        address: Of the server.
        name: Of its collection, which is put into the description: others would mostly not be there.
        examples: At most, of each operation and kind.
        seconds: At most.
        seed: Of what is generated.
        phases: Of schemathesis, separated by commas.

    Raises:
        InputError: schemathesis is not installed, or does not run.
    """
    command = Path(sys.executable).with_name("schemathesis")
    if not command.exists():
        raise InputError("needs schemathesis: pip install 'schemathesis>=4'")
    with tempfile.TemporaryDirectory() as folder:
        description, report = Path(folder) / "openapi.json", Path(folder) / "events.ndjson"
        description.write_text(json.dumps(_about(httpx.get(f"{address}/openapi.json").json(), name)))
        arguments = [
            *("run", str(description), "--url", address, "--checks", CHECKS, "--phases", phases),
            *("--max-examples", str(examples), "--seed", str(seed)),
            *("--report", "ndjson", "--report-ndjson-path", str(report), "--continue-on-failure", "--no-shrink"),
            *("--suppress-health-check", "all", "--request-timeout", "60", "--warnings", "off"),
        ]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([str(command), *arguments], cwd=folder, capture_output=True, timeout=seconds, check=False)
        if not report.exists():
            raise InputError(f"schemathesis did not run; try it: {command} {' '.join(arguments)}")
        *lines, last = report.read_text("utf-8").split("\n")
        return _counted(json.loads(line) for line in (*lines, last) if line.endswith("}"))


def _about(description: dict[str, Any], name: str) -> dict[str, Any]:
    """The description, of this collection."""
    for operations in description["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if (parameter["in"], parameter["name"]) == ("path", "name"):
                    parameter["schema"]["enum"] = [name]
    for schema in description["components"]["schemas"].values():
        if "like" in schema.get("properties", {}):
            schema["properties"]["like"] = {"type": "string", "enum": [name]}
    return description


def _counted(events: Iterable[dict[str, Any]]) -> Contract:
    """Of the events that schemathesis reports; 503 is how a server with too much to do answers, and no error of its."""
    found = Contract()
    for recorder in (event["ScenarioFinished"]["recorder"] for event in events if "ScenarioFinished" in event):
        statuses = {
            case: (interaction.get("response") or {}).get("status_code", "no answer")
            for case, interaction in recorder.get("interactions", {}).items()
        }
        for status in statuses.values():
            found.statuses[f"{recorder['label']}: {status}"] += 1
        for case, checks in recorder.get("checks", {}).items():
            for check in checks:
                busy = statuses.get(case) == 503 and check["name"] == "not_a_server_error"
                if check["status"] != "success" and not busy:
                    found.failures[f"{recorder['label']}: {check['name']}"] += 1
    return found
