"""An upper on a filesystem that several hosts share is used by one mount at a time. bindfs stands for the
shared filesystem; each of its mounts is a host's. See `unionfs.union.leases`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import (
    UNIONFS,
    Done,
    Place,
    call,
    files_of,
    gone,
    kill,
    refused,
    session_words,
    stopped,
    succeed,
    unionfs,
    wait_for,
)  # fmt: skip
from tests.mount.outliving_calls import RESENDS, Outliving
from tests.support.mounting import is_mounted, kernel_mounted, session_reason
from tests.support.patience import patient
from tests.support.views import Host, View, views
from tests.support.world import errno_of
from unionfs.daemon import live
from unionfs.union.leases import parsed

SECONDS = patient(2.0)
"""How long a lease runs here."""
LONG = 600.0


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"before")
os.fsync(fd)
print("written", flush=True)
sys.stdin.readline()
try:
    os.write(fd, b"AFTER")
    os.fsync(fd)
except OSError as error:
    print(error.errno, flush=True)
"""


def mount(
    place: Place, view: View, at: Path, *words: str, seconds: float = SECONDS, work: str = "work",
    host: Host | None = None,
) -> Done:
    """Mount the upper as a view shows it, perhaps on another host."""
    if at != place.merged and not os.path.lexists(at):
        at.mkdir()
    return call(
        (*(host.prefix if host else ()), *UNIONFS),
        "mount", "-l", place.lower, "-u", view.upper, "-w", view.at / work, *words, at,
        env={"UNIONFS_LEASE_SECONDS": str(seconds)}, timeout=patient(60),
    )  # fmt: skip


def entry(at: Path) -> live.LiveMount:
    return next(one for one in live.entries() if one.settings.mountpoint == str(at))


def inspected(at: Path, host: Host | None = None) -> dict[str, Any]:
    """What `inspect` says of a mount, perhaps on another host."""
    done = call((*(host.prefix if host else ()), *UNIONFS), "inspect", "--json", at)
    found: dict[str, Any] = json.loads(succeed(done))
    return found


def figures(at: Path, host: Host | None = None) -> dict[str, Any]:
    found: dict[str, Any] = inspected(at, host)["figures"]["lease"]
    return found


@pytest.fixture
def two(place: Place) -> Iterator[list[View]]:
    """Two hosts' views of the upper; their unions are unmounted before them."""
    with views(place.root, 2) as found:
        yield found
        end(place)


@pytest.fixture
def elsewhere(two: list[View], place: Place) -> Iterator[Host]:
    """Another host."""
    host = Host(place.root)
    try:
        yield host
    finally:
        for one in host.path(Path("/run/unionfs")).glob("*.json"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(one.name.split("-")[0]), signal.SIGKILL)
        host.end()


def end(place: Place) -> None:
    """Unmount all unions."""
    for one in live.entries():
        if one.settings.mountpoint.startswith(f"{place.root}/"):
            unionfs("umount", "--force", one.settings.mountpoint)


def skip_unless_possible(session: str) -> None:
    reason = session_reason(session)
    if reason:
        pytest.skip(reason)


@pytest.mark.slow_on("pyfuse3", "direct-cached", "direct-passthrough")
def test_a_second_mount_is_refused(place: Place, two: list[View], session: str) -> None:
    """Also with another work directory; and nothing is changed by it. Afterwards it can be mounted, also by
    kernel overlayfs."""
    skip_unless_possible(session)
    one, other = two
    succeed(mount(place, one, place.merged, *session_words(session)))
    (place.merged / "base").write_text("changed\n")
    (place.merged / "new").write_text("new\n")
    pid = entry(place.merged).pid
    for work in ("work", "work2"):
        done = mount(place, other, place.root / "second", work=work)
        refused(done, str(other.upper), f"process {pid} of this host", "unmount it there")
    assert os.listdir(other.at / "work2") == []
    (place.merged / "more").write_text("more\n")
    time.sleep(2 * SECONDS)  # it is renewed
    refused(mount(place, other, place.root / "second"), "unmount it there")
    succeed(unionfs("umount", place.merged))
    assert sorted(os.listdir(one.at)) == ["upper", "work", "work2"]
    succeed(mount(place, other, place.root / "second", *session_words(session)))
    assert (place.root / "second/base").read_text() == "changed\n"
    succeed(unionfs("umount", place.root / "second"))
    assert sorted(os.listdir(other.at)) == ["upper", "work", "work2"]
    shared = place.root / "shared"
    with kernel_mounted(
        place.root / "kernel", lowers=[place.lower], upper=shared / "upper", work=shared / "work"
    ) as kernel:
        assert sorted(os.listdir(kernel.mountpoint)) == ["base", "more", "new"]
        assert (kernel.mountpoint / "base").read_text() == "changed\n"


def test_the_host_is_named(place: Place, two: list[View], elsewhere: Host) -> None:
    one, other = two
    second = place.root / "second"
    succeed(mount(place, other, second, host=elsewhere))
    pid = inspected(second, elsewhere)["pid"]
    refused(mount(place, one, place.merged), f"process {pid} of host elsewhere", "unmount it there")
    kill(pid)
    # A process of another kernel has no flock here, so its lease has to run out also in the same view.
    began = time.monotonic()
    succeed(mount(place, other, place.merged))
    assert time.monotonic() - began >= SECONDS


def test_after_a_kill(place: Place, two: list[View]) -> None:
    """On the same host it is taken over at once, on another one when it has run out."""
    one, other = two
    succeed(mount(place, one, place.merged, seconds=LONG))
    (place.merged / "new").write_text("new\n")
    kill(entry(place.merged).pid)
    assert len(os.listdir(one.lease)) == 1
    assert mount(place, one, place.merged, seconds=SECONDS).returncode == 0
    assert (place.merged / "new").read_text() == "new\n"
    kill(entry(place.merged).pid)
    began = time.monotonic()
    succeed(mount(place, other, place.root / "second"))
    assert time.monotonic() - began >= SECONDS
    assert (place.root / "second/new").read_text() == "new\n"
    names = os.listdir(other.lease)
    assert [parsed(os.fsencode(name))[1].pid for name in names] == [entry(place.root / "second").pid]  # type: ignore[index]


def test_a_long_wait_is_told(place: Place, two: list[View]) -> None:
    one, other = two
    succeed(mount(place, one, place.merged))
    pid = entry(place.merged).pid
    kill(pid)
    done = mount(place, other, place.root / "second", seconds=8)
    assert done.returncode == 0, done.stderr
    assert f"has a lease of process {pid} of this host, through another mount" in done.stderr
    assert done.stderr.endswith("waiting until it runs out after 8\n")


@pytest.mark.parametrize("turn", range(3))
def test_one_of_many_takes_it_over(place: Place, turn: int) -> None:
    with views(place.root, 5) as hosts:
        succeed(mount(place, hosts[0], place.merged))
        kill(entry(place.merged).pid)
        environment = {**os.environ, "UNIONFS_LEASE_SECONDS": str(SECONDS)}
        programs = []
        for number, host in enumerate(hosts):
            at = place.root / f"at{number}"
            at.mkdir()
            words = [*UNIONFS, "mount", "-l", place.lower, *host.layers, at]
            programs.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
        results = [program.communicate(timeout=patient(60))[1] for program in programs]
        assert sorted(program.returncode for program in programs) == [0, 1, 1, 1, 1], results
        assert len(os.listdir(hosts[0].lease)) == 1
        end(place)


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
def test_a_server_that_comes_back(place: Place, two: list[View], session: str) -> None:
    """Who writes waits; if nobody has taken the lease meanwhile, all goes on."""
    skip_unless_possible(session)
    one, _ = two
    succeed(mount(place, one, place.merged, *session_words(session)))
    (place.merged / "file").write_text("before\n")
    one.stop()
    assert wait_for(lambda: figures(place.merged)["waits"] is True)
    code = "import sys\nwith open(sys.argv[1], 'a') as file: file.write('after\\n')"
    writer = subprocess.Popen(["python3", "-c", code, place.merged / "file"])
    try:
        time.sleep(SECONDS)
        assert figures(place.merged)["waits"] is True
        assert writer.poll() is None
        one.go_on()
        assert writer.wait(patient(20)) == 0
        assert (place.root / "shared/upper/file").read_text() == "before\nafter\n"
        shown = figures(place.merged)
        assert (shown["waits"], shown["lost_because"]) == (False, None)
    finally:
        one.go_on()
        writer.kill()
        writer.wait()


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
@pytest.mark.parametrize("what", ["server", "daemon"])
def test_it_was_taken_over(
    place: Place, two: list[View], elsewhere: Host, session: str, what: str
) -> None:
    """A daemon that comes back, or whose server does, changes nothing of what another host has by then, not
    even through files that are open."""
    skip_unless_possible(session)
    one, other = two
    second = place.root / "second"
    succeed(mount(place, one, place.merged, *session_words(session)))
    # In a process of its own: a copy of the file that is closed would send a FLUSH.
    writer = subprocess.Popen(
        ["python3", "-c", WRITER, place.merged / "open"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        pid = entry(place.merged).pid
        with suspended(one, pid, what):
            succeed(mount(place, other, second, host=elsewhere))
            there = elsewhere.path(second)
            (there / "open").write_bytes(b"of the second")
            (there / "base").write_bytes(b"of the second")
        assert wait_for(lambda: figures(place.merged)["lost_because"] is not None)
        assert writer.communicate("go on\n", timeout=patient(20))[0] == f"{errno.EIO}\n"
    finally:
        writer.kill()
        writer.communicate()
    for function in (os.mkdir, os.unlink):
        assert errno_of(function, place.merged / "name") == errno.EIO
    assert errno_of(os.truncate, place.merged / "base", 0) == errno.EIO
    new = inspected(second, elsewhere)["pid"]
    assert figures(place.merged)["lost_because"].startswith(f"process {new} of host elsewhere has taken")
    log = Path(inspected(place.merged)["log"]).read_text()
    assert "must not be changed any more" in log
    for words in (("snapshot", "create"), ("sync",)):
        refused(unionfs(*words, place.merged), str(place.merged), "has taken its lease over; unmount it.")
    succeed(unionfs("umount", "--force", place.merged))
    assert wait_for(lambda: gone(pid))
    assert (there / "open").read_bytes() == (there / "base").read_bytes() == b"of the second"
    (there / "still").write_text("ours")
    assert (place.root / "shared/upper/still").read_text() == "ours"
    assert figures(second, elsewhere)["lost_because"] is None


@contextmanager
def suspended(view: View, pid: int, what: str) -> Iterator[None]:
    if what == "daemon":
        with stopped(pid):
            yield
        return
    view.stop()
    try:
        yield
    finally:
        view.go_on()


def _outliving(place: Place, view: View, monkeypatch: pytest.MonkeyPatch) -> Outliving:
    monkeypatch.setenv("UNIONFS_LEASE_SECONDS", str(SECONDS))
    return Outliving(place, "--session", "direct", layers=("-l", place.lower, *view.layers))


@RESENDS
def test_a_mount_that_outlives_its_daemon(
    place: Place, two: list[View], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next daemon goes on with the same lease."""
    one, other = two
    outliving = _outliving(place, one, monkeypatch)
    token = _token(one)
    (place.merged / "file").write_text("before")
    for _ in range(3):
        outliving.kill()
        (place.merged / "file").write_text("after")
        refused(mount(place, other, place.root / "second"), "unmount it there")
        assert _token(one) == token
    assert figures(place.merged)["lost_because"] is None
    # Both are killed: it runs out.
    now = outliving.entry()
    assert now.holder is not None
    os.kill(now.holder[0], signal.SIGKILL)
    kill(now.pid)
    succeed(mount(place, other, place.root / "second"))
    assert (place.root / "second/file").read_text() == "after"
    assert _token(one) != token


def _token(view: View) -> str:
    (name,) = os.listdir(view.lease)
    found = parsed(os.fsencode(name))
    assert found is not None
    return found[1].token


@RESENDS
def test_a_next_daemon_without_the_lease(
    place: Place, two: list[View], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host took it over before it began: it answers EIO."""
    one, other = two
    outliving = _outliving(place, one, monkeypatch)
    now = outliving.entry()
    assert now.holder is not None
    with stopped(now.holder[0]):
        kill(now.pid)
        succeed(mount(place, other, place.root / "second"))
    assert errno_of(os.mkdir, place.merged / "name") == errno.EIO
    outliving.last = outliving.entry()
    assert figures(place.merged)["lost_because"] is not None
    outliving.end()
    (place.root / "second/still").write_text("ours")


def test_tools_respect_it(place: Place, two: list[View]) -> None:
    """What works on an upper that is not mounted."""
    one, other = two
    succeed(mount(place, one, place.merged))
    environment = {"UNIONFS_LEASE_SECONDS": str(SECONDS)}
    for words in (
        ("check", "-l", place.lower, *other.layers),
        ("check", "--repair", "-l", place.lower, *other.layers),
        ("convert", "--to", "oci", "-u", other.upper),
        ("layer", "export", "-l", place.lower, "-u", other.upper, "-o", place.root / "layer.tar"),
    ):
        refused(unionfs(*words, env=environment), "unmount it there")
    succeed(unionfs("umount", place.merged))
    succeed(unionfs("check", "-l", place.lower, *other.layers, env=environment))
    assert sorted(os.listdir(other.at)) == ["upper", "work", "work2"]


@pytest.mark.slow_on("pyfuse3", "direct-passthrough", "direct-cached")
@pytest.mark.parametrize(
    "at_once", [pytest.param(False, id="later", marks=pytest.mark.slow), pytest.param(True, id="at once")]
)
def test_unmounted_while_the_server_is_away(
    place: Place, two: list[View], elsewhere: Host, session: str, at_once: bool
) -> None:
    """The command answers. The lease is left: another host can mount when it has run out, and this one at
    once."""
    skip_unless_possible(session)
    one, other = two
    succeed(mount(place, one, place.merged, *session_words(session), seconds=6 * SECONDS))
    (place.merged / "file").write_text("before")
    pid = entry(place.merged).pid
    token = _token(other)
    one.stop()
    if not at_once:
        assert wait_for(lambda: figures(place.merged)["waits"] is True, 60)
    succeed(unionfs("umount", place.merged))
    assert not is_mounted(place.merged)
    assert _token(other) == token
    one.go_on()
    assert wait_for(lambda: gone(pid))
    assert files_of(pid) == []
    if at_once:
        began = time.monotonic()
        succeed(mount(place, one, place.merged, seconds=LONG))
        assert time.monotonic() - began < LONG
        assert (place.merged / "file").read_text() == "before"
        assert _token(other) != token
    else:
        second = place.root / "second"
        done = mount(place, other, second, host=elsewhere)
        assert done.returncode == 0, done.stderr
        assert "waiting until it runs out" in done.stderr
        assert (elsewhere.path(second) / "file").read_text() == "before"


@pytest.mark.parametrize("tool", ["convert", "check"])
def test_a_tool_that_has_lost_it(place: Place, two: list[View], elsewhere: Host, tool: str) -> None:
    """Another host took the lease over while the tool was stopped: it changes nothing more, and says why."""
    one, other = two
    upper = place.root / "shared/upper"
    for number in range(3000):
        os.mknod(upper / f"n{number}", 0o020000, 0)
    words = ("--to", "oci") if tool == "convert" else ("--repair", "-l", str(place.lower))
    process = subprocess.Popen(
        [*UNIONFS, tool, "-u", str(one.upper), *words],
        env={**os.environ, "UNIONFS_LEASE_SECONDS": str(SECONDS)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def left() -> set[str]:
        return {name for name in os.listdir(upper) if name.startswith("n")}

    try:
        assert wait_for(lambda: len(left()) < 3000)
        with stopped(process.pid):
            before = left()
            assert len(before) > 2, "it was done before it could be stopped"
            succeed(mount(place, other, place.root / "second", host=elsewhere))
        said = process.communicate(timeout=patient(30))[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    assert f"upper {one.upper} was not changed any further: " in said
    assert "of host elsewhere has taken its lease over; run the command again when nobody uses it." in said
    assert len(before - left()) <= 1, "it went on"


def test_branches_respect_it(place: Place, two: list[View], elsewhere: Host) -> None:
    """A store of branches on a shared filesystem, as in a home."""
    one, other = two
    base = place.root / "base"
    base.mkdir()
    (base / "file").write_text("base\n")
    environment = {"UNIONFS_LEASE_SECONDS": str(SECONDS), "UNIONFS_ROOT": str(one.at / "root")}
    script = "echo changed > file; touch begun; sleep 100 & wait"
    words = ("try", "--keep", "-n", "mine", "-D", base, "--", "sh", "-c", script)
    there = (*elsewhere.prefix, *UNIONFS)
    session = subprocess.Popen(
        [*UNIONFS, *map(str, words)], env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert wait_for(lambda: _below(one.at / "root", "begun") not in ([], None), 30)
        environment["UNIONFS_ROOT"] = str(other.at / "root")
        for again in (("branch", "commit", "mine"), ("branch", "discard", "mine")):
            refused(call(there, *again, env=environment, timeout=patient(60)), "unmount it there")
        assert (base / "file").read_text() == "base\n"
    finally:
        os.killpg(session.pid, signal.SIGTERM)
        session.wait(patient(20))
    assert wait_for(lambda: _below(other.at / "root", "*.lease") == [], 20)
    environment["UNIONFS_ROOT"] = str(other.at / "root")
    done = call(there, "branch", "commit", "mine", env=environment, timeout=patient(60))
    assert done.returncode == 0, done.stderr
    assert (base / "file").read_text() == "changed\n"


def _below(directory: Path, pattern: str) -> list[Path] | None:
    """What is found; None if the tree was changed meanwhile."""
    try:
        return list(directory.rglob(pattern))
    except FileNotFoundError:
        return None


def test_no_lease_is_needed(place: Place, two: list[View], area: Path) -> None:
    """For lowers, and on a disk."""
    one = two[0]
    (one.upper / "shared").write_text("shared")
    unions = [place.merged, place.root / "second"]
    for number, (view, at) in enumerate(zip(two, unions, strict=True)):
        at.mkdir(exist_ok=True)
        own = place.root / f"own{number}"
        for name in ("upper", "work"):
            (own / name).mkdir(parents=True)
        words = ("-l", view.upper, "-u", own / "upper", "-w", own / "work", at)
        succeed(unionfs("mount", *words))
        (at / "shared").write_text(f"of {number}")
        assert sorted(os.listdir(own)) == ["upper", "work"]
    assert [(at / "shared").read_text() for at in unions] == ["of 0", "of 1"]
    assert (one.upper / "shared").read_text() == "shared"
    assert "lease" not in json.loads(succeed(unionfs("inspect", "--json", place.merged)))["figures"]
    assert sorted(os.listdir(one.at)) == ["upper", "work", "work2"]


def test_a_directory_that_cannot_have_one(place: Place, two: list[View]) -> None:
    """The upper's directory is not writable: one sentence, and nothing is mounted."""
    one, _ = two
    (one.at / "upper.lease").write_text("in the way")
    refused(mount(place, one, place.merged), str(one.upper), "its lease", "cannot be made")
    assert (one.at / "upper.lease").read_text() == "in the way"
