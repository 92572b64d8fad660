"""What `unionfs umount` says of a mount; nothing is unmounted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import syscalls
from tests.support.worker import REPOSITORY
from unionfs.daemon import dead, holder, live, outliving, process, runtime, unmount
from unionfs.daemon.settle import settle
from unionfs.errors import UserError
from unionfs.sys.mountinfo import MountEntry, mounted_at
from unionfs.sys.process import start_time


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "unionfs"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(runtime, "candidates", lambda: [str(directory)])
    return directory


def _at(path: str) -> MountEntry:
    found = mounted_at(path)
    assert found is not None
    return found


def _entry(registry: Path, mountpoint: str, pid: int | None = None) -> live.LiveMount:
    """Of a mount that exists everywhere, in place of a union."""
    settings = replace(settle("/m", lowers=["/usr"], trusted_xattrs=True), mountpoint=mountpoint)
    number = os.getpid() if pid is None else pid
    return live.LiveMount(
        settings, number, start_time(number) or 0, _at("/proc").device, 1.0, (), directory=str(registry)
    )


def test_what_is_no_mount(registry: Path, tmp_path: Path) -> None:
    """With the way to what was meant."""
    _entry(registry, "/proc").save()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dangling").symlink_to("/none")
    for path, said in (
        (
            "/proc/sys/net",
            "/proc/sys/net is not a mountpoint, but lies inside the mount /proc; give that one.",
        ),
        (f"{tmp_path}/dir", f"{tmp_path}/dir is not a unionfs mount; `unionfs ls` lists active mounts."),
        (f"{tmp_path}/no", f"{tmp_path}/no does not exist; `unionfs ls` lists active mounts."),
    ):
        with pytest.raises(UserError) as caught:
            unmount.umount(path)
        assert str(caught.value) == said
    assert "is not a unionfs mount" in unmount._why_not_ours(f"{tmp_path}/dangling", None, [])
    assert unmount._why_not_ours("/procession", None, [_entry(registry, "/proc")]).startswith(
        "/procession does not exist"
    )


def test_a_mount_of_another_kind(root: None, registry: Path, area: Path) -> None:
    syscalls.mount("t", area, "tmpfs", 0, "size=64k")
    try:
        with pytest.raises(
            UserError, match=f"{area} is a tmpfs mount and none of unionfs; use `umount {area}`"
        ):
            unmount.umount(str(area))
    finally:
        syscalls.umount(area)


def test_mounts_that_are_bound_elsewhere(registry: Path) -> None:
    """They are further ones as long as the union is where it was mounted."""
    there = _at("/proc")
    assert not unmount._is_further(there, None)
    assert not unmount._is_further(there, _entry(registry, "/proc"))
    assert not unmount._is_further(there, _entry(registry, "/elsewhere"))
    assert unmount._is_further(replace(there, mountpoint="/bound"), _entry(registry, "/proc"))


@pytest.mark.parametrize(
    ("found", "name", "cause", "cure"),
    [
        ([(0, "/bound"), (77, "/x")], "box", "it is also mounted at /bound", "unmount /bound first"),
        ([(77, "/x"), (78, "/x")], "box", "used by container box", "run `unionfs stop box` first"),
        ([(77, "/x")], None, "used by ", "stop whatever uses it first"),
    ],
    ids=["bound", "container", "process"],
)
def test_copies_of_a_mount(
    registry: Path, monkeypatch: pytest.MonkeyPatch, found: list[tuple[int, str]], name: str | None,
    cause: str, cure: str,
) -> None:  # fmt: skip
    """With them its daemon would go on."""
    there = _at("/proc")
    copies = [(pid, replace(there, mountpoint=path)) for pid, path in found]
    monkeypatch.setattr(unmount, "copies", lambda mount: copies)
    monkeypatch.setattr(unmount, "_NOTICE_SECONDS", 0)
    with pytest.raises(UserError) as caught:
        unmount._refuse_copied(there, lambda pid: name)
    assert str(caught.value).startswith(f"/proc is busy: {cause}")
    assert f"; {cure}, or " in str(caught.value)
    copies.clear()
    unmount._refuse_copied(there, lambda pid: name)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("dead_", [False, True])
def test_what_is_done_to_a_mount(
    registry: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool, further: bool, dead_: bool
) -> None:
    """Copies matter if the daemon is to end; the end is awaited of a daemon that lives."""
    mount = replace(_at("/proc"), fstype="fuse.unionfs")
    entry = _entry(registry, "/proc", 2**22 if dead_ else None)
    done: list[str] = []
    monkeypatch.setattr(unmount, "mounted_at", lambda path: mount)
    monkeypatch.setattr(unmount.live, "entries", lambda: [entry])
    monkeypatch.setattr(unmount.others, "owner_of", lambda mount: None)
    monkeypatch.setattr(unmount, "is_dead", lambda path: dead_)
    monkeypatch.setattr(unmount, "_is_further", lambda *values: further)
    monkeypatch.setattr(unmount, "take_off", lambda mount: done.append("take off"))
    monkeypatch.setattr(unmount, "_refuse_copied", lambda mount, container_of: done.append("copies"))
    monkeypatch.setattr(unmount, "_unmount_living", lambda *values, lazy: done.append(f"unmount {lazy}"))
    monkeypatch.setattr(unmount, "_wait_for_end", lambda *values, lazy: done.append(f"wait {lazy}"))
    monkeypatch.setattr(unmount, "forget", lambda entry: done.append("forget"))
    unmount.umount("/proc", lazy=lazy)
    if dead_:
        assert done == ["take off", "forget"]
        return
    copies, end = [] if lazy or further else ["copies"], [] if further else [f"wait {lazy}"]
    assert done == [*copies, f"unmount {lazy}", *end]


def test_the_entry_of_a_union_that_waits(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is removed once the holder has ended. Another process with the same pid is left alone."""
    forgotten: list[live.LiveMount] = []
    monkeypatch.setattr(unmount, "forget", forgotten.append)
    with subprocess.Popen(["true"]) as ended:
        pass
    mine = replace(_entry(registry, "/proc"), started=1)
    for entry in (_entry(registry, "/proc", ended.pid), mine):
        unmount._end_waiting(entry)
        assert forgotten.pop() == entry


def test_whose_daemon_serves(registry: Path) -> None:
    """Also a mount that has been detached; the newest, if there were several."""
    with subprocess.Popen(["sleep", "60"]) as other:
        first, second = _entry(registry, "/proc"), _entry(registry, "/proc", other.pid)
        for entry in (first, second, replace(first, started=1)):
            entry.save()
        known = [entry for entry in live.entries() if entry.is_alive()]
        try:
            assert unmount._served("/proc", None) == known[-1]
            assert unmount._served("/none", None) is None
            assert unmount._served("/none", _at("/proc")) in known
            replace(second, waiting=True).save()
            assert unmount._served("/proc", None) == first
        finally:
            other.kill()


def test_a_daemon_that_does_not_obey(registry: Path) -> None:
    """Unless it has ended meanwhile."""
    with pytest.raises(UserError, match="/proc cannot be ended: its daemon"):
        unmount._cut_off(_entry(registry, "/proc"))
    with subprocess.Popen(["sleep", "60"]) as other:
        entry = _entry(registry, "/proc", other.pid)
        other.kill()
        other.wait()
    unmount._cut_off(entry)


def test_how_long_a_daemon_is_waited_for(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is about to end has as long as its upper takes; one that answers goes on with the union."""
    monkeypatch.setattr(unmount, "_POLL_SECONDS", 0)
    began = 1000.0
    clock, gone_after = [began], [1000.0]
    answers_after = [-1.0]
    asked: list[float] = []

    def wait_gone(pid: int, started: int, seconds: float) -> bool:
        clock[0] += 0.25
        return clock[0] - began >= gone_after[0]

    def ask(_: object) -> dict[str, int] | None:
        asked.append(clock[0] - began)
        return {} if clock[0] - began > answers_after[0] else None

    monkeypatch.setattr(unmount, "wait_gone", wait_gone)
    monkeypatch.setattr(unmount.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live.LiveMount, "ask", ask)
    monkeypatch.setattr(live.LiveMount, "mounts", lambda _: [])
    entry = replace(_entry(registry, "/proc"), device="0:0")
    others_entry = replace(entry, uid=1000)

    def waited(one: live.LiveMount, *, lazy: bool = False, gone: float = 1000.0) -> float:
        clock[0], gone_after[0] = began, gone
        asked.clear()
        unmount._wait_for_end(one, "/proc", lazy=lazy)
        return clock[0] - began

    assert waited(entry, lazy=True) == unmount._LAZY_SECONDS
    assert waited(entry, gone=1.5) == 1.5
    known: list[live.LiveMount] = [replace(entry, ending=True)]
    monkeypatch.setattr(live, "entries", lambda: known)
    assert waited(entry, gone=500) == 500
    assert asked == []
    for one, entries in (
        (entry, []), (entry, [entry]), (entry, [replace(entry, ending=True, pid=1)]),
        (others_entry, [replace(entry, ending=True)]),
    ):  # fmt: skip
        known[:] = entries
        for answers, until in ((-1.0, unmount._NOTICE_SECONDS), (1000.0, unmount._DEAF_SECONDS)):
            answers_after[0] = answers
            with pytest.raises(UserError, match=f"still in use elsewhere .*pid {entry.pid}. goes on"):
                waited(one)
            assert until <= clock[0] - began <= until + 0.5
            assert asked[0] == unmount._NOTICE_SECONDS


def test_the_end_of_another_users_mount(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its daemon is waited for; only what a dead one leaves is cleaned up as that user."""
    made: list[object] = []
    entry = _entry(registry, "/proc")
    answered = [entry]
    error: list[OSError] = []

    def take_off(mount: MountEntry, *, lazy: bool) -> None:
        made.append((mount.mountpoint, lazy))
        if error:
            raise error[0]

    monkeypatch.setattr(unmount, "unmount", take_off)
    monkeypatch.setattr(unmount.others, "mounts_of_others", lambda: SimpleNamespace(answered=answered))
    monkeypatch.setattr(
        unmount, "_wait_for_end", lambda entry, path, *, lazy: made.append((entry, path, lazy))
    )
    monkeypatch.setattr(unmount, "clear_abandoned_of", made.append)
    for lazy in (False, True):
        made.clear()
        unmount._umount_of_other(_at("/proc"), 1000, lazy=lazy)
        assert made == [("/proc", lazy), (entry, "/proc", lazy)]
    answered.clear()
    made.clear()
    unmount._umount_of_other(_at("/proc"), 1000, lazy=True)
    assert made == [("/proc", True), 1000]
    made.clear()
    error[:] = [OSError(errno.EINVAL, "gone")]
    unmount._umount_of_other(_at("/proc"), 1000, lazy=False)
    assert made == [("/proc", False), 1000]
    monkeypatch.setattr(unmount, "_busy", lambda *values: f"busy: {values[0]}, {values[2]}")
    for number, said in ((errno.EBUSY, "^busy: /proc, None$"), (errno.EPERM, "^/proc cannot be unmounted: ")):
        error[:] = [OSError(number, "no")]
        with pytest.raises(UserError, match=said):
            unmount._umount_of_other(_at("/proc"), 1000, lazy=False)


def test_the_process_that_a_union_lives_with(registry: Path) -> None:
    entry = _entry(registry, "/proc")
    entry.save()
    assert unmount._runner_of("/proc/sys") is None
    replace(entry, settings=replace(entry.settings, lives_with=(77, 1))).save()
    assert [unmount._runner_of(path) for path in ("/proc/sys", "/proc", "/procs")] == [77, None, None]


def test_errors_of_unmounting() -> None:
    """Who was unmounted in between is no error; only the kernel says who may."""
    for number in (errno.EINVAL, errno.ENOENT):
        unmount._refuse_unless_gone(_at("/proc"), OSError(number, "gone"))
    with pytest.raises(UserError, match=r"^/proc cannot be unmounted: not permitted; run the command as"):
        unmount._refuse_unless_gone(_at("/proc"), OSError(errno.EPERM, "Not permitted"))


def test_why_a_user_cannot_unmount(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount of another one, or the lack of a helper."""
    mount, error = _at("/proc"), OSError(errno.EPERM, "Not permitted")
    other = "not permitted; run the command as the user who mounted it, or as root."
    monkeypatch.setattr(dead.fusermount, "lack", lambda: ("it is missing", "install it"))
    assert dead.refusal(mount, error) == other
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert dead.refusal(mount, error) == other
    mine = replace(mount, super_options="rw,user_id=1000")
    assert dead.refusal(mine, error) == "it is missing; install it."
    monkeypatch.setattr(dead.fusermount, "lack", lambda: None)
    assert dead.refusal(mine, error) == "not permitted; run the command as root."


@pytest.mark.parametrize(
    ("fstype", "options", "is_own"),
    [
        ("fuse.unionfs", f"rw,user_id={os.geteuid()},group_id=0", True),
        ("fuse.unionfs", f"rw,user_id={os.geteuid() + 1},group_id=0", False),
        ("fuse.unionfs", "rw", False),
        ("ext4", f"rw,user_id={os.geteuid()}", False),
        ("fuse.other", f"rw,user_id={os.geteuid()}", False),
    ],
)
def test_whose_dead_mount_it_is(
    monkeypatch: pytest.MonkeyPatch, fstype: str, options: str, is_own: bool
) -> None:
    """Only this user's mounts of ours are asked whether they are dead, for asking another one may hang."""
    mount = MountEntry(1, 0, "0:99", "/", "/m", "rw", fstype, "x", options)
    asked = []

    def is_dead(one: MountEntry, *, given_up: bool) -> bool:
        asked.append((one, given_up))
        return True

    monkeypatch.setattr(dead, "is_dead_mount", is_dead)
    found = dead._dead(mount, [])
    assert asked == ([(mount, False)] if is_own else [])
    assert found == (dead.DeadMount(mount, None) if is_own else None)


def test_who_uses_a_mount(root: None, registry: Path, area: Path) -> None:
    """What is mounted in it, then processes, then those that cannot be seen."""
    syscalls.mount("t", area, "tmpfs", 0, "size=64k")
    inside = area / "in"
    try:
        inside.mkdir()
        mount = _at(str(area))
        assert unmount._busy(str(area), mount, None) == (
            f"{area} is busy: a process that is not visible from here uses it; stop whatever uses it first, "
            f"or detach the mount by `unionfs umount --lazy {area}`, or cut its users off by `unionfs umount "
            f"--force {area}`."
        )
        with subprocess.Popen(["sleep", "60"], cwd=area) as user:
            found = unmount._busy(str(area), mount, None)
            user.kill()
        assert f"{area} is busy: used by " in found
        assert f"{user.pid}" in found
        syscalls.mount("t", inside, "tmpfs", 0, "size=64k")
        found = unmount._busy(str(area), mount, None)
        assert found.startswith(f"{area} is busy: {inside} is mounted inside it; unmount {inside} first, or ")
        syscalls.umount(inside)
    finally:
        syscalls.umount(area, syscalls.MNT_DETACH)


CRASH = """
import os, sys
from types import SimpleNamespace
from unionfs.daemon.outliving import Outliving
one = object.__new__(Outliving)
one._holder = None if sys.argv[1] == "none" else SimpleNamespace(is_there=sys.argv[1] == "there")
one.crash(ValueError("odd"))
print("goes on")
"""


@pytest.mark.parametrize(
    ("holder_", "code", "said"), [("none", 0, True), ("gone", 0, True), ("there", 1, False)]
)
def test_a_daemon_that_fails(holder_: str, code: int, said: bool) -> None:
    """It leaves all to another one, if somebody starts that; else it cleans up."""
    done = subprocess.run(
        [sys.executable, "-c", CRASH, holder_], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "goes on\n" if said else "")
    assert ("another one takes over" in done.stderr) is not said


def test_what_a_mount_with_a_holder_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settle("/m", lowers=["/l"], trusted_xattrs=True)
    asked = replace(settings, outlive=True)
    assert outliving.holder_for(settings, foreground=False) is None
    assert outliving.holder_for(asked, foreground=True) is None
    assert outliving._why_not(settings, foreground=False) == "it was not asked for"
    assert outliving._why_not(asked, foreground=True) == "it runs in the foreground"
    assert outliving._why_not(asked, foreground=False) == ""
    assert outliving._no_takeover(asked, None) == "that needs --session direct"
    assert outliving._no_takeover(replace(asked, watch_lower=True), None) == "it watches its lowers"


@pytest.mark.parametrize(("text", "limit"), [(None, 10), ("3", 3), ("x", 10), ("", 10)])
def test_how_many_deaths(monkeypatch: pytest.MonkeyPatch, text: str | None, limit: int) -> None:
    monkeypatch.delenv("UNIONFS_DEATHS", raising=False)
    if text is not None:
        monkeypatch.setenv("UNIONFS_DEATHS", text)
    assert holder._limit() == limit


def test_errors_of_a_start() -> None:
    """A group of trio's is the innermost error; what was printed is not said twice."""
    group = ExceptionGroup("", [ExceptionGroup("", [UserError("it failed.")])])
    assert process.explain(group, "") == "it failed."
    assert process.explain(UserError("it failed: why."), "why") == "it failed: why."
    assert process.explain(UserError("it failed."), "why") == "it failed (why)."


@pytest.mark.parametrize("sent", [b"ready\n", b'"sentence."\n', b"half"])
def test_the_answer_of_a_daemon_that_starts(sent: bytes) -> None:
    """The line that it sends, however late; empty if it ends without one."""
    reader, writer = os.pipe()

    def send() -> None:
        os.write(writer, sent)
        os.close(writer)

    timer = threading.Timer(0.2, send)
    timer.start()
    assert process._wait_for_answer(reader) == sent
    timer.join()
    reader, writer = os.pipe()
    os.close(writer)
    assert process._wait_for_answer(reader) == b""
