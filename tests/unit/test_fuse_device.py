"""Answers and notices that a real FUSE connection refuses."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import areas, syscalls
from unionfs.fuse.direct.device import Device
from unionfs.fuse.protocol import encode

UNKNOWN = 1 << 40
_OUT = struct.Struct("=IiQ")  # struct fuse_out_header


@pytest.fixture
def connection(root: None, area: Path) -> Iterator[tuple[Device, Path, int]]:
    """A device, where its filesystem is mounted, and the unique of INIT, which is not yet answered."""
    device = Device(os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK))
    top = area / "top"
    top.mkdir()
    options = f"fd={device.fd},rootmode=40000,user_id=0,group_id=0"
    syscalls.mount("t", top, "fuse", 0, options)
    try:
        unique = int.from_bytes(os.read(device.fd, 1 << 16)[8:16], "little")
        yield device, top, unique
    finally:
        device.close()
        areas.detach(top)


def test_an_answer_to_nobody_is_dropped(
    connection: tuple[Device, Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    device, top, _ = connection
    with pytest.raises(FileNotFoundError):
        os.writev(device.fd, encode.ok(UNKNOWN))
    device.answer(encode.ok(UNKNOWN))
    syscalls.umount(top)
    with pytest.raises(OSError) as gone:  # noqa: PT011
        os.writev(device.fd, encode.ok(UNKNOWN))
    assert gone.value.errno in (errno.ENODEV, errno.EPERM, errno.ENOENT)
    if gone.value.errno != errno.EPERM:
        device.answer(encode.ok(UNKNOWN))
        device.notify(encode.ok(UNKNOWN))
    assert caplog.text == ""


def test_an_invalid_answer_becomes_an_error(
    connection: tuple[Device, Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    """The caller does not wait for ever."""
    device, top, unique = connection
    invalid = [_OUT.pack(1000, 0, unique)]
    with pytest.raises(OSError, match="Invalid argument"):
        os.writev(device.fd, invalid)
    device.answer(invalid)
    assert "refused an answer of 16 bytes: Invalid argument" in caplog.text
    with pytest.raises(FileNotFoundError):  # it was answered
        os.writev(device.fd, encode.error(unique, errno.EIO))
    with pytest.raises(ConnectionRefusedError):  # INIT failed
        os.stat(top / "x")


def test_an_invalid_notice_is_logged(
    connection: tuple[Device, Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    device, _, unique = connection
    device.notify([_OUT.pack(_OUT.size, 9999, 0)])
    assert "refused a notice: Invalid argument" in caplog.text
    device.notify_later([b"one"])
    device.notify_later([b"two"])
    assert device.take_later() == [[b"one"], [b"two"]]
    assert device.take_later() == []
    device.answer(encode.error(unique, errno.EIO))
