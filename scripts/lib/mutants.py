"""Makes small wrong changes to a module and looks whether a test notices; see scripts/mutants.

Besides what mutation testing usually changes (operators, constants, conditions) it leaves statements out, for
what is easily forgotten here is a call: an fsync, a close, a notice to the kernel.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
ENOUGH: Final = 0.85
_COMPARISONS: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Div: ast.Mult,
}  # fmt: skip
_LOGS: Final = ("log.", "logging.")


@dataclass(frozen=True)
class Mutant:
    """One change: the span of bytes that is replaced, and the line before and after it."""

    path: Path
    code: bytes
    line: int
    start: int
    end: int
    text: bytes
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line}:\n    - {self.before}\n    + {self.after}"

    def source(self) -> bytes:
        """The whole module with the change."""
        return self.code[: self.start] + self.text + self.code[self.end :]


class Finder(ast.NodeVisitor):
    """Finds what can be changed in a module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = path.read_bytes()
        self.found: list[Mutant] = []
        self._lines = self.code.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self.visit(ast.parse(self.code))

    def _replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        line_start, line_end = self._starts[node.lineno - 1], self._starts[node.end_lineno]
        before = self.code[line_start:line_end]
        after = self.code[line_start:start] + text.encode() + self.code[end:line_end]
        shown = [" ".join(part.decode().split()) for part in (before, after)]
        self.found.append(Mutant(self.path, self.code, node.lineno, start, end, text.encode(), *shown))

    def _other(self, node: ast.expr, new: ast.expr) -> None:
        self._replace(node, f"({ast.unparse(new)})")

    # -- what is left as it is ------------------------------------------------------------------------

    def visit_Assert(self, node: ast.Assert) -> None:
        """An assertion is there for readers and mypy."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "__slots__":
            return
        if not any(isinstance(part, ast.Name | ast.Tuple) for part in node.targets):
            self._replace(node, "pass")
        self.visit(node.value)

    # -- expressions ----------------------------------------------------------------------------------

    def visit_Compare(self, node: ast.Compare) -> None:
        for index, operator in enumerate(node.ops):
            operators = [*node.ops]
            operators[index] = _COMPARISONS[type(operator)]()
            self._other(node, ast.Compare(node.left, operators, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._other(node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        for index in range(len(node.values)):
            rest = [value for at, value in enumerate(node.values) if at != index]
            self._other(node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._other(node, node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = (ast.JoinedStr, ast.Constant)
        is_text = any(
            isinstance(side, texts) and not isinstance(getattr(side, "value", ""), int | float)
            for side in (node.left, node.right)
        )
        if type(node.op) in _OPERATORS and not is_text:
            self._other(node, ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Inside of an f-string positions are not exact before Python 3.12."""

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value))
        elif isinstance(node.value, int):
            self._replace(node, f"({node.value + 1})")

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    # -- statements -----------------------------------------------------------------------------------

    def _condition(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            self._other(test, ast.UnaryOp(ast.Not(), test))

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call | ast.Await):
            if ast.unparse(node).startswith(_LOGS):
                return
            self._replace(node, "pass")
        self.generic_visit(node)

    def _left_out(self, node: ast.stmt) -> None:
        self._replace(node, "pass")
        self.generic_visit(node)

    visit_AugAssign = visit_Delete = visit_Raise = visit_Break = visit_Continue = _left_out

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self._replace(node, "pass")
        elif not (isinstance(node.value, ast.Constant) and node.value.value is None):
            if isinstance(node.value, ast.Name | ast.Call | ast.Attribute):
                self._replace(node, "return None")
            self.visit(node.value)


class Configuration:
    """tests/mutants.toml: the tests of a module, and the mutants that change nothing."""

    def __init__(self) -> None:
        with (REPOSITORY / "tests/mutants.toml").open("rb") as file:
            values: dict[str, Any] = tomllib.load(file)
        self._tests: dict[str, list[str]] = values["tests"]
        self._equivalent = {(e["module"], e["before"], e["after"]) for e in values.get("equivalent", [])}

    def tests(self, module: str) -> list[str]:
        """pytest's arguments for a module: those of the longest path that it begins with."""
        known = [path for path in self._tests if module == path or module.startswith(f"{path}/")]
        if not known:
            sys.exit(f"mutants: tests/mutants.toml names no tests for {module}.")
        return self._tests[max(known, key=len)]

    def is_equivalent(self, mutant: Mutant) -> bool:
        """Whether somebody has said why nothing can notice it."""
        module = str(mutant.path.relative_to(REPOSITORY))
        return (module, mutant.before, mutant.after) in self._equivalent


def _tests_fail(copy: Path, tests: list[str], seconds: float) -> bool:
    """Run the tests in a copy of the repository; one that takes too long has failed."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    paths = [str(path.relative_to(copy)) for word in tests for path in sorted(copy.glob(word))]
    options = [word for word in tests if not list(copy.glob(word))]
    process = subprocess.Popen(
        [*words, *paths, *options], cwd=copy, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
        env={"UNIONFS_TEST_SESSIONS": "direct-hybrid", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code in (4, 5):  # a wrong call, or no test
        sys.exit(f"mutants: pytest ended with {code}; try {' '.join(words + paths + options)}.")
    return code != 0


def _modules(names: list[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name).resolve()
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _time_limit(copy: Path, tests: tuple[str, ...], known: dict[tuple[str, ...], float]) -> float:
    """How long these tests may take with a change, in seconds: they are run without one, once."""
    if tests not in known:
        began = time.monotonic()
        if _tests_fail(copy, list(tests), 600):
            sys.exit(f"mutants: without any change these tests fail: {' '.join(tests)}")
        known[tests] = 30 + 4 * (time.monotonic() - began)
    return known[tests]


def _survivors(
    module: Path, mutants: list[Mutant], tests: list[str], jobs: int, limits: dict[tuple[str, ...], float]
) -> int:
    """How many no test notices; each is printed as soon as it is found. ``limits``: of the tests so far."""
    name = module.relative_to(REPOSITORY)
    with tempfile.TemporaryDirectory(prefix="unionfs-mutants-") as place:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copy = Path(place) / str(number)
            ignored = shutil.ignore_patterns(".*", "__pycache__")
            shutil.copytree(REPOSITORY, copy, ignore=ignored, symlinks=True)
            Path(place).chmod(0o755)
            copies.put(copy)
        limit = _time_limit(copy, tuple(tests), limits)

        def survives(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                (copy / name).write_bytes(mutant.source())
                if _tests_fail(copy, tests, limit):
                    return False
                print(mutant, flush=True)
                return True
            finally:
                (copy / name).write_bytes(mutant.code)
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            return sum(pool.map(survives, mutants))


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
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    first, last = map(int, options.lines.split("-"))
    configuration = Configuration()
    mutants = [
        mutant
        for module in _modules(options.modules)
        for mutant in Finder(module).found
        if first <= mutant.line <= last and not configuration.is_equivalent(mutant)
    ]
    by_module = _sample(mutants, options.sample or len(mutants), options.seed)
    enough, all_caught = True, 0
    limits: dict[tuple[str, ...], float] = {}
    for module, group in by_module.items():
        if options.list:
            print(*group, sep="\n")
            continue
        name = str(module.relative_to(REPOSITORY))
        caught = len(group) - _survivors(module, group, configuration.tests(name), options.jobs, limits)
        is_enough = _report(name, caught, len(group))
        enough = enough and (is_enough or options.sample > 0)
        all_caught += caught
    if options.sample and not options.list:
        enough = _report("the sample", all_caught, sum(map(len, by_module.values())))
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
