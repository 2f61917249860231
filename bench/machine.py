"""What a measurement was made on, and how much memory a process took at its peak."""

import platform
import re
import resource
from pathlib import Path
from typing import Any

from tmm_engine.info import describe_system


def describe_machine() -> dict[str, Any]:
    """Processor, and the versions and devices of `engine info --system`."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {"processor": names[0] if names else platform.processor(), **describe_system()}


def reset_peak_memory() -> None:
    """Let `peak_memory_mib` count from now on, where the system can (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def memory_mib() -> float:
    """What the process holds now."""
    return _status("VmRSS")


def peak_memory_mib() -> float:
    """The most that the process held since the last reset."""
    return _status("VmHWM")


def _status(field: str) -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    match = re.search(rf"{field}:\s*(\d+) kB", status.read_text())
    assert match, f"{field} is not in {status}"
    return int(match[1]) / 1024
