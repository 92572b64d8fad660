"""How soon changes of a lower show in a union that is mounted with --watch-lower.

    python -m benchmarks.live_lowers [--rounds N] [--files N] [--session S] [--io MODE]

The kernel has cached all names, attributes and contents of a tree of files. Prints, in milliseconds:

- for single changes, the time from the end of the system call until the union shows it (a reader asks all the
  time): median, 99th percentile and worst;
- for a `git checkout` that changes all files, how long it takes without a union, with an idle union, and with
  one whose files are read all the time; when an old file was last seen after its end, as all are read; and
  how old the states are that the reader saw meanwhile: the time since the file was changed (its ctime).
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SECONDS = 10.0
_GIT = ("git", "-c", "user.name=n", "-c", "user.email=e", "-c", "gc.auto=0")


@contextmanager
def _mounted(root: Path, words: list[str]) -> Iterator[Path]:
    layers = ["-l", str(root / "lower"), "-u", str(root / "upper"), "-w", str(root / "work")]
    merged = root / "merged"
    program = [sys.executable, "-m", "unionfs"]
    subprocess.run([*program, "mount", *layers, *words, "--watch-lower", str(merged)], check=True)
    try:
        yield merged
    finally:
        subprocess.run([*program, "umount", str(merged)], check=False)


def _names(files: int) -> list[str]:
    return [f"d{number % 50}/f{number}" for number in range(files)]


def _until(shows: Callable[[], bool]) -> float:
    """The time until a change shows, in milliseconds."""
    began = time.perf_counter()
    while not shows():
        if time.perf_counter() - began > _SECONDS:
            raise RuntimeError(f"a change did not show within {_SECONDS:.0f} seconds")
    return (time.perf_counter() - began) * 1e3


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _singles(lower: Path, merged: Path, names: list[str], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    kinds = ("edit", "edit (mapped)", "append", "chmod", "replace by rename", "delete", "create")
    for number in range(rounds):
        name = random.choice(names)
        here, there = lower / name, merged / name
        with there.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for kind in kinds:
                time.sleep(random.uniform(0, 0.02))
                text = f"{kind} {number}".ljust(63) + "\n"
                if kind.startswith("edit"):
                    fd = os.open(here, os.O_WRONLY)
                    os.write(fd, text.encode())
                    os.close(fd)
                elif kind == "append":
                    with here.open("a") as appending:
                        appending.write(text)
                elif kind == "chmod":
                    here.chmod(0o600 if number % 2 else 0o640)
                elif kind == "delete":
                    here.unlink()
                elif kind == "create":
                    here.write_text(text)
                else:
                    new = here.with_name("new")
                    new.write_text(text)
                    new.rename(here)
                if kind == "edit (mapped)":
                    took = _until(lambda: mapped[: len(text)] == text.encode())  # noqa: B023
                elif kind == "chmod":
                    took = _until(lambda: there.stat().st_mode == here.stat().st_mode)  # noqa: B023
                elif kind == "delete":
                    took = _until(lambda: not there.exists())  # noqa: B023
                else:
                    took = _until(lambda: text in _text(there))  # noqa: B023
                found.setdefault(kind, []).append(took)
    return found


def _write_all(lower: Path, names: list[str], text: str) -> None:
    for name in names:
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text(f"{text} {name}".ljust(63) + "\n")


def _make_branches(root: Path, names: list[str]) -> tuple[str, ...]:
    """Two branches in which every file differs; returns the start of git's command line."""
    git = (*_GIT, "--git-dir", str(root / "git"), "--work-tree", str(root / "lower"))
    subprocess.run([*git, "init", "-q", "-b", "one"], check=True)
    for branch in ("one", "two"):
        if branch == "two":
            subprocess.run([*git, "checkout", "-q", "-b", branch], check=True)
        _write_all(root / "lower", names, branch)
        for words in (("add", "-A"), ("commit", "-q", "-m", branch)):
            subprocess.run([*git, *words], check=True)
    return git


def _age(lower: Path, merged: Path, name: str, new: str) -> float | None:
    """The age of the state that the union shows, in milliseconds, if the lower's file has changed already."""
    try:
        changed = os.stat(lower / name).st_ctime_ns
        if not _text(lower / name).startswith(new):
            return None
    except FileNotFoundError:
        return None
    asked = time.time_ns()
    return 0.0 if _text(merged / name).startswith(new) else (asked - changed) / 1e6


def _checkout(
    lower: Path, merged: Path, names: list[str], git: tuple[str, ...], branch: str, *, reads: bool
) -> tuple[float, float, list[float]]:
    """The times of the checkout and until the union shows all, and the ages of what the reader saw."""
    for name in names:
        _text(merged / name)
    ages: list[float] = []
    began = time.perf_counter()
    with subprocess.Popen([*git, "checkout", "-q", branch]) as process:
        while process.poll() is None:
            if not reads:
                time.sleep(0.001)
                continue
            age = _age(lower, merged, random.choice(names), branch)
            if age is not None:
                ages.append(age)
    took = (time.perf_counter() - began) * 1e3
    ended, last = time.perf_counter(), 0.0
    for name in names:
        while not _text(merged / name).startswith(branch):
            last = (time.perf_counter() - ended) * 1e3
            if last > _SECONDS * 1e3:
                raise RuntimeError(f"{name} did not show within {_SECONDS:.0f} seconds")
    return took, last, ages


def _line(what: str, values: list[float]) -> str:
    percent = statistics.quantiles(values, n=100, method="inclusive")
    return f"{what:44} {percent[49]:8.1f} {percent[98]:8.1f} {max(values):8.1f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--checkouts", type=int, default=10)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--session", default="auto")
    parser.add_argument("--io", default="auto")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="live-lowers-", dir="/dev/shm"))
    try:
        for name in ("lower", "upper", "work", "merged"):
            (root / name).mkdir()
        lower, names = root / "lower", _names(arguments.files)
        git = _make_branches(root, names)
        alone = []
        for branch in ("one", "two"):
            began = time.perf_counter()
            subprocess.run([*git, "checkout", "-q", branch], check=True)
            alone.append((time.perf_counter() - began) * 1e3)
        words = ["--session", arguments.session, "--io", arguments.io]
        with _mounted(root, words) as merged:
            results = []
            for number in range(2 * arguments.checkouts):
                branch, reads = ("one", "two")[number % 2], number // 2 % 2 == 1
                results.append((reads, *_checkout(lower, merged, names, git, branch, reads=reads)))
            for name in names:
                _text(merged / name)
            singles = _singles(lower, merged, names, arguments.rounds)
        print(f"{'':44} {'median':>8} {'p99':>8} {'worst':>8}")
        for kind, values in singles.items():
            print(_line(kind, values))
        print(_line("checkout, without a union", alone))
        for reads, how in ((False, "idle"), (True, "busy")):
            of = [result for result in results if result[0] == reads]
            print(_line(f"checkout, {how} union", [took for _, took, *_ in of]))
            print(_line("  old files seen after it until", [last for *_, last, _ in of]))
        ages = [age for *_, seen in results for age in seen]
        print(_line(f"  age of {len(ages)} states seen meanwhile", ages))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
