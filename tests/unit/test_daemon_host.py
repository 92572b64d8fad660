"""The checks of doctor, and the conversion of errors to sentences."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

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
    assert len({finding.name for finding in findings}) >= 16
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
