"""The journal of a commit, by which it is completed or reverted after its process was killed.

    ROOT/commits/ID/journal.json    the operations
    ROOT/commits/ID/state.json      the state of the commit
    ROOT/commits/ID/after.json      the state of the base after it, to detect later changes
    ROOT/commits/ID/seen.json       what a branch that stays remembered of the base before it; see `seen`
    ROOT/commits/ID/layer           what a commit of a part has taken out of the branch's layer: see `leaving`
    ROOT/commits/ID/new, old        the new objects, and the replaced ones, if they can be here
    BASE/.unionfs-ID/new, old       else there, on the base's filesystem
    ROOT/commits/ID/stage           after a commit to a parent: that directory, taken from the parent's layer
    ROOT/commits/ID/branch          the branch, after its commit, for `undo`

A commit that changes filesystems below the base has a journal in the journal for each (`others`), whose files
are `after-K.json`, `seen-K.json` and `layer-K`; the states of layers are in `after-layer.json` and
`after-K-layer.json`. It keeps its directories on them for `undo`.

Before the state is `on` nothing has changed in the base; then the commit is applied, or, in the state `back`,
reverted. Each operation names its objects by inode numbers, which show whether it was applied.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from typing import Any

from unionfs.branches.ids import Ids
from unionfs.branches.store import STATE_FILE, Store
from unionfs.errors import UserError, quoted
from unionfs.storage import jsonfiles
from unionfs.sys.attributes import FileAttributes
from unionfs.sys.trees import remove_path

_FILE = "journal.json"
_AFTER = "after"
_SEEN = "seen"
VERSION = 2
PREFIX = b".unionfs-"
NEW, ON, BACK, ENDING, DONE = "new", "on", "back", "ending", "done"


@dataclass(slots=True)
class Move:
    """A put or a drop. Numbers are inode numbers."""

    path: str
    number: int
    """The name in `new` and `old`."""
    new: int | None
    """The new object; None for a drop."""
    old: int | None
    """The replaced object; None if the path does not exist."""
    mode: int | None = None
    """The mode of a new directory."""
    seen: list[int] | None = None
    """Size and times of a replaced file, to detect a change."""
    source: str | None = None
    """The former path of a renamed directory; None for a put or drop."""
    own: bool = False
    """Whether the new object is a file of the branch's layer, at the same path; see `sharing`."""
    shared: list[str] = field(default_factory=list)
    """Files below a new directory that are hard links of the layer's files: paths below the directory."""


@dataclass(slots=True)
class Setting:
    """A directory that gets other attributes."""

    path: str
    new: FileAttributes
    old: FileAttributes
    former: str
    """Its path before the commit."""


@dataclass(slots=True)
class Journal:
    """The operations of one commit, and its state."""

    id: str
    branch: str
    made: int
    """When the branch was made, which tells it from another one of that name."""
    parent: str | None
    """The branch that is changed instead of the base; `base` is its mountpoint meanwhile."""
    base: str
    inode: int
    inside: bool
    """Whether its directory is in the base."""
    keep: bool
    """Whether the branch stays."""
    parent_made: int = 0
    """When the parent was made."""
    command: list[str] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    state: str = NEW
    ended: int = 0
    after: dict[str, list[int]] = field(default_factory=dict)
    """The state of each path after the commit, to detect later changes."""
    times: dict[str, list[int]] = field(default_factory=dict)
    """Of the layer's directories whose files are shared: atime and mtime, to be set when these come back."""
    ids: Ids | None = None
    """As of the branch; owners are those of its user namespace."""
    key: str = ""
    """Of the part of the branch that is committed; empty for the branch itself."""
    filesystem: str | None = None
    """Of a part: as of its record."""
    stays: bool = False
    """Whether its directory in the base is kept for `undo`."""
    place: str = ""
    """The path of the directory of the base that has its directory; empty for the base itself."""
    others: list[Journal] = field(default_factory=list)
    """The operations on the filesystems below the base. Their states are that of this one."""
    layer: Journal | None = None
    """The operations on the layer of a branch that stays, in the branch's directory: see `leaving`."""
    of_layer: bool = False
    """Whether it is such a one."""

    @property
    def all(self) -> list[Journal]:
        """This one and the others."""
        return [self, *self.others]

    @property
    def every(self) -> list[Journal]:
        """These, and then those of the layers."""
        return [*self.all, *(one.layer for one in self.all if one.layer is not None)]

    def of_rest(self, inode: int) -> Journal:
        """Add and return an empty one for the layer; `inode`: that of the branch's directory."""
        self.layer = Journal(
            id=self.id, branch=self.branch, made=self.made, parent=None, base="", inode=inode, inside=False,
            keep=True, key=self.key, of_layer=True,
        )  # fmt: skip
        return self.layer

    def turns(self, state: str) -> None:
        """It goes into another state."""
        self.state = state

    def joins(self, others: list[Journal]) -> None:
        """Commit others with it. If there are any, all can be undone."""
        self.others = others
        for one in self.all:
            # Only the filesystem itself has a place for the replaced objects.
            one.stays = one.inside and bool(others)

    def has_reached(self, after: dict[str, list[int]]) -> None:
        """Remember the states of the paths after the commit, if it can be undone."""
        self.after = after

    def is_applied(self, *, after: int) -> None:
        """Enter the state in which all is in place; `after`: when the last commit ended, before this one."""
        self.state, self.ended = ENDING, max(time.time_ns(), after + 1)

    @property
    def can_undo(self) -> bool:
        """Whether the replaced objects are kept."""
        return self.parent is not None or all(one.stays or not one.inside for one in self.all)

    @property
    def target(self) -> str:
        """The tree that it changes: the base, or `branch NAME`."""
        if self.of_layer:
            return f"branch {self.branch}"
        return self.base if self.parent is None else f"branch {self.parent}"

    def shown(self, path: str) -> str:
        """A path of this journal for messages."""
        return path.removeprefix("/upper")[1:] if self.of_layer else path[1:]

    @property
    def stage(self) -> bytes:
        """The name of its directory in the base."""
        return PREFIX + self.id.encode()


_MOVE = attrgetter(*(item.name for item in fields(Move)))
_STATE_FIELDS = ("branch", "made", "state", "ended")
_KEPT = [item.name for item in fields(Journal) if item.name not in ("after", "state", "ended")]


def new_id() -> str:
    """A new one; the latest is the greatest."""
    return f"{time.time_ns():020d}"


def directory(store: Store, id: str) -> str:
    """Where a commit's files are."""
    return f"{store.commits}/{id}"


def write(store: Store, journal: Journal) -> None:
    """Write all but the state, and then the state. Raises OSError."""
    values = {**_values(journal), "version": VERSION}
    jsonfiles.write(f"{directory(store, journal.id)}/{_FILE}", values)
    mark(store, journal)


def _values(journal: Journal) -> dict[str, Any]:
    # Not `asdict`, which copies each of many thousand moves deeply.
    values = {name: getattr(journal, name) for name in _KEPT}
    values["ids"] = None if journal.ids is None else asdict(journal.ids)
    values["moves"] = [_MOVE(move) for move in journal.moves]
    values["settings"] = [
        (setting.path, attributes_to_json(setting.new), attributes_to_json(setting.old), setting.former)
        for setting in journal.settings
    ]
    values["others"] = [_values(other) for other in journal.others]
    values["layer"] = None if journal.layer is None else _values(journal.layer)
    return values


def write_after(store: Store, journal: Journal) -> None:
    """Write the states of the paths after the commit, and then its own state. Raises OSError."""
    for one in journal.every:
        jsonfiles.write(_own_file(store, one, _AFTER), one.after)
    mark(store, journal)


def mark(store: Store, journal: Journal) -> None:
    """Write the state alone. Raises OSError."""
    values = {name: getattr(journal, name) for name in _STATE_FIELDS}
    jsonfiles.write(f"{directory(store, journal.id)}/{STATE_FILE}", values)


def read(store: Store, id: str) -> Journal | None:
    """None if there is no journal yet. Raises UserError if it is damaged."""
    path = f"{directory(store, id)}/{_FILE}"
    try:
        values = jsonfiles.read(path)
        if values.pop("version") != VERSION:
            raise ValueError("it is of another version")
        entry = _journal(values)
        state = jsonfiles.read(f"{directory(store, id)}/{STATE_FILE}")
        entry.state, entry.ended = state["state"], state["ended"]
        for one in entry.every:
            with suppress(FileNotFoundError):
                one.after = jsonfiles.read(_own_file(store, one, _AFTER))
        return entry
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the journal {quoted(path)} cannot be read ({error}), so its commit can neither go on nor back; "
            "the replaced files are beside it in `old`. Move its directory away."
        ) from error


def _journal(values: dict[str, Any]) -> Journal:
    values["moves"] = [Move(*item) for item in values["moves"]]
    values["settings"] = [
        Setting(path, attributes_from_json(new), attributes_from_json(old), former)
        for path, new, old, former in values["settings"]
    ]
    if values.get("ids") is not None:
        values["ids"] = Ids.from_json(values["ids"])
    values["others"] = [_journal(other) for other in values.get("others", ())]
    if values.get("layer") is not None:
        values["layer"] = _journal(values["layer"])
    return Journal(**values)


def former_states(store: Store, journal: Journal) -> str:
    """The file with what a branch that stays remembered of the base before the commit."""
    return _own_file(store, journal, _SEEN)


def _own_file(store: Store, journal: Journal, name: str) -> str:
    """A file of a commit, or of one of the others in it."""
    layer = "-layer" if journal.of_layer else ""
    return f"{directory(store, journal.id)}/{name}{_suffix(journal)}{layer}.json"


def layer_stage(store: Store, journal: Journal) -> str:
    """The directory of what a commit takes out of a layer."""
    return f"{directory(store, journal.id)}/layer{_suffix(journal)}"


def _suffix(journal: Journal) -> str:
    return f"-{journal.key}" if journal.key else ""


def ids_of(store: Store, name: str | None = None) -> Ids | None:
    """The ids with which the branch `name` is committed, or without a name, the last commit is undone. Raises
    UserError.
    """
    if name is not None and (branch := store.branch(name)).exists():
        return branch.record().ids
    found = (read(store, id) for id in reversed(store.commit_ids()))
    entries = [entry for entry in found if entry is not None and name in (None, entry.branch)]
    if name is None:
        entries.sort(key=lambda entry: entry.ended, reverse=True)
    # An interrupted undo is finished before another begins.
    entries.sort(key=lambda entry: not (entry.state == BACK and entry.ended))
    return entries[0].ids if entries else None


def forget(store: Store, id: str) -> None:
    """Remove a commit's files: first the journal, so that a partly removed one is not taken for one, and the
    next command removes the rest. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(f"{directory(store, id)}/{_FILE}")
    with suppress(OSError):
        remove_path(directory(store, id), unlock=True)


def attributes_to_json(value: FileAttributes) -> dict[str, Any]:
    """Plain values."""
    found = value._asdict()
    found["xattrs"] = {os.fsdecode(name): data.hex() for name, data in value.xattrs.items()}
    return found


def attributes_from_json(values: dict[str, Any]) -> FileAttributes:
    """The reverse. Raises KeyError, TypeError or ValueError for others."""
    xattrs = {os.fsencode(name): bytes.fromhex(data) for name, data in values["xattrs"].items()}
    return FileAttributes(**{**values, "xattrs": xattrs})
