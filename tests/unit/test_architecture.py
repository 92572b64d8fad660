"""The rules of docs/architecture.md that the source shows: arrows, circles, imports, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import unionfs

ROOT = Path(unionfs.__file__).parent
# Each room may import from itself and from those after it.
ROOMS = (
    "cli", "web", "plugin", "branches", "containers", "images", "daemon", "storage", "fuse", "union",
    "settings", "sys", "errors", "core",
)  # fmt: skip
LONGEST_MODULE = 450
LONGEST_COMPILED = 500  # with its declarations of attributes
LONGEST_FUNCTION = 60
REASON = "start-up time"



@dataclass(frozen=True)
class Import:
    """One import of a module of the package."""

    source: str
    target: str
    line: int
    kind: str
    """`module`, `function`, or `types` (under TYPE_CHECKING)."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name, without the package's own."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "__main__"):
            found[name] = path
    return found


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


def room_of(name: str) -> str:
    return name.partition(".")[0]


def _kinds(node: ast.AST, kind: str = "module") -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """All imports below a node, with their kind."""
    for child in ast.iter_child_nodes(node):
        inner = kind
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = "function"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = "types"
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, kind
        else:
            yield from _kinds(child, inner)


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules of the package that an import names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert node.level == 0, "imports are absolute"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        name = name.removeprefix("unionfs.")
        while name and name not in modules():
            name = name.rpartition(".")[0]
        if name:
            yield name


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for name in modules():
        for node, kind in _kinds(tree_of(name)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
            if module.partition(".")[0] == "unionfs":
                found += [Import(name, target, node.lineno, kind) for target in _targets(node)]
    return tuple(found)


def test_every_module_is_in_a_room() -> None:
    assert {room_of(name) for name in modules()} == set(ROOMS)


def test_arrows_point_one_way() -> None:
    wrong = {
        f"{item.source}:{item.line} imports {item.target}"
        for item in imports()
        if ROOMS.index(room_of(item.source)) > ROOMS.index(room_of(item.target))
    }
    assert wrong == set()


def test_the_core_imports_nothing_of_the_rest() -> None:
    """Not even for types: these are in its stubs."""
    wrong = {
        (path.name, line)
        for path in [*ROOT.glob("core/*.pyx"), *ROOT.glob("core/*.pxd")]
        for line in path.read_text().splitlines()
        if line.startswith(("from unionfs", "import unionfs", "cimport unionfs"))
        and not line.startswith("from unionfs.core.")
    }
    assert wrong == set()


def test_every_compiled_module_has_its_types() -> None:
    modules = {path.stem for path in ROOT.glob("core/*.pyx")}
    assert {path.stem for path in ROOT.glob("core/*.pyi")} == modules
    assert {path.stem for path in ROOT.glob("core/*.pyx") if _lines(path) > LONGEST_COMPILED} == set()


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_settings_and_sys_import_nothing_of_each_other() -> None:
    apart = {"settings", "sys"}
    assert [item for item in imports() if {room_of(item.source), room_of(item.target)} == apart] == []


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for item in imports():
        if item.kind == "module" and item.source != item.target:
            graph[item.source].add(item.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from None


def test_an_import_in_a_function_says_that_it_is_for_start_up_time() -> None:
    wrong = set()
    for name, path in modules().items():
        lines = path.read_text().splitlines()
        for node, kind in _kinds(tree_of(name)):
            if kind != "function":
                continue
            above = node.lineno - 2
            while lines[above].strip().startswith(("import ", "from ")):
                above -= 1
            comment = lines[above].strip()
            if not (comment.startswith("#") and REASON in comment):
                wrong.add(name)
    assert wrong == set()


def test_sizes() -> None:
    long_modules = {
        name for name, path in modules().items() if len(path.read_text().splitlines()) > LONGEST_MODULE
    }
    long_functions = {
        f"{name}.{node.name}"
        for name in modules()
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert long_modules == set()
    assert long_functions == set()


def _assigned(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Every assigned attribute, of any object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _of_pyfuse3(tree: ast.Module) -> set[str]:
    """The variables for new objects of the library, which are filled by assigning their attributes."""
    return {
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("pyfuse3.")
    }


def _attributes(tree: ast.Module) -> set[str]:
    """The names of the attributes of a module's own classes."""
    names = {node.attr for node in _assigned(tree) if _is_own(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            names |= {field.id for field in fields if isinstance(field, ast.Name)}
    return names


def _compiled_attributes() -> Iterator[str]:
    """The names of the attributes of compiled classes, by their stubs."""
    for path in ROOT.glob("core/*.pyi"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id
            elif isinstance(node, ast.FunctionDef) and "property" in map(ast.unparse, node.decorator_list):
                yield node.name


def test_no_attribute_is_assigned_from_another_module() -> None:
    own = {name: _attributes(tree_of(name)) for name in modules()}
    everywhere = set(_compiled_attributes()).union(*own.values())
    wrong = {
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name in modules()
        for node in _assigned(tree_of(name))
        if not _is_own(node)
        and node.attr in everywhere - own[name]
        and ast.unparse(node.value) not in _of_pyfuse3(tree_of(name))
    }
    assert wrong == set()
