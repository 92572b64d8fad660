"""The settings of a mount as words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from unionfs.errors import quoted
from unionfs.settings.words import shown_bytes, shown_clock

_OPTIONS: Final = {
    "uids": "uidmapping",
    "gids": "gidmapping",
    "uid": "squash_to_uid",
    "gid": "squash_to_gid",
    "permissions": "xattr_permissions",
}
"""The options of those parts of `Shown` that have other names."""


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of each setting, from `MountSettings.to_json`."""
    rows = []
    for name, value in settings.items():
        match name:
            case "storage":
                continue
            case "features" | "shown":
                rows += [(_OPTIONS.get(part, part), _shown_part(item)) for part, item in value.items()]
            case _:
                rows.append((name, shown(value)))
    return rows + [("storage", _shown_storage(spec)) for spec in settings["storage"]]


def _shown_part(value: object) -> str:
    if isinstance(value, list | tuple):  # ranges of ids
        value = [":".join(map(str, item)) for item in value]
    return shown(value)


def io_reasons(io: object) -> list[str]:
    """Return sentences: why this I/O mode, why not the others, and what the kernel lacks."""
    if not isinstance(io, dict):
        return []
    more = [values for name in ("why_not", "missing") if isinstance(values := io.get(name), dict)]
    sentences = [io.get("why"), *(sentence for values in more for sentence in values.values())]
    return [str(sentence) for sentence in sentences if sentence]


def copying_up(figures: Mapping[str, Any]) -> list[str]:
    """Return a line for each file that is being copied up: what, how far, rate and time left."""
    return [_copy(one) for one in figures.get("copying_up", ())]


def _copy(one: Mapping[str, Any]) -> str:
    copied, size, rate = one["copied"], one["size"], one["copied"] / max(one["seconds"], 1e-3)
    words = f"{quoted(one['path'])}: {shown_bytes(copied)} of {shown_bytes(size)}, {shown_bytes(rate)}/s"
    return f"{words}, {shown_clock((size - copied) / rate)} left" if rate else words


def _shown_storage(spec: dict[str, Any]) -> str:
    what = {"volume": "name", "bind": "path"}.get(spec["type"])
    source = spec["type"] if what is None else f"{spec['type']} {quoted(spec[what])}"
    return f"{source} at {quoted(spec['target'])}{' (read-only)' if spec['read_only'] else ''}"


def shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(shown(item) for item in value) or "-"
        case dict():
            given = {name: item for name, item in value.items() if item not in (None, (), [])}
            return ", ".join(f"{name}={item}" for name, item in given.items()) or "yes"
        case str():
            return quoted(value) if value else "-"
        case _:
            return str(value)
