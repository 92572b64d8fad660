"""Makes small wrong changes to a module and looks whether a test notices; see scripts/mutants."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shlex
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import mutants_core
from mutants_blocks import block_at
from mutants_changes import REPOSITORY, Finder, Mutant
from mutants_tests import SESSIONS, Record, copy_repository, run_pytest

ENOUGH: Final = 0.85
_TIMES: Final = itertools.count(1)
Choose = Callable[[Mutant], tuple[list[str], float]]
"""The tests to run for a change, and their seconds."""


class Configuration:
    """tests/mutants.toml: the tests of a module, and the mutants that change nothing."""

    def __init__(self) -> None:
        with (REPOSITORY / "tests/mutants.toml").open("rb") as file:
            values: dict[str, Any] = tomllib.load(file)
        self._tests: dict[str, list[str]] = values["tests"]
        self._equivalent = {(e["module"], e["before"], e["after"]) for e in values.get("equivalent", [])}

    def tests(self, module: str) -> set[str]:
        """The files of tests of a module: those of the longest path that it begins with."""
        known = [path for path in self._tests if module == path or module.startswith(f"{path}/")]
        if not known:
            sys.exit(f"mutants: tests/mutants.toml names no tests for {module}.")
        found: set[Path] = set()
        for pattern in self._tests[max(known, key=len)]:
            for path in REPOSITORY.glob(pattern):
                found.update(path.rglob("test_*.py") if path.is_dir() else [path])
        return {str(path.relative_to(REPOSITORY)) for path in found}

    def is_equivalent(self, mutant: Mutant) -> bool:
        """Whether somebody has said why nothing can notice it."""
        module = str(mutant.path.relative_to(REPOSITORY))
        return (module, mutant.before, mutant.after) in self._equivalent


def _modules(names: list[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name).resolve()
        yield from sorted([*path.rglob("*.py"), *path.rglob("*.pyx")]) if path.is_dir() else [path]


def _changes(module: Path) -> list[Mutant]:
    return mutants_core.find(module) if module.suffix == ".pyx" else Finder(module).found


def _write(file: Path, code: bytes) -> None:
    """With a new time: bytecode counts as up to date by the time in seconds and the size."""
    file.write_bytes(code)
    if file.suffix == ".py":
        seconds = next(_TIMES)
        os.utime(file, (seconds, seconds))


def _is_caught(copy: Path, mutant: Mutant, tests: list[str], seconds: float) -> bool:
    """Run the tests in a copy of the repository with the change; one that takes too long has failed."""
    if not tests:
        return False
    file = copy / mutant.path.relative_to(REPOSITORY)
    is_compiled = file.suffix == ".pyx"
    _write(file, mutant.source())
    try:
        if is_compiled and not mutants_core.build(copy):
            return True
        environment = {"UNIONFS_TEST_SESSIONS": ",".join(SESSIONS)}
        code = run_pytest(copy, ["-x", *tests], 30 + 4 * seconds, environment)
    finally:
        _write(file, mutant.code)
        if is_compiled:
            mutants_core.build(copy)
    if code in (4, 5):  # a wrong call, or no test
        sys.exit(f"mutants: pytest ended with {code} in {copy}: {shlex.join(tests)}")
    return code != 0


def _survivors(mutants: list[Mutant], jobs: int, choose: Choose) -> Counter[Path]:
    """How many of each module no test notices; each is printed as soon as it is found."""
    survivors: Counter[Path] = Counter()
    with tempfile.TemporaryDirectory(prefix="unionfs-mutants-") as place:
        Path(place).chmod(0o755)
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copy = Path(place) / str(number)
            copy_repository(copy)
            copies.put(copy)

        def attempt(mutant: Mutant) -> None:
            copy = copies.get()
            tests, seconds = choose(mutant)
            began = time.monotonic()
            try:
                caught = _is_caught(copy, mutant, tests, seconds)
            finally:
                copies.put(copy)
            if not caught:
                survivors[mutant.path] += 1
                print(f"{mutant}\n    ({len(tests)} tests, {time.monotonic() - began:.0f} s)", flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(attempt, mutants):
                pass
    return survivors


def _report(name: str, caught: int, count: int) -> bool:
    """Print how many of a module's changes were caught; returns whether they are enough."""
    rate = caught / count
    print(f"{name}: {caught} of {count} caught ({rate:.0%})", flush=True)
    return rate >= ENOUGH


def _sample(mutants: list[Mutant], count: int, seed: str) -> dict[Path, list[Mutant]]:
    """That many changes by module, drawn evenly from all; the same ones for a seed and the same code."""
    drawn = random.Random(seed).sample(mutants, min(count, len(mutants)))
    drawn.sort(key=lambda mutant: (mutant.path, mutant.start))
    return {path: list(group) for path, group in itertools.groupby(drawn, lambda mutant: mutant.path)}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="mutants")
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lines", default="1-1000000")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", default="")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    first, last = map(int, options.lines.split("-"))
    configuration = Configuration()
    mutants = [
        mutant
        for module in _modules(options.modules)
        for mutant in _changes(module)
        if first <= mutant.line <= last and not configuration.is_equivalent(mutant)
    ]
    by_module = _sample(mutants, options.sample or len(mutants), options.seed)
    chosen = [mutant for group in by_module.values() for mutant in group]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    record = Record()
    files = {path: configuration.tests(str(path.relative_to(REPOSITORY))) for path in by_module}
    record.update({REPOSITORY / name for names in files.values() for name in names})

    def choose(mutant: Mutant) -> tuple[list[str], float]:
        module = str(mutant.path.relative_to(REPOSITORY))
        block = None if mutant.path.suffix == ".pyx" else block_at(mutant.code, mutant.line)
        return record.tests(module, block, options.seconds, files[mutant.path])

    survivors = _survivors(chosen, options.jobs, choose)
    enough = True
    for module, group in by_module.items():
        name = str(module.relative_to(REPOSITORY))
        is_enough = _report(name, len(group) - survivors[module], len(group))
        enough = enough and (is_enough or options.sample > 0)
    if options.sample:
        enough = _report("the sample", len(chosen) - survivors.total(), len(chosen))
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
