"""Records which test executes which block of the package, also in the processes it starts.

A copy of the package gets a call of `hit` at the start of every block: the body of a function, a branch, a
loop, a handler. The first execution in a test appends the block's number to a file of that test. Daemons
inherit the test's name in PYTEST_CURRENT_TEST. A killed process has lost nothing, unlike with a tracer that
keeps what it finds in memory.

The copy contains this file as the module `unionfs._blocks`.
"""

from __future__ import annotations

import ast
import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

MODULE = "_blocks"
PLACE = "UNIONFS_BLOCKS"
"""Environment variable: the directory of the tests' files."""

_seen: set[tuple[str | None, int]] = set()


def file_of(test: str) -> str:
    """The name of a test's file."""
    return f"{zlib.crc32(test.encode()):08x}{zlib.adler32(test.encode()):08x}"


def hit(block: int) -> None:
    """Note that the running test executes a block."""
    running = os.environ.get("PYTEST_CURRENT_TEST")
    if running is None or (running, block) in _seen:
        return
    _seen.add((running, block))
    # A container, or a process without any right, may not find the directory.
    with contextlib.suppress(OSError):
        path = os.path.join(os.environ.get(PLACE, ""), file_of(running.rpartition(" (")[0]))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # another user's process has made it
                os.fchmod(fd, 0o666)  # whatever the umask: a test's processes may be of several users
            os.write(fd, struct.pack("<I", block))
        finally:
            os.close(fd)


def numbers(data: bytes) -> set[int]:
    """The blocks in the file of a test."""
    return {number for (number,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])}


Block = tuple[str, list[ast.stmt], int, int]
"""The function it is in ("" outside of any), its statements, and the first and the last line."""


def blocks(tree: ast.Module) -> list[Block]:
    """The blocks of a module, outer ones first."""
    return list(_blocks(tree, "", is_code=False))


def _blocks(node: ast.AST, function: str, *, is_code: bool) -> Iterator[Block]:
    for child in ast.iter_child_nodes(node):
        name, inner = function, is_code
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{function}.{child.name}"
            inner = not isinstance(child, ast.ClassDef)
        if inner:
            for field in ("body", "orelse", "finalbody"):
                body = getattr(child, field, None)
                if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                    yield name, body, body[0].lineno, body[-1].end_lineno or 0
        yield from _blocks(child, name, is_code=inner)


def instrument(package: Path) -> dict[str, list[tuple[str, int]]]:
    """Put a call of `hit` into every block of a package.

    Returns the blocks by module: the function's name with the block's ordinal in it, and the block's number.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    number = 0
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text())
        of_module = found.setdefault(str(path.relative_to(package.parent)), [])
        for name, body, _, _ in names(blocks(tree)):
            number += 1
            of_module.append((name, number))
            call = ast.parse(f"_blocks_hit({number})").body[0]
            is_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            body.insert(1 if is_docstring else 0, call)
        at = next((i for i, s in enumerate(tree.body) if not _comes_first(s)), len(tree.body))
        tree.body[at:at] = ast.parse(f"from {package.name}.{MODULE} import hit as _blocks_hit").body
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    (package / f"{MODULE}.py").write_text(Path(__file__).read_text())
    return found


def names(found: list[Block]) -> list[Block]:
    """The same blocks, with their ordinals behind their functions' names: these survive changes elsewhere."""
    counts: dict[str, int] = {}
    result = []
    for function, body, first, last in found:
        counts[function] = counts.get(function, -1) + 1
        result.append((f"{function}#{counts[function]}", body, first, last))
    return result


def _comes_first(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def block_at(code: bytes, line: int) -> str | None:
    """The name of the innermost block with this line; None outside of functions."""
    around = [name for name, _, first, last in names(blocks(ast.parse(code))) if first <= line <= last]
    return around[-1] if around else None
