"""Fixtures of the tests that call the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place
from tests.mount.run_calls import Containers, containers
from tests.mount.user_calls import Host, ordinary_user


@pytest.fixture
def place(root: None, area: Path) -> Iterator[Place]:
    """Layers in a separate area for the test."""
    with cli_calls.place(area) as found:
        yield found


@pytest.fixture
def host(place: Place) -> Iterator[Host]:
    with ordinary_user(place) as found:
        yield found


@pytest.fixture(params=["bubblewrap", pytest.param("crun", marks=pytest.mark.clients)])
def runtime(request: pytest.FixtureRequest) -> str:
    """A container runtime: what it makes is the same."""
    return str(request.param)


@pytest.fixture
def box(root: None, area: Path, runtime: str) -> Iterator[Containers]:
    """A union's layers with busybox, and calls of `unionfs run`."""
    with containers(Containers, area, runtime) as found:
        yield found
