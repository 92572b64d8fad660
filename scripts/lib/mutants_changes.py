"""The small wrong changes that scripts/mutants makes to a module.

Besides what mutation testing usually changes (operators, constants, conditions) it leaves statements out, for
what is easily forgotten here is a call: an fsync, a close, a notice to the kernel.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
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
