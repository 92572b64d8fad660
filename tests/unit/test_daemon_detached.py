"""Which of this user's mounts are detached and still in use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from unionfs.daemon import detached
from unionfs.daemon.detached import Detached, detached_mounts
from unionfs.sys.mountusers import MountUser


def _entry(since: float, device: str, **changes: Any) -> Any:
    values = {"ending": False, "waiting": False, "alive": True, "there": [], "ends": False, **changes}
    return SimpleNamespace(
        since=since, device=device, ending=values["ending"], waiting=values["waiting"], ends=values["ends"],
        is_alive=lambda: values["alive"], mounts=lambda: values["there"],
    )  # fmt: skip


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    asked: list[Any] = []
    monkeypatch.setattr(detached.live, "entries", lambda: found)
    monkeypatch.setattr(detached.live, "has_ended_soon", lambda entry: asked.append(entry) or entry.ends)
    monkeypatch.setattr(detached, "processes_with", lambda device: [4, 5] if device == "0:9" else [])
    users = {"0:9": [MountUser(5, "sh", "cwd"), MountUser(6, "cat", "open file")]}
    monkeypatch.setattr(detached, "users_of_device", lambda device: users.get(device, []))
    monkeypatch.setattr(detached, "command_of", lambda pid: f"command {pid}")
    return found


USERS = [
    MountUser(4, "command 4", "mount namespace"),
    MountUser(5, "command 5", "mount namespace"),
    MountUser(6, "cat", "open file"),
]
"""A process whose mount namespace has the mount is named once."""


def test_detached_mounts(entries: list[Any]) -> None:
    """The oldest first; those that something uses, or whose daemons do not end."""
    used, unused, waits = _entry(3, "0:9", ends=True), _entry(1, "0:8"), _entry(2, "0:9")
    entries[:] = [
        used, unused, waits, _entry(0, "0:8", ends=True), _entry(0, "0:9", ending=True),
        _entry(0, "0:9", waiting=True), _entry(0, "0:9", alive=False), _entry(0, "0:9", there=["a mount"]),
    ]  # fmt: skip
    assert detached_mounts() == [Detached(unused, []), Detached(waits, USERS), Detached(used, USERS)]
