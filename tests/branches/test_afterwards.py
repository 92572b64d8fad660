"""What `unionfs try` does after the command: the answer, the report, and what is in its way."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.branches.branching import Branching
from tests.branches.test_try import _Box, started
from tests.mount import cli_calls
from tests.mount.cli_calls import refused, wait_for
from tests.mount.run_calls import Terminal
from tests.support import areas, mounting


@pytest.fixture
def filled(branching: Branching) -> Branching:
    (branching.base / "a").write_text("a\n")
    return branching


def test_the_answer_counts_after_a_failure(filled: Branching) -> None:
    terminal = Terminal(_Box(filled), "-n", "q", "--", "sh", "-c", "echo two > a; exit 3")
    terminal.wait_for(b"iscard?")
    terminal.type(b"c\n")
    terminal.wait_for(b"committed q")
    assert terminal.end() == 3
    assert (filled.base / "a").read_text() == "two\n"


def test_no_commit_has_a_reason(filled: Branching) -> None:
    for options in ([], ["-q"]):
        words = ["try", "-n", "q", *options, "--commit", "--", "sh", "-c", "echo two > a; exit 5"]
        done = filled.unionfs(*words)
        assert done.returncode == 5
        sentence = "unionfs: branch q was not committed, since the command's exit code is 5.\n"
        assert sentence in done.stderr
    assert filled.stored() == ["branches/q"]
    assert (filled.base / "a").read_text() == "a\n"


def test_a_removed_working_directory(filled: Branching, area: Path) -> None:
    """The command starts in the base; without one there is a sentence, and no branch."""
    gone = 'mkdir "$0"; cd "$0"; rmdir "$0"; exec "$@"'

    def unionfs(*words: str | Path) -> cli_calls.Done:
        return cli_calls.call(
            ("sh", "-c", gone, str(area / "gone"), *mounting.command()), *words,
            env={"UNIONFS_ROOT": str(filled.root)},
        )  # fmt: skip

    def call(*words: str | Path) -> cli_calls.Done:
        return unionfs("try", "-q", "--keep", *words)

    done = call("-n", "br", "-D", filled.base, "--", "sh", "-c", "pwd; echo > n")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{filled.base}\n", "")
    assert call("-n", "br", "-D", filled.base, "--", "cat", "n").stdout == "\n"
    refused(call("-n", "other", "--", "true"), "the base . cannot be used: no such file or directory")
    refused(call("-n", "other", "-D", "below", "--", "true"), "the base below cannot be used")
    assert filled.stored() == ["branches/br"]
    refused(unionfs("branch", "mount", "br", "mnt"), "is a relative path, but the current directory is gone")


@pytest.mark.parametrize("make", [
    pytest.param(lambda place: place / "none/report", id="no directory"),
    pytest.param(lambda place: place, id="a directory"),
    pytest.param(lambda place: Path("/proc/report"), id="not creatable"),
])  # fmt: skip
def test_a_report_that_cannot_be_written(
    filled: Branching, area: Path, make: Callable[[Path], Path]
) -> None:
    """It is refused before the command runs, or else the end is as without it."""
    report = make(area)
    done = filled.unionfs("try", "-n", "q", "--report", report, "--", "sh", "-c", "echo ran; echo two > a")
    assert f"the report {report} cannot be written: " in done.stderr
    if done.stdout:
        assert "kept as branch q" in done.stderr
    else:
        assert done.returncode == 1
        assert filled.stored() == []


def test_another_namespace_has_the_mount(filled: Branching) -> None:
    """The try detaches its mount, so there is nothing to stop for the user."""
    script = "trap 'exit 9' TERM; echo two > a; echo; while :; do sleep .1; done"
    with started(filled, "-q", "--keep", "-n", "br", "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        words = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 100"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout is not None
                other.stdout.readline()
                merged = f"{filled.root}/branches/br/merged"
                assert merged in Path(f"/proc/{other.pid}/mountinfo").read_text()
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 9
                assert process.stderr.read() == ""
                assert areas.mounts_below(filled.area) == []
            finally:
                other.kill()
    assert wait_for(lambda: filled.unionfs("branch", "discard", "br").returncode == 0)
