"""The tests of a change: those that execute the changed block, the likely and quick ones first.

What each test executes is recorded once for each file of tests, and again when that file has changed; it is
kept in .mutants.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final

import mutants_blocks

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SESSIONS: Final = ("direct-hybrid", "direct-cached", "pyfuse3", "direct-passthrough")
"""A test that runs on several of these is tried first on the first of those that execute the block."""
_KEPT: Final = REPOSITORY / ".mutants.json"
_SESSION: Final = re.compile("|".join(SESSIONS))


def copy_repository(place: Path) -> None:
    """Copy what the tests need."""
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(REPOSITORY, place, ignore=ignored, symlinks=True)


def run_pytest(copy: Path, arguments: list[str], seconds: float, environment: dict[str, str]) -> int:
    """Run pytest in a copy of the repository; returns its exit code, 1 if it takes longer.

    Its mounts and processes end with it: like the tests' workers it has its own mount and PID namespaces.
    """
    enclosure = [sys.executable, str(REPOSITORY / "tests/support/enclosure.py")]
    words = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    # Without bytecode every process would compile the package again.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        [*(enclosure if os.geteuid() == 0 else enclosure[:1]), *words], cwd=copy, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**inherited, "PYTHONPATH": str(copy), **environment},
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Record:
    """Which test executes which blocks, and how long it takes."""

    def __init__(self) -> None:
        """Read what is kept."""
        kept: dict[str, Any] = json.loads(_KEPT.read_text()) if _KEPT.exists() else {}
        self._files: dict[str, str] = kept.get("files", {})
        self._seconds: dict[str, float] = kept.get("seconds", {})
        self._blocks: dict[str, list[str]] = kept.get("blocks", {})
        self._tests: dict[str, set[str]] = defaultdict(set)
        for test, blocks in self._blocks.items():
            self._note(test, blocks)

    def _note(self, test: str, blocks: list[str]) -> None:
        for block in blocks:
            for key in (block, block.partition("#")[0]):  # the block, and its function
                self._tests[key].add(test)

    def update(self, files: set[Path]) -> None:
        """Run the files of tests that have changed since."""
        digests = {
            str(file.relative_to(REPOSITORY)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        }
        new = sorted(
            (name for name, digest in digests.items() if self._files.get(name) != digest),
            key=lambda name: (not name.startswith("tests/unit"), name),
        )
        if not new:
            return
        print(f"recording what {len(new)} files of tests execute", flush=True)
        with tempfile.TemporaryDirectory(prefix="unionfs-mutants-") as place:
            copy, notes = Path(place, "copy"), Path(place, "notes")
            copy_repository(copy)
            Path(place).chmod(0o755)
            notes.mkdir()
            notes.chmod(0o777)  # in a sticky one nobody may append to another user's file (proc_sys_fs(5))
            found = mutants_blocks.instrument(copy / "unionfs")
            block_names = {
                number: f"{module}:{name}" for module, blocks in found.items() for name, number in blocks
            }
            shutil.copy(Path(__file__).with_name("mutants_plugin.py"), copy)
            for name in new:
                self._record(copy, notes, name, block_names)
                self._files[name] = digests[name]
                self._keep()

    def _record(self, copy: Path, notes: Path, name: str, block_names: dict[int, str]) -> None:
        report = notes / "report"
        environment = {
            mutants_blocks.PLACE: str(notes),
            "UNIONFS_MUTANTS_REPORT": str(report),
            "UNIONFS_TEST_SESSIONS": ",".join(SESSIONS),
        }
        run_pytest(copy, ["-p", "mutants_plugin", name], 1800, environment)
        for test in [test for test in self._blocks if test.partition("::")[0] == name]:
            del self._blocks[test], self._seconds[test]
            for tests in self._tests.values():
                tests.discard(test)
        for line in report.read_text().splitlines() if report.exists() else ():
            seconds, passed, test = json.loads(line)
            file = notes / mutants_blocks.file_of(test)
            if passed:
                self._seconds[test] = seconds
                executed = mutants_blocks.numbers(file.read_bytes()) if file.exists() else set()
                self._blocks[test] = sorted(block_names[number] for number in executed)
                self._note(test, self._blocks[test])
        report.unlink(missing_ok=True)

    def _keep(self) -> None:
        new = _KEPT.with_suffix(".new")
        new.write_text(
            json.dumps({"files": self._files, "seconds": self._seconds, "blocks": self._blocks}, indent=0)
        )
        new.replace(_KEPT)

    def tests(
        self, module: str, block: str | None, seconds: float, files: set[str]
    ) -> tuple[list[str], float]:
        """The tests in ``files`` to run for a change in a block, and their duration.

        Together they take about ``seconds``: those without a mount, then those named like the module, then
        the quickest of each file, and so on. For an unknown block, those of its function; for one outside of
        functions (None), or if no test is known to execute anything of the module, any.
        """
        key = f"{module}:{block}"
        # A test may read a constant without a call, and a process without an environment notes nothing.
        if block is None or not any(tests for name, tests in self._tests.items() if _module(name) == module):
            found = set(self._blocks)
        else:
            found = self._tests.get(key) or self._tests.get(key.partition("#")[0], set())
        about = Path(module).stem.rstrip("s")
        sessions: Counter[str] = Counter()
        of_file: Counter[str] = Counter()
        order = []
        for test in sorted((t for t in found if t.partition("::")[0] in files), key=self._cost):
            file = test.partition("::")[0]
            without = _SESSION.sub("", test)
            mounts = not file.startswith("tests/unit/")
            ranks = mounts, about not in test, sessions[without], of_file[file] if mounts else 0
            order.append((*ranks, self._cost(test), test))
            sessions[without] += 1
            of_file[file] += 1
        chosen: list[str] = []
        total = 0.0
        for *_, test in sorted(order):
            if chosen and total + self._seconds[test] > seconds:
                continue  # a quicker one may follow
            total += self._seconds[test]
            chosen.append(test)
        chosen.sort(key=lambda test: (not test.startswith("tests/unit"), test.partition("::")[0]))
        return chosen, total

    def _cost(self, test: str) -> tuple[int, float]:
        found = _SESSION.search(test)
        return SESSIONS.index(found[0]) if found else 0, self._seconds[test]


def _module(block: str) -> str:
    return block.partition(":")[0]
