"""What a user sees of long copies before a mount or a container starts: of volumes and of lowers."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, succeed, unionfs
from tests.mount.run_calls import Containers
from tests.support import mounting
from tests.support.terminals import read_to_end
from tests.support.worker import REPOSITORY

_SIZE = 300 << 20


@pytest.fixture
def large(place: Place) -> Path:
    """A file in the lower that takes a while to be copied."""
    path = place.lower / "data/large"
    path.parent.mkdir()
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _SIZE)
        for _ in range(_SIZE >> 20):
            file.write(b"x" * (1 << 20))
    return path


def test_filling_a_volume(place: Place, large: Path) -> None:
    """Lines on demand; a line of a terminal, which goes; nothing in a file."""
    environment = {"UNIONFS_ROOT": str(place.root / "store")}
    words = ["mount", "-l", place.lower, "-u", place.upper, "-w", place.work, "-v", "vol:/data", place.merged]
    for how, expected in (("plain", "unionfs: filling volume vol: done\n"), ("auto", ""), ("none", "")):
        done = unionfs(*words, "--progress", how, env=environment)
        assert (done.returncode, done.stdout) == (0, "")
        assert re.sub(r"unionfs: filling volume vol: .*B/s.*\n", "", done.stderr) == expected
        assert (place.merged / "data/large").stat().st_size == _SIZE
        succeed(unionfs("umount", place.merged))
        succeed(unionfs("volume", "rm", "vol", env=environment))
    # The daemon keeps no fd of the terminal, or this would not end.
    text = _on_terminal(words, environment)
    assert re.fullmatch(r"(filling volume vol: .*[━ ].*\r(\n\r\x1b\[1A)?\x1b\[2K)+|", text), text
    succeed(unionfs("umount", place.merged))


def test_copies_of_the_lowers(box: Containers) -> None:
    done = box.run("--storage-driver", "vfs", "--progress", "plain", "--", "true")
    assert done.returncode == 0
    assert done.stderr.endswith("unionfs: copying the lowers: done\n")
    assert box.run("--storage-driver", "vfs", "--", "true").stderr == ""


def _on_terminal(words: list[str | Path], environment: dict[str, str]) -> str:
    controller, terminal = pty.openpty()
    command = subprocess.Popen(
        [*mounting.command(), *words], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
        env={**os.environ, **environment}, cwd=REPOSITORY,
    )  # fmt: skip
    os.close(terminal)
    text = read_to_end(controller)
    assert command.wait() == 0, text
    return text.decode()
