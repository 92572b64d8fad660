"""Fixtures of the attacks: layers, an ordinary user's host, a storage root, containers, and an attacker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import box, host, place, runtime
from tests.security.container_calls import Prison, prison
from tests.security.storage_actors import Outside
from tests.support.worker import Worker
from tests.volumes.conftest import as_root, store

__all__ = ["as_root", "attacker", "box", "host", "inmate", "inside", "outside", "place", "runtime", "store"]


@pytest.fixture
def attacker(root: None) -> Iterator[Worker]:
    """A process of uid 1001 with the rights of an ordinary user."""
    with Worker(1001, 1001, modules=["tests.security.attacks"]) as worker:
        yield worker


@pytest.fixture(params=["root", "user"])
def inmate(root: None, area: Path, runtime: str, request: pytest.FixtureRequest) -> Iterator[Prison]:
    """A container of uid 0, and one of an ordinary user."""
    with prison(area, request.param, runtime) as found:
        yield found


@pytest.fixture
def inside(root: None, area: Path, runtime: str) -> Iterator[Prison]:
    """A container of uid 0."""
    with prison(area, "root", runtime) as found:
        yield found


@pytest.fixture
def outside(area: Path) -> Iterator[Outside]:
    """A tree that must stay unchanged."""
    found = Outside(area)
    yield found
    found.check()
