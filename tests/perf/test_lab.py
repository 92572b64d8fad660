"""The performance lab itself: it measures, leaves nothing behind, and says what went wrong."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.perf import fio, results
from benchmarks.perf.workloads import all_workloads, chosen
from tests.support import areas
from tests.support.worker import REPOSITORY

_WORKLOADS = all_workloads(1000)
_PATIENCE = 60.0


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.perf", *map(str, words)]


def _lab(*words: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*words), cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
    )  # fmt: skip


@pytest.fixture
def place(kernel_overlay: None, filesystem: Callable[..., Path]) -> Iterator[Path]:
    """A directory for layers; in the end nothing is mounted there, no file is left, and no process has it.

    In memory, so that fsync takes no time.
    """
    where = filesystem("tmpfs", 4 << 30) / "layers"
    where.mkdir()
    yield where
    assert areas.mounts_below(where) == []
    assert list(where.iterdir()) == []
    assert _processes_with(where) == []


def _processes_with(where: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if os.fsencode(where) in words and int(entry.parent.name) != os.getpid():
            found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


def _start(place: Path, *words: str | Path) -> subprocess.Popen[str]:
    """A long run, of which some turns are over."""
    process = subprocess.Popen(
        _command("--quick", "--on", place, "--only", "find", "untar", "--rounds", "200",
                 "--contestant", "overlayfs", "cached", *words),
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + _PATIENCE
    try:
        # Two turns to try, one to warm up, then those that count.
        while not any(int(turn.name[4:]) > 5 for turn in place.glob("*/turn*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.communicate()
        raise
    return process


def test_run(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    done = _lab(
        "--quick", "--on", place, "--size", "8", "--rounds", "2", "--json", file,
        "--only", "find", "untar", "copy-up", "mount",
        "--contestant", "plain", "overlayfs", "mergerfs", "cached",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where no terminal is

    run = results.load(file)
    assert run.complete
    assert run.missing == {}
    assert run.results.failures == {}
    counts = {
        figure.name: {name: len(samples) for name, samples in by_name.items()}
        for figure, by_name in run.results.samples.items()
    }
    everybody = {"plain", "overlayfs", "mergerfs", "cached"}
    assert counts == {
        "find": dict.fromkeys(everybody, 2),
        "untar": dict.fromkeys(everybody - {"mergerfs"}, 2),
        "copy-up": {"overlayfs": 2, "cached": 2},
        "mount": dict.fromkeys(everybody - {"plain"}, 2),
    }
    assert run.results.skipped["untar", "mergerfs"] == "it has no copy-up"
    assert ("copy-up", "plain") in run.results.skipped
    for by_name in run.results.samples.values():
        assert all(value > 0 for samples in by_name.values() for value in samples)
    for figure in run.results.samples:
        assert run.best_peer(figure) in ("mergerfs", None)
    each = run.results.daemons["untar"]["cached"].requests_each()
    assert each is not None
    assert each > 1  # no file can be made with less than one request
    for word in ("mergerfs", "untar", "per entry", "copy-up"):
        assert word in done.stdout


def test_all_that_is_quick_can_be_done(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    names = [each.name for each in _WORKLOADS if each.quick and each.group != "fio"]
    done = _lab(
        "--quick", "--on", place, "--size", "8", "--json", file, "--contestant", "overlayfs", "--only", *names
    )
    assert done.returncode == 0, done.stderr
    run = results.load(file)
    assert run.results.failures == {}
    measured = {figure.name for figure in run.results.samples}
    without_npm = {"npm-install"} if shutil.which("npm") is None else set()
    wanted = {figure.name for each in _WORKLOADS if each.name in names for figure in each.figures}
    assert measured == wanted - without_npm
    assert {workload for workload, _ in run.results.skipped} == without_npm


def test_failure(place: Path, tmp_path: Path) -> None:
    """What fails has no figure, and its reason is told; all else is measured."""
    programs = tmp_path / "bin"
    programs.mkdir()
    broken = programs / "du"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    broken.chmod(0o755)
    file = tmp_path / "run.json"
    done = _lab(
        "--quick", "--on", place, "--json", file, "--only", "du", "find",
        "--contestant", "overlayfs", "cached",
        path=f"{programs}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason = "du ended with 3: no such luck"
    assert f"du on cached failed: {reason}" in done.stdout
    run = results.load(file)
    assert run.results.failures == {("du", "overlayfs"): reason, ("du", "cached"): reason}
    assert [figure.name for figure in run.results.samples] == ["find"]


def test_wrong_work_is_a_failure(place: Path, tmp_path: Path) -> None:
    """A program that ends well without having done its work is not measured."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "chmod").symlink_to(shutil.which("true") or "true")
    done = _lab(
        "--quick", "--on", place, "--only", "chmod", "--contestant", "overlayfs",
        path=f"{programs}:{os.environ['PATH']}",
    )  # fmt: skip
    assert "chmod on overlayfs failed: after chmod this check fails" in done.stdout


def test_missing_contestant(place: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    broken = programs / "fuse-overlayfs"
    broken.write_text("#!/bin/sh\necho cannot today >&2\nexit 1\n")
    broken.chmod(0o755)
    done = _lab(
        "--quick", "--on", place, "--only", "find", "--contestant", "overlayfs", "fuse-overlayfs",
        path=f"{programs}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "missing: ended with 1: cannot today" in " ".join(done.stdout.split())


def test_interrupt(place: Path, tmp_path: Path) -> None:
    """Ctrl-C: what was measured is shown and written, and nothing stays."""
    file = tmp_path / "run.json"
    process = _start(place, "--json", file)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Interrupted; what was measured until then:" in output
    assert "Traceback" not in output
    run = results.load(file)
    assert not run.complete
    assert run.results.samples


def test_next_run_removes_what_a_killed_one_left(place: Path) -> None:
    process = _start(place)
    process.kill()
    process.communicate(timeout=_PATIENCE)
    assert list(place.iterdir()) != []
    done = _lab("--quick", "--on", place, "--only", "find", "--contestant", "overlayfs")
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + _PATIENCE
    while _processes_with(place):  # the daemon, which ends when it sees that its mount is gone
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nonsense"], "--nonsense"),
        (["--only", "no-such-thing"], "there is no workload or group no-such-thing"),
        (["--contestant", "zfs"], "there is no contestant zfs"),
        (["--rounds", "0"], "0 is not a whole number above 0"),
        (["--seconds", "many"], "many is not a number from 0.01 to 60"),
        (["--quick", "--full"], "not allowed with"),
        (["--json", "/no/such/place"], "/no/such/place cannot be written: No such file or directory"),
        (["--on", "/no/such/place"], "--on /no/such/place: there is no such directory"),
        (["--on", "/etc/passwd"], "--on /etc/passwd: not a directory"),
        (["--on", "/proc"], "--on /proc: nothing can be made in it"),
        (["--only", "copy-up", "--size", "100000000"], "has too little room"),
    ],
)
def test_bad_options(root: None, words: list[str], said: str) -> None:
    done = _lab(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("scripts/perf: ")
    assert said in done.stderr


def test_on_a_disk(kernel_overlay: None, filesystem: Callable[..., Path], tmp_path: Path) -> None:
    """On a filesystem with a page cache of its own there is direct I/O; in memory there is none, and why."""
    disk, file = filesystem("ext4", 1 << 30), tmp_path / "run.json"
    words = ("--quick", "--size", "8", "--only", "lower-randread-4k-direct", "--contestant", "overlayfs")
    done = _lab(*words, "--on", disk, "--json", file)
    assert done.returncode == 0, done.stderr
    run = results.load(file)
    assert run.machine["filesystem"] == "ext4"
    assert run.results.failures == run.results.skipped == {}
    assert run.results.samples
    assert [each.name for each in disk.iterdir()] == ["lost+found"]

    done = _lab(*words, "--on", filesystem("tmpfs", 1 << 30), "--json", file)
    assert done.returncode == 0, done.stderr
    run = results.load(file)
    assert not run.results.samples
    assert list(run.results.skipped) == [("lower-randread-4k-direct", None)]


def test_place_that_cannot_hold_layers(root: None, area: Path) -> None:
    for name in ("a:b", "a,b", "a b"):
        (area / name).mkdir()
        done = _lab("--on", area / name)
        assert done.returncode == 1
        assert "mount options cannot carry" in done.stderr
        assert list((area / name).iterdir()) == []


def test_names_are_unique() -> None:
    names = [each.name for each in _WORKLOADS]
    assert len(names) == len(set(names))
    figures = [(figure.group, figure.name) for each in _WORKLOADS for figure in each.figures]
    assert len(figures) == len(set(figures))


def test_choice() -> None:
    usual = chosen(_WORKLOADS, [])
    assert {each.group for each in usual} == {"fio", "files", "metadata", "programs", "scale", "nodes"}
    assert chosen(_WORKLOADS, [], full=True) == list(_WORKLOADS)
    quick = chosen(_WORKLOADS, [], quick=True)
    assert 0 < len(quick) < len(usual)
    assert [each.name for each in chosen(_WORKLOADS, ["du", "fi[n]d"])] == ["find", "du"]
    assert {each.group for each in chosen(_WORKLOADS, ["lower-*"])} == {"fio", "fio-matrix", "files"}
    with pytest.raises(ValueError, match="gone"):
        chosen(_WORKLOADS, ["find", "gone*"])


def test_matrix_is_whole() -> None:
    """Every combination that can be is a workload, by default or in the matrix."""
    kinds = {
        (each.layer, each.pattern, each.block, each.engine, each.jobs) for each in (*fio.KINDS, *fio.MATRIX)
    }
    reads, writes = ("seqread", "randread"), ("seqwrite", "randwrite")
    engines, blocks, jobs = ("psync", "uring", "mmap", "direct"), ("4k", "128k", "1m"), (1, 4)
    wanted = {
        *itertools.product(("lower", "copied-up", "new"), reads, blocks, engines, jobs),
        *itertools.product(("copied-up",), writes, blocks, engines, jobs),
        *itertools.product(("new",), writes, blocks, ("psync", "uring", "direct"), jobs),
    }
    assert wanted <= kinds
    assert any(kind.fsync for kind in fio.KINDS)
