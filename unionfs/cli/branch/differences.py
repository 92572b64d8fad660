"""`unionfs branch diff`, and the same lines after a `try`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import click

from unionfs.cli.branch.common import complete_branches, json_option
from unionfs.cli.common import on_terminal, print_json, root_option, tell
from unionfs.cli.terminal import shell_word
from unionfs.settings.sizes import shown_size
from unionfs.settings.words import printable
from unionfs.sys.calls import syncfs
from unionfs.sys.fds import directory

if TYPE_CHECKING:
    from unionfs.branches.describe import Difference, Side

_CAPABILITY = b"security.capability"
_COLOURS = {"A": "green", "C": "yellow", "D": "red", "R": "cyan"}


class Contents(Protocol):
    """Describes the contents of differences: `Describer`, `Describers`."""

    def unified(self, item: Difference) -> list[str] | None: ...
    def digest(self, item: Difference, *, new: bool) -> str: ...


@click.command(
    epilog="""\b
Examples:
  unionfs branch diff fix
  unionfs branch diff --content --except '*.lock' fix
""",
)
@click.option("--stat", "form", flag_value="stat", help="Lines added and removed in each file, and a total.")
@click.option("--content", "form", flag_value="content",
              help="A unified diff of text files; size and SHA-256 of others.")  # fmt: skip
@click.option("--only", multiple=True, metavar="PATTERN", help="Only these paths; may be repeated.")
@click.option("--except", "leave", multiple=True, metavar="PATTERN", help="Not these paths; may be repeated.")
@click.option("--all", "everything", is_flag=True,
              help="Caches and temporary files, too, which are otherwise counted at the end.")  # fmt: skip
@root_option
@json_option
@click.argument("name", shell_complete=complete_branches)
def diff(
    form: str | None, only: tuple[str, ...], leave: tuple[str, ...], everything: bool, root: str | None,
    as_json: bool, name: str,
) -> None:  # fmt: skip
    """Show what the branch NAME changes: A(dded), C(hanged), D(eleted) or R(enamed), the path, and for a
    change what it changes: type, content, target, mode, owner, xattrs, or merely times. Of what is added, the
    target of a symlink, and the mode if it is executable, set-id, sticky or writable for all.

    A pattern covers what it matches and all below it; with a slash it is matched from the root of the
    branch, else with each name.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.ids import enter
    from unionfs.branches.mounts import mount_of
    from unionfs.branches.parts import all_of
    from unionfs.branches.selection import NOISE, Selection, relative
    from unionfs.branches.store import Store
    from unionfs.branches.together import Describers, all_viewed

    branch = Store(root).existing(name)
    enter(branch.record().ids)
    for entry in filter(None, map(mount_of, all_of(branch))):
        # What programs have written may be in the page cache of the mount; a killed daemon's is lost.
        try:
            with directory(entry.settings.mountpoint) as fd:
                syncfs(fd)
        except OSError:
            if entry.is_alive():
                raise
    base = branch.record().base
    chosen = Selection([relative(item, base) for item in only], [relative(item, base) for item in leave])
    noise = Selection((), () if everything else NOISE)
    with all_viewed(branch) as views:
        describer = Describers(views)
        found = [item for item in describer.differences() if chosen.has(b"/" + item.path)]
        shown = [item for item in found if noise.has(b"/" + item.path)]
        if as_json:
            print_json([values_of(describer, item, form) for item in shown])
            if left := len(found) - len(shown):
                # The list has no place for it.
                tell(f"{left} changes in caches and temporary directories are left out; --all lists them.")
            return
        lines = [*rendered(describer, shown, form), *hidden(len(found) - len(shown))]
    show(lines)


def values_of(describer: Contents, item: Difference, form: str | None) -> dict[str, object]:
    """A difference as plain values."""
    values = item.to_json()
    if form == "content":
        lines = describer.unified(item)
        values["diff"] = None if lines is None else "\n".join(lines)
    return values


def show(lines: Sequence[str]) -> None:
    """Print lines, by a pager if they are more than a terminal shows."""
    text = "\n".join(lines)
    if on_terminal() and len(lines) > os.get_terminal_size().lines:
        # For start-up time: only long output needs it.
        import pydoc

        os.environ.setdefault("LESS", "FRX")
        pydoc.pager(text)
    elif lines:
        print(text)


def hidden(count: int) -> Iterator[str]:
    """The line with the number of changes that are not listed."""
    if count:
        yield f"and {count} in caches and temporary directories; --all lists them"


def rendered(describer: Contents, found: Sequence[Difference], form: str | None) -> Iterator[str]:
    """The lines about differences: names, with `form` also `stat` or `content`."""
    if form == "stat":
        yield from _stat(describer, found)
        return
    for item in found:
        yield _coloured(_line(item), _COLOURS[item.kind])
        if form == "content":
            yield from _content(describer, item)


def _line(item: Difference) -> str:
    words = f"{item.kind} {shell_word(item.path)}{'/' if _is_directory(item) else ''}"
    if item.source is not None:
        words = f"R {shell_word(item.source)} -> {shell_word(item.path)}{'/' if _is_directory(item) else ''}"
    if item.new is not None and item.new.target is not None and (item.kind == "A" or "type" in item.what):
        words += f" -> {shell_word(item.new.target)}"
    details = [*_unusual(item.new)] if item.kind == "A" and item.new is not None else _details(item)
    return f"{words}  ({', '.join(details)})" if details else words


def _details(item: Difference) -> list[str]:
    what = item.what
    if {"type", "content", "target"} & {*what}:
        what = tuple(word for word in what if word != "times")  # they go along with it
    return [_detail(word, item.old, item.new) for word in what]


def _unusual(side: Side) -> Iterator[str]:
    """What a reviewer should know of a new object besides its name: programs, rights, devices."""
    mode = stat.S_IMODE(side.attributes.mode)
    if side.kind not in ("file", "directory", "symlink"):
        yield side.kind
    if mode & {"symlink": 0, "directory": 0o7002}.get(side.kind, 0o7113):
        yield f"mode {mode:04o}"
    if side.kind == "file" and mode & (stat.S_ISUID | stat.S_ISGID):
        yield f"owner {side.attributes.uid}:{side.attributes.gid}"
    if _CAPABILITY in side.attributes.xattrs:
        yield f"xattrs {os.fsdecode(_CAPABILITY)}"


def _is_directory(item: Difference) -> bool:
    side = item.new or item.old
    return side is not None and side.kind == "directory"


def _detail(word: str, old: Side | None, new: Side | None) -> str:
    if old is None or new is None:
        return word
    before, now = old.attributes, new.attributes
    match word:
        case "mode":
            return f"mode {before.mode & 0o7777:04o} -> {now.mode & 0o7777:04o}"
        case "owner":
            return f"owner {before.uid}:{before.gid} -> {now.uid}:{now.gid}"
        case "type":
            return f"{old.kind} -> {new.kind}"
        case "target":
            return f"target {shell_word(old.target or b'')} -> {shell_word(new.target or b'')}"
        case "xattrs":
            names = {*before.xattrs, *now.xattrs}
            changed = sorted(n for n in names if before.xattrs.get(n) != now.xattrs.get(n))
            return "xattrs " + " ".join(shell_word(name) for name in changed)
    return word


def _content(describer: Contents, item: Difference) -> Iterator[str]:
    if item.kind == "C" and not {"content", "type"} & {*item.what}:
        return
    lines = describer.unified(item)
    if lines is not None:
        for line in lines:
            colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
            text = printable(line, keep="\t\n") if on_terminal() else line
            yield _coloured(text, colour) if colour else text
        return
    for name, side, new in (("old", item.old, False), ("new", item.new, True)):
        if side is not None and side.kind == "file":
            yield f"  {name}: {side.size} bytes, sha256 {describer.digest(item, new=new)}"


def _stat(describer: Contents, found: Sequence[Difference]) -> Iterator[str]:
    added = removed = 0
    rows = []
    for item in found:
        lines = describer.unified(item)
        text = ""
        if lines is not None:
            plus = sum(line.startswith("+") for line in lines[2:])
            minus = sum(line.startswith("-") for line in lines[2:])
            added, removed = added + plus, removed + minus
            text = f"+{plus} -{minus}" if plus or minus else ""
        elif item.new is not None and item.new.kind == "file":
            before = shown_size(item.old.size) if item.old is not None else "0"
            text = f"binary {before} -> {shown_size(item.new.size)}"
        rows.append((_line(item), text, item.kind))
    width = min(60, max((len(line) for line, _, _ in rows), default=0))
    for line, text, kind in rows:
        yield _coloured(f"{line.ljust(width)} | {text}".rstrip(" |"), _COLOURS[kind])
    yield total(found) + (f", {added} lines added, {removed} removed" if added or removed else "")


def total(found: Sequence[Difference]) -> str:
    """How many of which kind."""
    names = {"A": "added", "C": "changed", "D": "deleted", "R": "renamed"}
    counts = [(sum(item.kind == kind for item in found), word) for kind, word in names.items()]
    return ", ".join(f"{count} {word}" for count, word in counts if count) or "no changes"


def _coloured(text: str, colour: str) -> str:
    return click.style(text, fg=colour) if on_terminal() and "NO_COLOR" not in os.environ else text
