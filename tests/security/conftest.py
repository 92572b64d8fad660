"""Fixtures of the attacks: layers, an ordinary user's host, and an attacker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mount.conftest import host, place
from tests.support.worker import Worker

__all__ = ["attacker", "host", "place"]


@pytest.fixture
def attacker(root: None) -> Iterator[Worker]:
    """A process of uid 1001 with the rights of an ordinary user."""
    with Worker(1001, 1001, modules=["tests.security.attacks"]) as worker:
        yield worker
