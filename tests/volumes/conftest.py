"""A separate storage root for each test, and the volume commands on it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import Done, succeed, unionfs
from tests.support import areas
from tests.volumes.bricks import Brick, served
from unionfs.storage.volumes import Volumes


class Store:
    """A storage root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.told: list[str] = []
        self.env: dict[str, str] = {}

    def volumes(self) -> Volumes:
        """The volumes, opened as by another process."""
        return Volumes(str(self.root), tell=self.told.append)

    def __call__(self, *arguments: str | Path, **extra: Any) -> Done:
        """Run `unionfs volume ARGUMENT...`: in this process (faster), or with `extra` in a new one."""
        environment = {"UNIONFS_ROOT": str(self.root), **self.env, **extra.pop("env", {})}
        if extra or "PYTHONPATH" in environment:
            return unionfs("volume", *arguments, env=environment, **extra)
        return _here(["volume", *map(str, arguments)], environment)

    def ok(self, *arguments: str | Path, **extra: Any) -> str:
        """The command must succeed; returns its standard output."""
        done = self(*arguments, **extra)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def create(self, *arguments: str | Path) -> Path:
        """Create a volume (the name last) and return its data directory."""
        name = succeed(self("create", *arguments)).strip()
        return self.data(name)

    def data(self, name: str) -> Path:
        """The data directory of a local volume."""
        return self.root / "volumes" / name / "_data"


def _here(arguments: list[str], environment: dict[str, str]) -> Done:
    from unionfs.cli.common import run
    from unionfs.cli.main import cli

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = run(cli, arguments, "unionfs")
    out, err = (stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in streams)  # type: ignore[attr-defined]
    return Done(arguments, code, out, err)


@pytest.fixture
def store(area: Path) -> Iterator[Store]:
    """An empty storage root; mounts below it are removed at the end."""
    root = area / "root"
    yield Store(root)
    areas.detach(root)


@pytest.fixture
def as_root() -> None:
    """Skip without root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def brick(area: Path) -> Iterator[Brick]:
    """A GlusterFS volume."""
    with served(area) as found:
        yield found
