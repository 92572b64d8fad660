"""What a mount that is to outlive its daemon asks of its holder, and what it says of that."""

from __future__ import annotations

import errno
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from unionfs.daemon import outliving
from unionfs.daemon.outliving import Outliving
from unionfs.daemon.settle import settle
from unionfs.fuse.direct import agreed
from unionfs.fuse.protocol import Init
from unionfs.settings.mount import MountSettings
from unionfs.settings.specs import TmpfsOptions, TmpfsSpec

SETTINGS = replace(settle("/m", lowers=["/l"], trusted_xattrs=True), outlive=True)


class _Holder:
    """Stands for the holder: notes what it is asked, and says what it was told to say."""

    def __init__(self) -> None:
        self.pid, self.stays, self.is_there = 0, False, False
        self.state = SimpleNamespace(died=(3, False), memory=4096)
        self.lies, self.why_not = False, ""
        self.made: list[Any] = []
        self.error: OSError | None = None

    def lies_on(self, device: str) -> bool:
        assert device == "0:9"
        return self.lies

    def start(self, values: Any, device: int) -> str:
        self.made.append((values, device))
        if not self.why_not:
            self.pid = 77
        return self.why_not

    async def ended(self) -> None:
        self.made.append("ended")
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        self.made.append("end")

    def take_charge(self, device: int) -> None:
        self.made.append(("take_charge", device))

    def exchange(self) -> str:
        return "the holder's answer"


class _Announcement:
    """Stands for the entry of the mount in the registry."""

    def __init__(self, settings: MountSettings) -> None:
        self.entry: Any = SimpleNamespace(device="0:9", settings=settings, to_json=lambda: "the entry")
        self.held: list[int | None] = []

    def held_by(self, holder: int | None) -> None:
        self.held.append(holder)


@pytest.fixture
def holder() -> _Holder:
    return _Holder()


@pytest.fixture(autouse=True)
def _files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliving, "_identities", lambda *_: ["the layers"])
    monkeypatch.setattr(agreed, "to_json", lambda decision: ["agreed", decision.flags])


def _made(
    holder: _Holder | None,
    settings: MountSettings = SETTINGS,
    storage: Any = None,
    *,
    foreground: bool = False,
) -> Outliving:
    directory: Any = SimpleNamespace(path="/run/x")
    stack: Any = SimpleNamespace(kept=lambda: {"kept": 1})
    given: Any = holder
    return Outliving(settings, directory, stack, given, storage, foreground=foreground)


def _connection(flags: int = Init.HAS_RESEND) -> Any:
    return SimpleNamespace(
        device=12, mount=SimpleNamespace(mount_id=5), decision=SimpleNamespace(flags=flags)
    )


def _begin(one: Outliving, connection: Any, settings: MountSettings = SETTINGS) -> _Announcement:
    announcement: Any = _Announcement(settings)
    one.begin(settings, connection, announcement)
    found: _Announcement = announcement
    return found


ANEW = {
    "anew": "it watches its lowers",
    "entry": "the entry",
    "directory": "/run/x",
    "layers": ["the layers"],
}


def test_daemons_that_go_on_with_the_mount(holder: _Holder, caplog: pytest.LogCaptureFixture) -> None:
    storage = SimpleNamespace(guardian=SimpleNamespace(kept=lambda: [7, 8]))
    for given, guardian in ((None, None), (storage, [7, 8])):
        one = _made(holder, storage=given)
        assert one.state is holder.state
        announcement = _begin(one, _connection())
        values = {
            "entry": "the entry", "directory": "/run/x", "layers": {"kept": 1}, "device": 12, "mount_id": 5,
            "agreed": ["agreed", Init.HAS_RESEND], "guardian": guardian,
        }  # fmt: skip
        assert holder.made == [(values, 12)]
        assert announcement.held == [77]
        assert one.why_not == ""
        assert one.exchange() == "the holder's answer"
        assert one.figures() == {"holder": {"pid": 77, "daemons_died": 3, "state_bytes": 4096}}
        holder.made.clear()
    assert caplog.text == ""


@pytest.mark.parametrize("stays", [False, True])
def test_daemons_that_mount_anew(holder: _Holder, caplog: pytest.LogCaptureFixture, stays: bool) -> None:
    """A holder that stays has no state of open files."""
    holder.stays = stays
    watching = replace(SETTINGS, watch_lower=True)
    one = _made(holder, watching)
    assert one.state is (None if stays else holder.state)
    assert _begin(one, _connection(), watching).held == [77]
    assert holder.made == [(ANEW, -1)]
    assert caplog.messages == [
        "the mount will not outlive its daemon: it watches its lowers; "
        "if it dies, another one mounts the union anew"
    ]
    figures = {
        "pid": 77,
        "daemons_died": 3,
        "state_bytes": 4096,
        "mounts_anew_because": "it watches its lowers",
    }
    assert one.figures() == {"holder": figures}
    assert one.exchange() == "it watches its lowers"


def test_a_holder_that_stays_mounts_anew_again(holder: _Holder, caplog: pytest.LogCaptureFixture) -> None:
    """Even if nothing else speaks against another daemon for the same mount."""
    holder.stays = True
    assert _begin(_made(holder), _connection()).held == [77]
    assert holder.made == [({**ANEW, "anew": ""}, -1)]
    assert caplog.messages == []


def test_a_session_by_libfuse_is_mounted_anew(holder: _Holder) -> None:
    one = _made(holder)
    _begin(one, None)
    assert holder.made == [({**ANEW, "anew": "that needs --session direct"}, -1)]


def test_an_old_kernel(holder: _Holder) -> None:
    why = "the kernel cannot send requests again, which needs Linux 6.9"
    one = _made(holder)
    _begin(one, _connection(flags=Init(0)))
    assert holder.made == [({**ANEW, "anew": why}, -1)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"upper_tmpfs": TmpfsOptions()}, "it watches its lowers, and its upper is in memory"),
        ({"upper": "/u", "volatile": True}, "it watches its lowers, and its upper is volatile"),
    ],
    ids=["tmpfs", "volatile"],
)
def test_uppers_that_no_other_mount_can_take(
    holder: _Holder, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], why: str
) -> None:
    """The holder ends at once: nothing would be left for another daemon."""
    settings = replace(SETTINGS, watch_lower=True, **changes)
    one = _made(holder, settings)
    assert _begin(one, _connection(), settings).held == []
    assert holder.made == ["end"]
    assert one.why_not == why
    assert caplog.messages == [f"the mount will not outlive its daemon: {why}"]
    assert one.figures() == {"holder": {"none_because": why}}


@pytest.mark.parametrize(
    "changes", [{"volatile": True, "upper": None}, {"volatile": False, "upper": "/u"}], ids=str
)
def test_uppers_that_another_mount_takes(holder: _Holder, changes: dict[str, Any]) -> None:
    settings = replace(SETTINGS, watch_lower=True, **changes)
    _begin(_made(holder, settings), _connection(), settings)
    assert holder.made == [(ANEW, -1)]


@pytest.mark.parametrize("watching", [False, True])
def test_a_holder_that_cannot_start(
    holder: _Holder, caplog: pytest.LogCaptureFixture, watching: bool
) -> None:
    """Its reason counts, also instead of the reason to mount anew."""
    holder.why_not = "its holder ended"
    settings = replace(SETTINGS, watch_lower=watching)
    one = _made(holder, settings)
    assert _begin(one, _connection(), settings).held == []
    assert holder.made[1:] == ["end"]
    assert caplog.messages == ["the mount will not outlive its daemon: its holder ended"]
    assert one.figures() == {"holder": {"none_because": "its holder ended"}}


def test_mounts_that_nobody_could_take_over(holder: _Holder) -> None:
    one = _made(holder)
    holder.lies = True
    assert _begin(one, _connection()).held == []
    assert (one.why_not, holder.made) == ("this program lies on the union itself", ["end"])
    elsewhere = "the mount is in another mount namespace"
    holder.lies = False
    for entry, connection in ((None, _connection()), (True, _connection()), (None, None)):
        holder.made.clear()
        one, announcement = _made(holder), _Announcement(SETTINGS)
        if entry is None:
            announcement.entry = None
        elif connection is not None:
            connection.mount = None
        given: Any = announcement
        one.begin(SETTINGS, connection, given)
        assert (one.why_not, holder.made, announcement.held) == (elsewhere, ["end"], [])


def test_without_a_holder(holder: _Holder, caplog: pytest.LogCaptureFixture) -> None:
    """Only a mount that was to outlive its daemon says why it does not."""
    one = _made(None, replace(SETTINGS, outlive=False))
    assert caplog.messages == []
    assert (one.why_not, one.state, one.figures()) == ("it was not asked for", None, {})
    assert one.exchange() == "it was not asked for"
    assert _begin(one, _connection()).held == []
    one.take_charge(_connection())
    one.end()
    one = _made(None, foreground=True)
    why = "it runs in the foreground"
    assert caplog.messages == [f"the mount will not outlive its daemon: {why}"]
    assert (one.why_not, one.figures()) == (why, {"holder": {"none_because": why}})
    one.why_not = ""
    assert (one.exchange(), one.figures()) == ("", {"holder": {"none_because": ""}})


def test_what_the_holder_is_told(holder: _Holder) -> None:
    one = _made(holder)
    one.take_charge(_connection())
    one.end()
    assert holder.made == [("take_charge", 12), "end"]


async def test_a_holder_that_somebody_kills(holder: _Holder, caplog: pytest.LogCaptureFixture) -> None:
    """Then the mount ends with its daemon, whatever was to happen otherwise."""
    watching = replace(SETTINGS, watch_lower=True)
    one = _made(holder, watching)
    announcement: Any = _begin(one, _connection(), watching)
    holder.made.clear()
    caplog.clear()
    await one.watch(announcement)
    assert (holder.made, announcement.held, one.why_not) == (["ended"], [77, None], "its holder was killed")
    assert one.figures() == {"holder": {"none_because": "its holder was killed"}}
    assert caplog.messages == ["the mount will not outlive its daemon: its holder was killed"]


async def test_a_holder_that_cannot_be_watched(holder: _Holder, caplog: pytest.LogCaptureFixture) -> None:
    """It may still be there."""
    one = _made(holder)
    announcement: Any = _begin(one, _connection())
    holder.error = OSError(errno.EMFILE, "Too many open files")
    await one.watch(announcement)
    assert (announcement.held, one.why_not) == ([77], "")
    assert caplog.messages == ["the holder of the open files cannot be watched: too many open files"]


async def test_nobody_to_watch(holder: _Holder) -> None:
    announcement: Any = _Announcement(SETTINGS)
    await _made(holder).watch(announcement)
    await _made(None).watch(announcement)
    assert (holder.made, announcement.held) == ([], [])


def test_storage_that_the_daemon_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to mount."""
    rights: list[int] = []
    monkeypatch.setattr(outliving, "has_capability", lambda number: number in rights)
    settings = replace(SETTINGS, storage=(TmpfsSpec(target="/t"),))
    served = "the daemon serves its storage, which only root can mount"
    assert outliving._no_takeover(settings, _connection()) == served
    assert outliving._no_takeover(SETTINGS, _connection()) == ""
    rights.append(outliving.CAP_SYS_ADMIN)
    assert outliving._no_takeover(settings, _connection()) == ""


def test_the_layers_of_a_new_mount(monkeypatch: pytest.MonkeyPatch, holder: _Holder) -> None:
    """Those of a mount that is taken over may be covered by it."""
    monkeypatch.undo()
    monkeypatch.setattr("unionfs.daemon.identities.identities", lambda settings: [settings.mountpoint])
    given: Any = holder
    assert outliving._identities(SETTINGS, given) == ["/m"]
    holder.is_there = True
    assert outliving._identities(SETTINGS, given) == []
    assert outliving._identities(SETTINGS, None) == []


def test_a_holder_for_a_new_mount() -> None:
    found = outliving.holder_for(SETTINGS, foreground=False)
    assert found is not None
    assert (found.pid, found.is_there, found.stays) == (0, False, False)
    found.state.close()
