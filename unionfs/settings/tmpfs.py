"""Parses `--tmpfs` (moby pkg/mount/flags.go) and `-u tmpfs:`, with options of mount(8) and tmpfs(5)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from unionfs.errors import UserError, quoted
from unionfs.settings.sizes import parse_count, parse_tmpfs_size
from unionfs.settings.specs import TMPFS_FLAGS, TmpfsOptions, TmpfsSpec

TMPFS_UPPER = "tmpfs"
# Options of mount(8) in --tmpfs: flags to add, flags to remove, and options without effect.
_TMPFS_ADD = ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "strictatime", "nosymfollow")
_TMPFS_TAKE = {
    "suid": "nosuid", "dev": "nodev", "exec": "noexec", "atime": "noatime", "diratime": "nodiratime",
}  # fmt: skip
_TMPFS_SKIPPED = ("rw", "defaults", "async", "private", "rprivate")
_TMPFS_MORE = ("huge", "mpol", "nr_blocks", "inode32", "inode64")

_T = TypeVar("_T")


def target_of(option: str, text: str) -> str:
    """Normalize a target (`.`, `..`, double slashes) without resolving symlinks, like Docker."""
    if not text.startswith("/"):
        shown = f"target {quoted(text)}" if text else "the target"
        what = "is a relative path" if text else "is empty"
        raise UserError(f"{option}: {shown} {what}; give an absolute path within the union, such as /data.")
    clean = "/" + os.path.normpath(text).strip("/")
    if clean == "/":
        raise UserError(f"{option}: target {quoted(text)} is the union's root; mount below it.")
    return clean


def parse_tmpfs(text: str, option: str = "") -> TmpfsSpec:
    """Parse a `--tmpfs`: /target[:option,...], options of mount(8) and tmpfs(5).

    `option` names it in errors, by default as `--tmpfs`. Raises UserError.
    """
    option = option or f"--tmpfs {quoted(text)}"
    target, _, words = text.partition(":")
    target = target_of(option, target)
    options, flags, read_only = parse_tmpfs_words(option, words.split(","))
    return TmpfsSpec(target, options, read_only=read_only, flags=flags)


def parse_tmpfs_words(option: str, words: Iterable[str]) -> tuple[TmpfsOptions, tuple[str, ...], bool]:
    """Parse options of mount(8) and tmpfs(5): those of tmpfs, the flags, and whether it is read-only.

    `option` names them in errors. Raises UserError.
    """
    flags = list(TMPFS_FLAGS)
    rest = []
    read_only = False
    for word in words:
        if word in ("ro", "rw"):
            read_only = word == "ro"
        elif word in _TMPFS_ADD:
            flags = [flag for flag in flags if flag != word] + [word]
        elif word in _TMPFS_TAKE:
            flags = [flag for flag in flags if flag != _TMPFS_TAKE[word]]
        elif word and word not in _TMPFS_SKIPPED:
            rest.append(word)
    more = ", and mount(8)'s ro, exec, suid, dev and noatime"
    return _tmpfs_options(option, rest, TmpfsOptions(mode=0o1777), more), tuple(flags), read_only


def is_tmpfs_upper(upper: str) -> bool:
    """Return whether `-u` requests a tmpfs: `tmpfs` or `tmpfs:OPTION,...`. A directory is ./tmpfs."""
    return upper == TMPFS_UPPER or upper.startswith(TMPFS_UPPER + ":")


def parse_tmpfs_upper(upper: str) -> TmpfsOptions:
    """Parse the options of a tmpfs for upper and work. Raises UserError."""
    words = upper.partition(":")[2].split(",")
    return _tmpfs_options(f"-u {quoted(upper)}", [word for word in words if word], TmpfsOptions())


def _tmpfs_options(
    option: str, words: Iterable[str], options: TmpfsOptions, more_words: str = ""
) -> TmpfsOptions:
    """`more_words` names what else is accepted, as the end of a sentence."""
    more: list[tuple[str, str]] = []
    for word in words:
        name, equals, value = word.partition("=")
        match name:
            case _ if name in _TMPFS_VALUES:
                value_parser, what = _TMPFS_VALUES[name]
                parsed = value_of(option, name, value, value_parser, what)
                options = replace(options, **{name: parsed})
            case "swap" | "noswap" if not equals:
                options = replace(options, swap=name == "swap")
            case _ if name in _TMPFS_MORE:
                more.append((name, value))
            case _:
                raise UserError(
                    f"{option}: unknown option {quoted(word)}; the options are size=, mode=, nr_inodes=, "
                    f"uid=, gid=, huge=, mpol=, swap and noswap{more_words}."
                )
    return replace(options, more=tuple(more))


def octal(text: str) -> int:
    """Parse an octal mode. Raises ValueError."""
    mode = int(text, 8) if text.isascii() and text.isdecimal() else -1
    if not 0 <= mode <= 0o7777:
        raise ValueError(text)
    return mode


def _id(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) >= 2**32 - 1:
        raise ValueError(text)
    return int(text)


_TMPFS_VALUES: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "size": (parse_tmpfs_size, "a size as 64m, or 50%"),
    "mode": (octal, "an octal mode as 1777"),
    "nr_inodes": (parse_count, "a number as 10k"),
    "uid": (_id, "a number"),
    "gid": (_id, "a number"),
}


def value_of(option: str, name: str, text: str, parse: Callable[[str], _T], what: str) -> _T:
    """Return `parse(text)`. Turns ValueError into a UserError that asks for `what`."""
    try:
        return parse(text)
    except ValueError:
        raise UserError(f"{option}: invalid {name} {text!r}; write {what}.") from None
