"""Which mounts of a table have a server, which may not answer."""

from __future__ import annotations

import pytest

from unionfs.core.places import SHARED_TYPES
from unionfs.daemon.silent import remote_in


def _line(fstype: str, path: str = "/a") -> bytes:
    return f"36 35 98:0 / {path} rw,noatime shared:1 - {fstype} src - rw\n".encode()


@pytest.mark.parametrize("fstype", [*SHARED_TYPES, "nfs4", "smb3", "virtiofs", "pvfs2", "fuse.sshfs"])
def test_with_a_server(fstype: str) -> None:
    assert remote_in(_line("ext4", "/b") + _line(fstype, r"/a\040b") + _line("xfs", "/c")) == {"/a b"}


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "fuseblk", "nfsd", "autofs"])
def test_without(fstype: str) -> None:
    """A device or a mountpoint with the name of such a type says nothing."""
    line = _line(fstype, "/nfs").replace(b" src ", b" nfs ")
    assert remote_in(line + _line("nfs")) == {"/a"}
