"""scripts/mutants: its changes, and whether its list of tests is up to date."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = '''"""A module."""
LIMIT = 3

def f(a, b):
    """What it does."""
    if a < b and not a:
        a.sync()
        a.b = b | 1
        raise ValueError
    return g(a)
'''


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    """The module behind the script."""
    sys.path.insert(0, str(REPOSITORY / "scripts/lib"))
    try:
        return importlib.import_module("mutants")
    finally:
        del sys.path[0]


def test_what_is_changed(mutants: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    found = mutants.Finder(path).found
    assert [(mutant.line, mutant.after) for mutant in found] == [
        (2, "LIMIT = (4)"),
        (6, "if (a < b or not a):"),
        (6, "if (not a):"),
        (6, "if (a < b):"),
        (6, "if (a <= b) and not a:"),
        (6, "if a < b and (a):"),
        (7, "pass"),
        (8, "pass"),
        (8, "a.b = (b & 1)"),
        (8, "a.b = b | (2)"),
        (9, "pass"),
        (10, "return None"),
    ]
    for mutant in found:
        source = mutant.source().decode()
        assert source != SOURCE
        ast.parse(source)


CORE = '''"""A module."""
from libc.errno cimport ENOENT
cdef extern from "<fcntl.h>" nogil:
    int O_PATH
    int open(const char *path, int flags)
cdef enum:
    SIZE = 3

cdef class C:
    cdef int f(self, Node node not None, int count=1) except -1:
        cdef char *text = <char *>self.buffer
        cdef int left
        if node is None or <int>count < SIZE:
            raise ValueError
        if node.held:
            self.count += 1
        node.held, self.left = -1, &count
        with nogil:
            close(node.fd)
        if left is not None:
            return name in self.names
        return count | 1 if name not in self.kept else 0.5 * count
'''


def test_what_is_changed_in_the_core(mutants: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "m.pyx"
    path.write_text(CORE)
    assert [(mutant.line, mutant.after) for mutant in mutants._changes(path)] == [
        (13, "if node is not None or <int>count < SIZE:"),
        (13, "if node is None and <int>count < SIZE:"),
        (13, "if node is None or <int>count <= SIZE:"),
        (14, "pass"),
        (15, "if not (node.held):"),
        (16, "self.count -= 1"),
        (16, "self.count += (2)"),
        (16, "pass"),
        (17, "node.held, self.left = -(2), &count"),
        (17, "pass"),
        (19, "pass"),
        (20, "if left is None:"),
        (21, "return name not in self.names"),
        (22, "return count & 1 if name not in self.kept else 0.5 * count"),
        (22, "return count | (2) if name not in self.kept else 0.5 * count"),
        (22, "return count | 1 if name in self.kept else 0.5 * count"),
        (22, "return count | 1 if name not in self.kept else (1.5) * count"),
    ]


BLOCKS = '''"""A package."""
from __future__ import annotations

import os

def f(a):
    """What it does."""
    if a:
        return g(a)
    else:
        try:
            return 2
        except OSError:
            return 3

class C:
    limit = 1

    def f(self):
        return self.limit
'''


def test_what_a_test_executes(mutants: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a process does that the test starts, and that is killed."""
    blocks = sys.modules["mutants_blocks"]
    package, notes = tmp_path / "package", tmp_path / "notes"
    package.mkdir()
    notes.mkdir()
    (package / "__init__.py").write_text(BLOCKS)
    found = blocks.instrument(package)
    assert [name for name, _ in found["package/__init__.py"]] == [
        ".f#0", ".f#1", ".f#2", ".f#3", ".f#4", ".C.f#0"
    ]  # fmt: skip
    program = "import os, signal, package; package.f(0); package.f(0); os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "test_x (a b).py::test_y (call)")
    monkeypatch.setenv(blocks.PLACE, str(notes))
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path)
    (written,) = notes.iterdir()
    assert written.name == blocks.file_of("test_x (a b).py::test_y")
    executed = blocks.numbers(written.read_bytes())
    names = [name for name, number in found["package/__init__.py"] if number in executed]
    assert names == [".f#0", ".f#2", ".f#3"]


def test_the_block_of_a_line(mutants: ModuleType) -> None:
    blocks = sys.modules["mutants_blocks"]
    lines = BLOCKS.splitlines()
    found = {text.strip(): blocks.block_at(BLOCKS.encode(), at) for at, text in enumerate(lines, 1)}
    assert found["import os"] is None
    assert found["limit = 1"] is None
    assert found["if a:"] == ".f#0"
    assert found["return g(a)"] == ".f#1"
    assert found["return 2"] == ".f#3"
    assert found["return 3"] == ".f#4"
    assert found["return self.limit"] == ".C.f#0"


def test_the_list_of_tests() -> None:
    """The list follows moved modules and tests."""
    values = tomllib.loads((REPOSITORY / "tests/mutants.toml").read_text())
    for module, tests in values["tests"].items():
        assert (REPOSITORY / module).exists(), module
        for word in tests:
            assert list(REPOSITORY.glob(word)), word
    for one in values.get("equivalent", []):
        assert one["before"] in " ".join((REPOSITORY / one["module"]).read_text().split()), one
        assert one["reason"]


def test_a_sample_is_drawn_from_all_modules(mutants: ModuleType, tmp_path: Path) -> None:
    """The same one for the same seed; never more than there are."""
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in paths:
        path.write_text(SOURCE)
    found = [mutant for path in paths for mutant in mutants.Finder(path).found]
    drawn = mutants._sample(found, 9, "x")
    assert drawn == mutants._sample(found, 9, "x")
    assert drawn != mutants._sample(found, 9, "y")
    assert sum(map(len, drawn.values())) == 9
    assert set(drawn) == set(paths)
    assert sum(map(len, mutants._sample(found, 1000, "").values())) == len(found)


def test_the_tests_of_a_change(
    mutants: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that execute the block, else its function; any, where nothing is known of a whole module."""
    module = sys.modules["mutants_tests"]
    kept = tmp_path / "kept.json"
    one, two = "tests/unit/a.py::one", "tests/unit/a.py::two"
    blocks = {one: ["m.py:.f#0", "m.py:.f#1"], two: ["m.py:.f#0"]}
    kept.write_text(json.dumps({"files": {}, "seconds": {one: 1, two: 2}, "blocks": blocks}))
    monkeypatch.setattr(module, "_KEPT", kept)
    record = module.Record()

    def chosen(name: str, block: str | None) -> list[str]:
        found: list[str] = record.tests(name, block, 30, {"tests/unit/a.py"})[0]
        return found

    assert chosen("m.py", ".f#1") == [one]
    assert chosen("m.py", ".f#0") == chosen("m.py", ".f#2") == chosen("m.py", None) == [one, two]
    assert chosen("m.py", ".g#0") == []
    assert chosen("n.py", ".g#0") == [one, two]
    assert record.tests("m.py", ".f#0", 1, {"tests/unit/a.py"}) == ([one], 1)
    slow, quick = "tests/mount/b.py::test_slow", "tests/mount/b.py::test_quick"
    seconds = {one: 1, slow: 50, quick: 1}
    blocks = {test: ["slow.py:.f#0"] for test in seconds}
    kept.write_text(json.dumps({"files": {}, "seconds": seconds, "blocks": blocks}))
    record = module.Record()
    files = {"tests/unit/a.py", "tests/mount/b.py"}
    assert set(record.tests("slow.py", ".f#0", 30, files)[0]) == {one, quick}
