"""The subset of Go's text/template for `--format`: fields, json, index, text functions, and plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unionfs.errors import UserError

_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
_FIELDS = re.compile(r"(?:\.[A-Za-z_][A-Za-z0-9_]*)+|\.")
_CALL = re.compile(r'(\w+)\s+(\.[A-Za-z0-9_.]*)(?:\s+("(?:[^"\\]|\\.)*"))?')
_METHOD = re.compile(r'(\.Label)\s+("(?:[^"\\]|\\.)*")')
_TEXT_FUNCTIONS: Mapping[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "title": str.title,
    "println": lambda text: text + "\n",
}
_KNOWN = '{{.Field}}, {{json .Field}}, {{index .Labels "key"}}, {{.Label "key"}}, {{lower .X}}, {{upper .X}}'


def render(template: str, values: Mapping[str, Any]) -> str:
    """Render one value. Raises UserError for unsupported parts of the language."""
    pieces, at = [], 0
    for action in _ACTION.finditer(template):
        pieces.append(_escapes(template[at : action.start()]))
        pieces.append(_evaluate(action[1], values))
        at = action.end()
    rest = template[at:]
    if "{{" in rest or "}}" in rest:
        raise UserError(f"the template {template!r} has an unbalanced {{{{ or }}}}; add the missing one.")
    return "".join([*pieces, _escapes(rest)])


def _escapes(text: str) -> str:
    # The shell passes \t and \n as two characters; docker interprets them.
    return text.replace("\\t", "\t").replace("\\n", "\n")


def _evaluate(action: str, values: Mapping[str, Any]) -> str:
    if _FIELDS.fullmatch(action):
        return _plain(_field(action, values))
    if found := _METHOD.fullmatch(action):
        labels = _field(".Labels", values)
        return str(labels.get(json.loads(found[2]), "")) if isinstance(labels, Mapping) else ""
    if found := _CALL.fullmatch(action):
        function, value = found[1], _field(found[2], values)
        if function == "json" and found[3] is None:
            return json.dumps(value, separators=(",", ":"))
        if function == "index" and found[3] is not None:
            if isinstance(value, Mapping):
                return str(value.get(json.loads(found[3]), ""))
            raise UserError(f"{found[2]} in the template has no keys to index; it is {_plain(value)!r}.")
        if function in _TEXT_FUNCTIONS and found[3] is None:
            return _TEXT_FUNCTIONS[function](_plain(value))
    raise UserError(f"the template's {{{{{action}}}}} is not supported; use {_KNOWN}.")


def _field(path: str, values: Mapping[str, Any]) -> Any:
    value: Any = values
    for name in path.split("."):
        if not name:
            continue
        if not isinstance(value, Mapping) or name not in value:
            known = ", ".join(values)
            raise UserError(f"the template's {path} is unknown; the fields are {known}.")
        value = value[name]
    return value


def _plain(value: Any) -> str:
    match value:
        case None:
            return "<no value>"
        case bool():
            return "true" if value else "false"
        case Mapping():
            return "map[" + " ".join(f"{key}:{_plain(value[key])}" for key in sorted(value)) + "]"
        case list() | tuple():
            return "[" + " ".join(map(_plain, value)) + "]"
        case _:
            return str(value)


def render_rows(
    template: str, rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str]
) -> list[list[str]]:
    """Return the rows of docker's `table TEMPLATE`, headings first; tabs separate the columns."""
    text = template.removeprefix("table").strip()
    table = [render(text, row).split("\t") for row in (headings, *rows)]
    width = max(map(len, table))
    return [cells + [""] * (width - len(cells)) for cells in table]
