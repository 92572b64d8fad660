"""What figures depend on besides the contestants: the host, and the workloads' programs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.perf.results import Scalar

_TOOLS = {
    "fio": "--version", "find": "--version", "tar": "--version", "git": "--version", "gcc": "--version",
    "make": "--version", "sqlite3": "--version", "node": "--version", "npm": "--version",
}  # fmt: skip


def machine(base: Path, filesystem: str) -> dict[str, Scalar]:
    """Facts of the host by name; `base` is where the layers are."""
    model, memory = "unknown", 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) // 1024
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        system = "unknown"
    return {
        "kernel": platform.release(),
        "system": system,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "cpu": model,
        "memory_mib": memory,
        "layers": str(base),
        "filesystem": filesystem,
        "tools": _tools(),
    }


def _tools() -> str:
    """Versions of the workloads' programs; without missing ones."""
    found = []
    for name, word in _TOOLS.items():
        if shutil.which(name) is None:
            continue
        try:
            done = subprocess.run(
                [name, word], capture_output=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL, timeout=30,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            continue
        if match := re.search(r"\d+(\.\d+)+", done.stdout):
            found.append(f"{name} {match[0]}")
    return ", ".join(found)
