"""Fixtures of the tests of `unionfs web`: layers, an ordinary user, a server and a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import box, host, place

pytest.importorskip("hypercorn", reason="the extra `web` is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from tests.web.browsing import Client, Server, client

__all__ = ["box", "host", "place"]


@pytest.fixture
def runtime() -> str:
    return "bubblewrap"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with an empty storage root, `tmp_path/root`."""
    with Server(tmp_path / "root", "--port", "0") as found:
        yield found


@pytest.fixture
def browser(server: Server) -> Iterator[Client]:
    with client(server) as found:
        yield found
