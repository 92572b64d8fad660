"""What the tests in a virtual machine share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import nfs


@pytest.fixture(scope="session")
def kernel() -> str:
    """The kernel that was chosen for this machine; a skip on any other machine."""
    name = os.environ.get("UNIONFS_VM_KERNEL", "")
    if not name:
        pytest.skip("changes settings of the machine, so it runs in a virtual one: scripts/vm-test tests/vm")
    return name


@pytest.fixture(scope="session")
def server(kernel: str) -> Iterator[nfs.Server]:
    """An NFS server on the loopback interface."""
    with nfs.server() as running:
        yield running


@pytest.fixture
def export(server: nfs.Server) -> Iterator[nfs.Export]:
    """A new directory of the server, mounted by NFS 4.2."""
    with server.export() as found:
        yield found


@pytest.fixture
def exported(server: nfs.Server) -> Iterator[Path]:
    """A new directory of the server, that nobody has mounted yet."""
    with server.directory() as found:
        yield found
