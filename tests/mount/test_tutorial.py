"""Every command of docs/tutorial.md prints what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.run_calls import cleaned
from tests.support.patience import patient

_PAGE = cli_calls.REPOSITORY / "docs/tutorial.md"


def _steps() -> list[tuple[str, str]]:
    """The commands with what they print."""
    steps: list[tuple[str, list[str]]] = []
    is_open = False
    for line in _PAGE.read_text().splitlines():
        if line.startswith("    $ "):
            steps.append((line[6:], []))
            is_open = True
        elif is_open and line.startswith("    "):
            steps[-1][1].append(line[4:])
        elif line:
            is_open = False
        elif is_open:
            steps[-1][1].append("")
    return [(command, "\n".join(lines).strip()) for command, lines in steps]


@pytest.fixture
def home(root: None, area: Path) -> Path:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    (area / "bin").mkdir()
    program = area / "bin/unionfs"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m unionfs "$@"\n')
    program.chmod(0o755)
    (area / "here").mkdir()
    return area


@pytest.mark.slow
def test_the_tutorial(home: Path) -> None:
    environment = {
        **os.environ, "UNIONFS_ROOT": str(home / "storage"), "LC_ALL": "C", "HOME": str(home),
        "PATH": f"{home}/bin:{os.environ['PATH']}", "PYTHONPATH": str(cli_calls.REPOSITORY),
    }  # fmt: skip
    steps = _steps()
    assert len(steps) > 40
    with cleaned(home):
        for command, expected in steps:
            done = subprocess.run(
                ["sh", "-c", command], cwd=home / "here", env=environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=patient(60),
            )  # fmt: skip
            pattern = re.escape(expected).replace(re.escape("..."), ".*")
            assert re.fullmatch(pattern, done.stdout.strip(), re.DOTALL), (command, done.stdout)
