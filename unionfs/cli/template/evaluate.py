"""Evaluates the nodes of a template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unionfs.cli.template.parse import Assign, Call, Field, Literal, Node, Parsed, Show, Text, Value
from unionfs.errors import UserError


class Joined(dict[str, Any]):
    """Labels that are printed as docker does in lists, `a=b,c=d`, and can be indexed and ranged over."""

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.items())


def plain(value: Any) -> str:
    """Return a value as Go prints it."""
    match value:
        case None:
            return "<no value>"
        case bool():
            return "true" if value else "false"
        case Joined():
            return str(value)
        case Mapping():
            return "map[" + " ".join(f"{key}:{plain(value[key])}" for key in sorted(value)) + "]"
        case list() | tuple():
            return "[" + " ".join(map(plain, value)) + "]"
        case _:
            return str(value)


class Scope:
    """The current value, the whole and the variables."""

    def __init__(self, whole: Mapping[str, Any], dot: Any, variables: Mapping[str, Any] = {}) -> None:
        self._whole = whole
        self._dot = dot
        self._variables = dict(variables)

    def text(self, nodes: Parsed) -> str:
        return "".join(self._node(node) for node in nodes)

    def _node(self, node: Node) -> str:
        match node:
            case Text(text):
                return text
            case Show(value):
                return plain(self.value(value))
            case Assign(variable, value):
                self._variables[variable] = self.value(value)
                return ""
        found = self.value(node.value)
        if node.kind == "range":
            items = _items(found)
            return self._range(node.variables, items, node.body) if items else self.text(node.otherwise)
        if not found:
            return self.text(node.otherwise)
        variables = {**self._variables, **dict.fromkeys(node.variables, found)}
        dot = found if node.kind == "with" else self._dot
        return Scope(self._whole, dot, variables).text(node.body)

    def _range(self, names: Sequence[str], items: Sequence[tuple[Any, Any]], body: Parsed) -> str:
        pieces = []
        for key, item in items:
            given = (item,) if len(names) == 1 else (key, item)
            variables = {**self._variables, **dict(zip(names, given, strict=False))}
            pieces.append(Scope(self._whole, item, variables).text(body))
        return "".join(pieces)

    def value(self, value: Value) -> Any:
        """Evaluate. Raises UserError."""
        match value:
            case Literal(known):
                return known
            case Field():
                return self._field(value)
            case Call(Field() as place, arguments):
                return self._method(place, [self.value(one) for one in arguments])
            case Call(str() as name, arguments):
                return self._called(name, arguments)
        raise AssertionError(value)

    def _field(self, place: Field) -> Any:
        value: Any = self._dot
        if place.variable == "$":
            value = self._whole
        elif place.variable:
            if place.variable not in self._variables:
                raise UserError(f"the template's {place.variable} is not set; assign it by `:=` first.")
            value = self._variables[place.variable]
        for name in place.names:
            if isinstance(value, Mapping) and name in value:
                value = value[name]
            elif isinstance(value, Mapping) and value is not self._whole:
                return None  # a key that a map does not have
            else:
                raise self._unknown(place)
        return value

    def _unknown(self, place: Field) -> UserError:
        path = ".".join((place.variable, *place.names))
        return UserError(f"unknown field {path} in the template; the fields are {', '.join(self._whole)}.")

    def _method(self, place: Field, arguments: Sequence[Any]) -> Any:
        """Docker's `.Label "key"`."""
        if place == Field("", ("Label",)) and len(arguments) == 1 and "Labels" in self._whole:
            labels = self._whole["Labels"]
            return labels.get(arguments[0], "") if isinstance(labels, dict) else ""
        raise UserError(f"the template's .{'.'.join(place.names)} takes no arguments; leave them out.")

    def _called(self, name: str, arguments: Sequence[Value]) -> Any:
        if name in ("and", "or"):  # evaluated only as far as needed
            found: Any = None
            for one in arguments:
                found = self.value(one)
                if bool(found) == (name == "or"):
                    break
            return found
        function = _FUNCTIONS.get(name)
        if function is None:
            known = ", ".join(sorted((*_FUNCTIONS, "and", "or")))
            raise UserError(f"unknown function {name} in the template; the functions are {known}.")
        try:
            return function(*(self.value(one) for one in arguments))
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(
                f"the template's function {name} cannot be applied to these arguments: {error}."
            ) from error


def _items(value: Any) -> Sequence[tuple[Any, Any]]:
    """Return what `range` goes over, with keys."""
    match value:
        case None:
            return ()
        case Mapping():
            return [(key, value[key]) for key in sorted(value)]
        case list() | tuple():
            return list(enumerate(value))
    raise UserError(f"the template's range cannot go over {plain(value)!r}; name a list or a map.")


def _json(value: Any) -> str:
    def known(value: Any) -> Any:
        match value:
            case Joined():
                return str(value)
            case Mapping():
                return {key: known(item) for key, item in value.items()}
            case list() | tuple():
                return [known(item) for item in value]
        return value

    text = json.dumps(known(value), separators=(",", ":"), ensure_ascii=False)
    # json leaves DEL and the C1 controls, which terminals obey.
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key, "")
        elif isinstance(value, list | tuple):
            value = value[key]
        else:
            raise TypeError(f"{plain(value)!r} has no keys")
    return value


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogateescape"))
    return len(value)


def _pad(text: Any, before: int, after: int) -> str:
    return " " * before + plain(text) + " " * after if plain(text) else ""


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "json": _json,
    "index": _index,
    "len": _length,
    "join": lambda items, separator: separator.join(map(plain, items)),
    "split": lambda text, separator: plain(text).split(separator),
    "lower": lambda text: plain(text).lower(),
    "upper": lambda text: plain(text).upper(),
    "title": lambda text: plain(text).title(),
    "pad": _pad,
    "truncate": lambda text, length: plain(text)[:length],
    "print": lambda *values: "".join(map(plain, values)),
    "println": lambda *values: " ".join(map(plain, values)) + "\n",
    "not": lambda value: not value,
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "lt": lambda first, second: first < second,
    "le": lambda first, second: first <= second,
    "gt": lambda first, second: first > second,
    "ge": lambda first, second: first >= second,
}
