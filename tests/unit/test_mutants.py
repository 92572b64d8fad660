"""scripts/mutants: its changes, and whether its list of tests is up to date."""

from __future__ import annotations

import ast
import importlib.util
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
    spec = importlib.util.spec_from_file_location("mutants", REPOSITORY / "scripts/lib/mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # dataclass() looks for it there
    spec.loader.exec_module(module)
    return module


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
