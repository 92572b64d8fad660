"""Parses a Go template into nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from unionfs.errors import UserError

_ACTION = re.compile(r"\{\{(-(?=\s))?(.*?)((?<=\s)-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)
    |(?P<field>\$?\w*(?:\.\w+)+|\.)|(?P<variable>\$\w*)|(?P<word>\w+)|(?P<mark>:=|[|(),=]))""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Literal:
    value: Any


@dataclass(frozen=True, slots=True)
class Field:
    """A path of names from a variable; `variable` "" is the current value, "$" the whole."""

    variable: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A function, or a field with arguments, as docker's `.Label "key"`."""

    function: str | Field
    arguments: tuple[Value, ...]


Value: TypeAlias = "Literal | Field | Call"


@dataclass(frozen=True, slots=True)
class Show:
    value: Value


@dataclass(frozen=True, slots=True)
class Assign:
    variable: str
    value: Value


@dataclass(slots=True)
class Block:
    """`if`, `with` or `range`; `variables` of `range $key, $value :=`."""

    kind: str
    value: Value
    variables: tuple[str, ...] = ()
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


Node: TypeAlias = "Text | Show | Assign | Block"
Parsed: TypeAlias = Sequence[Node]


def parse(template: str) -> list[Node]:
    """Raises UserError if it is not a template."""
    return _Parser(template).parse()


def _wrong(template: str, what: str) -> UserError:
    return UserError(f"invalid template {template!r}: {what}; see Go's text/template for its language.")


class _Parser:
    def __init__(self, template: str) -> None:
        self._template = template
        self._nodes: list[Node] = []
        self._open: list[tuple[Block, list[Node], bool]] = []
        """Unfinished blocks, the list that each is in, and whether it is the rest of an `else if`."""

    def parse(self) -> list[Node]:
        at, trims = 0, False
        for action in _ACTION.finditer(self._template):
            self._text(self._template[at : action.start()], left=trims, right=action[1] is not None)
            self._action(action[2].strip())
            at, trims = action.end(), action[3] is not None
        rest = self._template[at:]
        if "{{" in rest:
            raise _wrong(self._template, "a {{ is not closed by }}")
        self._text(rest, left=trims, right=False)
        if self._open:
            raise _wrong(self._template, f"{{{{{self._open[-1][0].kind}}}}} has no {{{{end}}}}")
        return self._nodes

    def _text(self, text: str, *, left: bool, right: bool) -> None:
        if "}}" in text:
            raise _wrong(self._template, "a }} has no {{")
        # The shell passes \t and \n as two characters; docker interprets them.
        text = text.replace("\\t", "\t").replace("\\n", "\n")
        text = text.lstrip() if left else text
        text = text.rstrip() if right else text
        if text:
            self._nodes.append(Text(text))

    def _action(self, source: str) -> None:
        if source.startswith("/*") and source.endswith("*/"):
            return
        word, _, rest = source.partition(" ")
        match word:
            case "if" | "with" | "range":
                self._begin(word, rest, chained=False)
            case "else":
                self._else(rest.strip())
            case "end" if not rest.strip():
                self._end()
            case _:
                expression = _Expression(self._template, source)
                names = expression.variables(most=1)
                value = expression.whole()
                self._nodes.append(Assign(names[0], value) if names else Show(value))

    def _begin(self, kind: str, source: str, *, chained: bool) -> None:
        expression = _Expression(self._template, source)
        names = expression.variables(most=2 if kind == "range" else 1)
        block = Block(kind, expression.whole(), names)
        self._nodes.append(block)
        self._open.append((block, self._nodes, chained))
        self._nodes = block.body

    def _else(self, rest: str) -> None:
        if not self._open or self._nodes is self._open[-1][0].otherwise:
            raise _wrong(self._template, "{{else}} is in no {{if}}, {{with}} or {{range}}")
        self._nodes = self._open[-1][0].otherwise
        if rest:
            kind, _, condition = rest.partition(" ")
            if kind not in ("if", "with"):
                raise _wrong(self._template, f"{{{{else {rest}}}}} is unknown")
            self._begin(kind, condition, chained=True)

    def _end(self) -> None:
        chained = True
        while chained:
            if not self._open:
                raise _wrong(self._template, "{{end}} is in no {{if}}, {{with}} or {{range}}")
            _, self._nodes, chained = self._open.pop()


class _Expression:
    """The pipeline in an action."""

    def __init__(self, template: str, source: str) -> None:
        self._template = template
        self._source = source
        self._tokens = list(self._tokenize(source))
        self._at = 0

    def _tokenize(self, source: str) -> list[tuple[str, str]]:
        tokens, at = [], 0
        while source[at:].strip():
            found = _TOKEN.match(source, at)
            if found is None or found.lastgroup is None:
                raise self._wrong(f"{source[at:].strip()!r} cannot be read")
            tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        return tokens

    def _wrong(self, what: str) -> UserError:
        return _wrong(self._template, f"in {{{{{self._source}}}}} {what}")

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("", "")

    def variables(self, *, most: int) -> tuple[str, ...]:
        """Read the `$a, $b :=` at the beginning, if there is one."""
        names, at = [], 0
        while at < len(self._tokens) and self._tokens[at][0] == "variable":
            names.append(self._tokens[at][1])
            at += 1
            if at < len(self._tokens) and self._tokens[at][1] == ",":
                at += 1
                continue
            break
        if not names or at >= len(self._tokens) or self._tokens[at][1] not in (":=", "="):
            return ()
        if len(names) > most:
            raise self._wrong("there are too many variables")
        self._at = at + 1
        return tuple(names)

    def whole(self) -> Value:
        value = self._pipeline()
        if self._at < len(self._tokens):
            raise self._wrong(f"{self._peek()[1]!r} is unexpected")
        return value

    def _pipeline(self) -> Value:
        value = self._command()
        while self._peek()[1] == "|":
            self._at += 1
            following = self._command(piped=value)
            value = following
        return value

    def _command(self, piped: Value | None = None) -> Value:
        kind, text = self._peek()
        last = () if piped is None else (piped,)
        if kind == "word" and text not in ("true", "false", "nil"):
            self._at += 1
            return Call(text, (*self._operands(), *last))
        first = self._operand()
        more = self._operands()
        if isinstance(first, Field) and (more or last):
            return Call(first, (*more, *last))
        if more or last:
            raise self._wrong("a value cannot be called with arguments")
        return first

    def _operands(self) -> tuple[Value, ...]:
        found = []
        while self._peek()[1] not in ("", "|", ")"):
            found.append(self._operand())
        return tuple(found)

    def _operand(self) -> Value:
        kind, text = self._peek()
        self._at += 1
        match kind:
            case "string":
                return Literal(text[1:-1] if text[0] == "`" else self._unescaped(text))
            case "number":
                return Literal(float(text) if "." in text else int(text))
            case "field":
                variable, *names = text.split(".")
                return Field(variable, tuple(name for name in names if name))
            case "variable":
                return Field(text, ())
            case "word":
                if text in ("true", "false", "nil"):
                    return Literal({"true": True, "false": False, "nil": None}[text])
                return Call(text, ())
            case "mark" if text == "(":
                value = self._pipeline()
                if self._peek()[1] != ")":
                    raise self._wrong("a ( is not closed by )")
                self._at += 1
                return value
        raise self._wrong(f"{text!r} is unexpected" if text else "a value is missing")

    def _unescaped(self, text: str) -> str:
        try:
            return str(json.loads(text))
        except ValueError:
            raise self._wrong(f"{text} is not a Go string") from None
