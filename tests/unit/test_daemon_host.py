"""The checks of doctor, and the conversion of errors to sentences."""

from __future__ import annotations

import errno
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.worker import REPOSITORY
from unionfs.daemon import fuse, host, logs
from unionfs.daemon.process import CapturedStderr, explain
from unionfs.errors import MountRefusedError, UserError, quoted, reason
from unionfs.sys import fuseprobe


def test_user_allow_other(tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    assert not fuse.user_allow_other(str(conf))
    conf.write_text("# user_allow_other\nmount_max = 3\n")
    assert not fuse.user_allow_other(str(conf))
    conf.write_text("mount_max = 3\n user_allow_other \n")
    assert fuse.user_allow_other(str(conf))


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOENT, "modprobe fuse"),
        (errno.EACCES, "chmod 666"),
        (errno.EPERM, "--device"),
        (errno.EIO, "kernel"),
    ],
)
def test_fuse_device_problems_have_a_cure(number: int, cure: str) -> None:
    sentence = fuse.fuse_device_problem(OSError(number, os.strerror(number)))
    assert cure in sentence
    assert sentence.endswith(".")


def test_every_finding_that_is_not_ok_has_a_cure(tmp_path: Path) -> None:
    findings = host.examine(str(tmp_path))
    assert {finding.name for finding in findings} - {"dead mount"} == {
        "/dev/fuse", "kernel", "fusermount3", "user_allow_other", "pyfuse3", "user xattrs", "trusted xattrs",
        "whiteouts", "RENAME_EXCHANGE", "RENAME_WHITEOUT", "O_TMPFILE", "reflink", "owners of lowers",
        "kernel overlayfs", "passthrough", "idle states", "session and I/O", "rights of a daemon",
        "user namespaces", "bubblewrap", "open files",
    }  # fmt: skip
    assert all(finding.state == "ok" or finding.cure for finding in findings)
    assert os.listdir(tmp_path) == []


def test_mounting_is_impossible_without_the_device() -> None:
    ok = host.Finding("/dev/fuse", "ok", "opens")
    limited = host.Finding("reflink", "missing", "no", "xfs")
    missing = host.Finding("/dev/fuse", "missing", "gone", "modprobe fuse")
    assert host.mounting_is_possible([ok, limited])
    assert not host.mounting_is_possible([missing, limited])


def test_the_kernel_is_asked_for_passthrough(root: None) -> None:
    flags = fuseprobe.init_flags()
    if flags is None:
        pytest.skip("this kernel has no fsopen(2), or the container forbids it")
    assert flags & 1, "FUSE_ASYNC_READ is as old as FUSE"
    configured = host._configured("CONFIG_FUSE_PASSTHROUGH")
    if configured is not None:
        assert fuseprobe.offers_passthrough() == configured


def test_messages_of_another_form_say_nothing() -> None:
    assert fuseprobe._offer(b"") is None
    assert fuseprobe._offer(b"\0" * 200) is None


def test_what_libfuse_prints_becomes_part_of_the_sentence() -> None:
    captured = CapturedStderr()
    try:
        os.write(2, b"fuse: mount failed: No\n\n  second line \n")
        text = captured.text()
    finally:
        captured.release()
    assert text == "fuse: mount failed: No; second line"
    assert explain(UserError("mounting failed."), text) == f"mounting failed ({text})."
    assert explain(UserError("mounting failed."), "") == "mounting failed."
    refused = MountRefusedError("/m", "fuse_session_mount failed")
    assert explain(refused, "fuse: mount failed: Operation not permitted") == (
        "/m cannot be mounted: fuse: mount failed: Operation not permitted; mounting needs CAP_SYS_ADMIN, "
        "which a container has with `--cap-add SYS_ADMIN`."
    )
    assert explain(refused, "").startswith("/m cannot be mounted: fuse_session_mount failed; ")
    assert explain(ValueError("odd\nthing"), "") == "internal error: ValueError: odd thing."


def test_paths_in_sentences() -> None:
    assert quoted("/plain path") == "/plain path"
    assert "\n" not in quoted("/two\nlines")
    assert quoted("") == "''"
    assert quoted("/x\udcff").isascii()
    assert [quoted(b"d/e"), quoted(b""), quoted(b"\xff")] == ["d/e", ".", "'\\udcff'"]
    assert reason(OSError(errno.EACCES, "Permission denied")) == "permission denied"
    assert reason(OSError(errno.EIO, "I/O error")) == "I/O error"


@pytest.mark.parametrize("namespace", ["user", "trusted"])
def test_xattrs_are_tried(root: None, area: Path, namespace: str) -> None:
    """As setxattr(2) answers, on a filesystem with xattrs and on one without."""
    place = area / "place"
    place.mkdir()
    found = host._xattrs(str(place), namespace, "ext4")
    assert found.state == "ok"
    assert os.getxattr(place, f"{namespace}.overlay.opaque") == b"y"
    with pytest.raises(OSError, match="Errno"):
        os.setxattr("/proc/self", f"{namespace}.overlay.opaque", b"y")
    found = host._xattrs("/proc/self", namespace, "proc")
    assert (found.state, "no upper can be there" in found.detail) == ("limited", True)


def test_a_scratch_directory_of_somebody_else(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory of another user, who may replace it, nothing is tried."""
    place = area / "place"
    place.mkdir()
    monkeypatch.setattr(host.tempfile, "mkdtemp", lambda **_: str(place))
    for mode, names in ((0o750, []), (0o705, []), (0o700, ["file"])):
        place.mkdir(exist_ok=True)
        place.chmod(mode)
        for name in names:
            (place / name).touch()
        with pytest.raises(UserError, match="nothing can be tried out"):
            host.examine(str(area))


def _record(name: str, message: str) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "", 0, message, None, None)


def test_an_answer_that_nobody_waits_for_is_no_news() -> None:
    """pyfuse3 warns of it for each interrupted request; its other warnings are shown."""
    failed = f"fuse_reply_attr failed with {os.strerror(errno.ENOENT)}"
    assert not logs._is_news(_record("pyfuse3", failed))
    assert not logs._is_news(_record("pyfuse3._pyfuse3", failed))
    assert logs._is_news(_record("unionfs", failed))
    assert logs._is_news(_record("pyfuse3", f"fuse_reply_attr failed with {os.strerror(errno.EINVAL)}"))
    assert logs._is_news(_record("pyfuse3", f"mount failed with {os.strerror(errno.ENOENT)}"))


def _in_namespace(around: str, function: str) -> tuple[str, str]:
    """State and detail of a check in a mount namespace that is changed before."""
    code = f"from unionfs.daemon import host; found = host.{function}(); print(found.state, found.detail)"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{around} && exec "$@"', "sh", sys.executable, "-c", code],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    state, _, detail = done.stdout.strip().partition(" ")
    return state, detail


def test_the_device(root: None, area: Path) -> None:
    node = area / "fuse"
    bind = f"mknod {node} c 10 229 && chmod MODE {node} && mount --bind {node} /dev/fuse"
    for mode, state, detail in (
        ("0666", "ok", "opens for reading and writing"),
        ("0660", "limited", "opens, but mode 0660 keeps other users out"),
        ("0664", "limited", "opens, but mode 0664 keeps other users out"),
        ("0662", "limited", "opens, but mode 0662 keeps other users out"),
    ):
        assert _in_namespace(bind.replace("MODE", mode), "_device") == (state, detail)
        node.unlink()
    hidden = "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/urandom c 1 9 && mknod -m 666 /dev/null c 1 3"
    assert _in_namespace(hidden, "_device") == ("missing", "/dev/fuse is missing")


@pytest.mark.parametrize(
    ("release", "version", "state"),
    [("5.11.22", (5, 11), "limited"), ("5.12.0-rc1", (5, 12), "ok"), ("4.20", (4, 20), "limited"),
     ("6.1-amd64", (6, 1), "ok"), ("10.0+", (10, 0), "ok"), ("6.8-rc1-amd64", (6, 8), "ok")],
)  # fmt: skip
def test_the_kernel(
    monkeypatch: pytest.MonkeyPatch, release: str, version: tuple[int, int], state: str
) -> None:
    """Since 5.12 it can protect lowers."""
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert host.kernel_version() == version
    found = host._kernel()
    assert (found.state, found.cure) == (state, None if state == "ok" else "Linux 5.12")
    assert found.detail.startswith(release)


def test_fusermount(root: None, area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it only root can mount; it works as root alone, and reads /etc/mtab."""
    program = area / "fusermount3"
    program.touch()
    monkeypatch.setattr(host, "find_fusermount", lambda: None)
    for uid, state in ((0, "limited"), (1000, "missing")):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        monkeypatch.setattr(host, "find_fusermount", lambda: None)
        assert host._fusermount().state == state
        assert host._fusermount().detail.startswith("not installed")
        monkeypatch.setattr(host, "find_fusermount", lambda: str(program))
        for owner, mode in ((0, 0o755), (1000, 0o4755)):
            os.chown(program, owner, owner)
            program.chmod(mode)
            assert host._fusermount().state == state
            assert host._fusermount().detail.startswith(f"{program} is not setuid root")
    os.chown(program, 0, 0)
    program.chmod(0o4755)
    exists = os.path.exists
    for there, state in ((True, "ok"), (False, "limited")):
        monkeypatch.setattr(
            os.path, "exists", lambda path, there=there: there if path == "/etc/mtab" else exists(path)
        )
        assert host._fusermount().state == state


def test_what_the_configuration_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, state in ((True, "ok"), (False, "limited")):
        monkeypatch.setattr(host, "user_allow_other", lambda allowed=allowed: allowed)
        assert host._allow_other().state == state


def test_owners_of_lowers(monkeypatch: pytest.MonkeyPatch) -> None:
    for may, state in ((True, "ok"), (False, "limited")):
        monkeypatch.setattr(host, "has_capability", lambda number, may=may: may and number == 0)  # CAP_CHOWN
        assert host._owners().state == state


def test_overlayfs_of_the_kernel(root: None, area: Path) -> None:
    """Built in, as a module, or not at all."""
    known = area / "filesystems"
    for text, detail in (
        ("nodev\toverlay\n", "present: the kernel"), ("nodev\toverlayfs\n\tx overlay y\n", ""),
    ):  # fmt: skip
        known.write_text("nodev\tsysfs\n\text4\n" + text)
        state, found = _in_namespace(f"mount --bind {known} /proc/filesystems", "_overlayfs")
        module = os.path.isdir(f"/lib/modules/{platform.release()}/kernel/fs/overlayfs")
        assert state == ("ok" if detail or module else "limited")
        assert found.startswith(detail or ("present as a module" if module else "absent: "))


@pytest.mark.parametrize(
    ("version", "offered", "configured", "is_root", "state", "detail"),
    [
        ((6, 8), True, True, True, "limited", "not in Linux"),
        ((6, 9), True, None, True, "ok", "offered, as the kernel's FUSE_INIT says"),
        ((6, 9), True, None, False, "limited", "offered, as the kernel's FUSE_INIT says, but only to root"),
        ((6, 9), False, True, True, "limited", "switched off, as the kernel's FUSE_INIT says"),
        ((6, 9), None, True, True, "ok", "offered, as the kernel's configuration says"),
        ((6, 9), None, False, True, "limited", "switched off, as the kernel's configuration says"),
        ((6, 9), None, None, True, "limited", "not known: no configuration to read"),
    ],
)
def test_passthrough(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], offered: bool | None, configured: bool | None,
    is_root: bool, state: str, detail: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(host, "kernel_version", lambda: version)
    monkeypatch.setattr(host, "offers_passthrough", lambda: offered)
    monkeypatch.setattr(host, "_configured", lambda option: configured)
    monkeypatch.setattr(host, "may_use_trusted_xattrs", lambda: is_root)
    found = host._passthrough()
    assert found.state == state
    assert found.detail.startswith(detail)


def test_the_configuration_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.isdir("/lib/modules"):
        pytest.skip("there is no /lib/modules, below which configurations are")
    release = f"../..{tmp_path}"
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    for text, answer in (("# CONFIG_X is not set", False), ("CONFIG_X=y\n", True), ("CONFIG_XY=y\n", False)):
        (tmp_path / "config").write_text("CONFIG_Y=m\n" + text)
        assert host._configured("CONFIG_X") is answer


def _programs(place: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Let these alone be found."""
    place.mkdir(exist_ok=True)
    for name, body in programs.items():
        (place / name).write_text(f"#!/bin/sh\n{body}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place))


def test_user_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["unshare", "--user", "--map-root-user", "true"]
    works = subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert host._user_namespaces().state == ("ok" if works else "limited")
    _programs(tmp_path / "bin", monkeypatch)
    assert host._user_namespaces().detail == "not known: unshare(1) is missing"
    _programs(tmp_path / "bin", monkeypatch, unshare="exit 0")
    assert host._user_namespaces().state == "ok"
    _programs(tmp_path / "bin", monkeypatch, unshare="echo 'unshare: failed: No space left' >&2; exit 1")
    found = host._user_namespaces()
    assert (found.state, found.detail) == ("limited", "no space left: no rootless containers")


def test_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _programs(tmp_path / "bin", monkeypatch)
    assert host._bubblewrap().state == "limited"
    _programs(tmp_path / "bin", monkeypatch, bwrap="exit 0")
    assert (host._bubblewrap().state, host._bubblewrap().detail) == (
        "ok", f"{tmp_path}/bin/bwrap, for `unionfs run`",
    )  # fmt: skip


@pytest.mark.parametrize(("hard", "state"), [(4095, "limited"), (4096, "ok"), (1 << 20, "ok")])
def test_open_files(monkeypatch: pytest.MonkeyPatch, hard: int, state: str) -> None:
    monkeypatch.setattr(host.resource, "getrlimit", lambda number: (1024, hard))
    found = host._open_files()
    assert found.state == state
    assert found.detail == f"{hard} per daemon (soft limit 1024, raised by the daemon)"


def test_what_a_filesystem_can(root: None, filesystem: Callable[..., Path]) -> None:
    """As its calls answer: a tmpfs shares no blocks, and nothing can be made in /proc."""
    place = filesystem("tmpfs", 16 << 20)
    found = {one.name: one for one in host._filesystem(str(place))}
    assert {name for name, one in found.items() if one.state != "ok"} <= {"reflink", "user xattrs"}
    assert found["reflink"].state == "limited"
    assert found["O_TMPFILE"].detail == "works on tmpfs"
    assert found["whiteouts"].detail == "char devices 0/0 can be made on tmpfs"
    assert os.lstat(place / "whiteout").st_rdev == 0
    (place / "RENAME_EXCHANGE.b").unlink()
    assert os.lstat(place / "RENAME_WHITEOUT.a").st_rdev == 0
    left = set(os.listdir(place))
    assert left >= {"whiteout", "RENAME_WHITEOUT.a", "RENAME_WHITEOUT.b", "RENAME_EXCHANGE.a"}


def test_who_may_write_markers(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "may_use_trusted_xattrs", lambda: False)
    found = host._xattrs(str(area), "trusted", "ext4")
    assert (found.state, found.cure) == ("limited", "run as root")
    assert host._xattrs(str(area), "user", "ext4").state == "ok"


def test_what_a_mount_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known if the kernel can be asked."""
    monkeypatch.setattr(host, "init_offer", lambda: None)
    assert (host._session().state, host._session().cure) == ("limited", "run doctor as root")
    monkeypatch.setattr(host, "init_offer", lambda: (10, 0))
    assert host._session().detail.startswith("pyfuse3's session. ")
    monkeypatch.undo()
    if fuseprobe.init_offer() is not None:
        assert host._session().state == "ok"
        assert host._session().detail.startswith("direct session. ")


def test_the_scratch_directory_is_removed(area: Path) -> None:
    with host._scratch(str(area)) as place:
        assert os.listdir(area) != []
        Path(place, "file").touch()
        assert [Path(path).name for path in area.glob("*/*")] == ["file"]
    assert os.listdir(area) == []
