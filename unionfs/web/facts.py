"""What the pages show besides figures: read by children of the server, as plain values."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from unionfs.branches.listed import listed
from unionfs.containers.state import every, facts, shown_fields
from unionfs.containers.store import uses as container_uses
from unionfs.daemon.described import io_reasons, setting_rows
from unionfs.daemon.differences import changes_of
from unionfs.daemon.live import LiveMount, live_mounts
from unionfs.errors import UserError
from unionfs.settings.words import printable
from unionfs.storage.backup import backed_up
from unionfs.storage.measuring import uses as volume_uses
from unionfs.storage.volumes import Volumes


def text_of(name: bytes | str) -> str:
    """Return a file name as text: bytes that are not UTF-8 and what cannot be printed are escaped."""
    with suppress(UnicodeEncodeError):  # a text that is not a file name
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return printable(str(name))


def settings_of(name: str) -> dict[str, Any]:
    """Return the settings of a mount, and sentences about its I/O mode. Raises UserError."""
    mount = _mount(name)
    answer = mount.ask()
    reasons = io_reasons(answer.get("io")) if answer is not None else []
    return {"rows": setting_rows(mount.settings.to_json()), "reasons": reasons}


def changes(name: str, first: int, count: int) -> dict[str, Any]:
    """Return `count` changes of a mount from number `first` on, and how many there are. Raises UserError."""
    total, shown = 0, []
    for kind, path in changes_of(_mount(name)):
        if first <= total < first + count:
            shown.append((kind, text_of(path)))
        total += 1
    return {"rows": shown, "total": total}


def _mount(name: str) -> LiveMount:
    found = next((mount for mount in live_mounts() if mount.name == name), None)
    if found is None:
        raise UserError("it is not mounted any more, or its daemon has ended.")
    return found


def volumes(root: str, *, measured: bool) -> dict[str, Any]:
    """Return the volumes, without options, which may contain passwords. Raises UserError."""
    notes: list[str] = []
    store = Volumes(root, tell=notes.append)
    users = store.all_users()
    sizes = {use.name: use.size for use in volume_uses(root)} if measured else {}
    rows = [
        {
            "name": volume.name, "driver": volume.driver, "created": volume.created,
            "mountpoint": text_of(volume.mountpoint), "labels": dict(volume.labels),
            "users": [str(user) for user in users.get(volume.name, [])],
            "backed_up": backed_up(volume), "size": sizes.get(volume.name),
        }
        for volume in store.all()
    ]  # fmt: skip
    return {"rows": rows, "notes": list(dict.fromkeys(notes))}


def containers(root: str, *, measured: bool) -> dict[str, Any]:
    """Return the containers, with docker's fields. Raises OSError."""
    sizes = {use.name: use.size for use in container_uses(root)} if measured else {}
    rows = []
    for one in every(root):
        known = facts(*one)
        rows.append({**shown_fields(known), "pid": known["pid"], "size": sizes.get(known["name"])})
    return {"rows": rows, "notes": []}


def branches(root: str) -> dict[str, Any]:
    """Return the branches. Raises UserError."""
    notes: list[str] = []
    with suppress(FileNotFoundError):
        return {"rows": listed(root, notes.append), "notes": notes}
    return {"rows": [], "notes": notes}
