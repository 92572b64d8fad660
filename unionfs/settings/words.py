"""Values as words: sizes, durations, moments, and text that others chose."""

from __future__ import annotations

from datetime import datetime

_C_ESCAPES = {
    '"': '\\"', "\\": "\\\\", "\a": "\\a", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\v": "\\v",
    "\f": "\\f", "\r": "\\r",
}  # fmt: skip


def printable(text: str, keep: str = "") -> str:
    """Return the text with unprintable characters escaped, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def c_quoted(name: bytes) -> str:
    """Return a file name as git(1) shows it in a diff: unchanged, or in double quotes with the escapes of C
    if it has a quote, a backslash, or what is not printable. As with git's `core.quotePath` off, other
    characters of UTF-8 stay as they are.
    """
    text = name.decode("utf-8", "surrogateescape")
    if text.isprintable() and not {'"', "\\"} & {*text}:
        return text
    return '"' + "".join(map(_c_escaped, text)) + '"'


def _c_escaped(char: str) -> str:
    if char in _C_ESCAPES:
        return _C_ESCAPES[char]
    if char.isprintable():
        return char
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))


def moment(seconds: float, timespec: str = "seconds") -> str:
    """Format seconds since the epoch as ISO 8601 with the local offset."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec=timespec)


def in_table(moment: str | None) -> str:
    """Shorten what :func:`moment` returned for a table: local time, without its offset."""
    return "-" if not moment else moment[:19].replace("T", " ")


def shown_duration(ns: float | None) -> str:
    """Format a duration with three digits, the accuracy of the measurement."""
    if ns is None:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            value = ns / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{ns:.0f} ns"


def shown_clock(seconds: float) -> str:
    """Format a duration as minutes and seconds, or hours, minutes and seconds: 1:05, 2:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def shown_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
