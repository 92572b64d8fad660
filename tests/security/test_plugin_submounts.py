"""Mounts below a source of storage: they are mounted into the union and unmounted with the source."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed
from tests.support import syscalls
from tests.support.storage import Storage, storage
from unionfs.storage.drivers import plugin_search

SERVER = Path(__file__).parents[1] / "volumes/plugin_server.py"


@pytest.fixture
def one(area: Path) -> Iterator[Storage]:
    """A union with storage, as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for mounts")
    with storage(area) as found:
        yield found


@contextmanager
def _mounts(top: Path) -> Iterator[None]:
    """A tmpfs, one in it, and a bind mount of a directory of the outer one in the inner one."""
    made: list[Path] = []
    try:
        for path in (top / "sub", top / "sub/deep/er"):
            path.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
            made.append(path)
            (path / "file").write_text(f"{path.name}\n")
        (top / "sub/other").mkdir()
        bound = top / "sub/deep/er/bound"
        bound.mkdir()
        subprocess.run(["mount", "--bind", top / "sub/other", bound], check=True)
        made.append(bound)
        yield
    finally:
        for path in reversed(made):
            syscalls.umount(path)


@contextmanager
def _plugin(one: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A running plugin; yields the directory of its volume `data`, created here."""
    places, home = one.place.root / "plugins", one.place.root / "server"
    places.mkdir()
    home.mkdir()
    monkeypatch.setenv(plugin_search.ENVIRONMENT, str(places))
    child = subprocess.Popen([sys.executable, SERVER, home, places / "p.sock"], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.read()
        succeed(one.unionfs("volume", "create", "-d", "p", "data"))
        yield home / "volumes/data"
    finally:
        child.kill()
        child.wait()


@contextmanager
def _source(one: Storage, kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A source's directory, and the options that mount it at /data."""
    if kind == "plugin":
        with _plugin(one, monkeypatch) as path:
            yield path, ["-v", "data:/data"]
    elif kind == "local":
        succeed(one.unionfs("volume", "create", "data"))
        yield one.volume("data"), ["-v", "data:/data"]
    elif kind == "subpath":
        succeed(one.unionfs("volume", "create", "data"))
        (one.volume("data") / "in/ner").mkdir(parents=True)
        yield one.volume("data") / "in/ner", ["--mount", "source=data,target=/data,volume-subpath=in/ner"]
    elif kind == "bound volume":
        options = ("-o", "type=none", "-o", "o=rbind", "-o", f"device={one.host}")
        succeed(one.unionfs("volume", "create", *options, "data"))
        yield one.host, ["-v", "data:/data"]
    elif kind == "symlink":
        (one.place.root / "link").symlink_to(one.host)
        yield one.host, ["-v", f"{one.place.root}/link:/data"]
    elif kind == "rslave":
        yield one.host, ["--mount", f"type=bind,source={one.host},target=/data,bind-propagation=rslave"]
    else:
        yield one.host, ["-v", f"{one.host}:/data"]


KINDS = ["plugin", "local", "subpath", "bound volume", "bind", "symlink", "rslave"]
_INSIDE = ["/", "/data", "/data/sub", "/data/sub/deep/er", "/data/sub/deep/er/bound"]


def _paths(one: Storage) -> list[str]:
    return sorted(path for path, _ in one.mounts())


@pytest.mark.parametrize("kind", KINDS)
def test_umount(one: Storage, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with _source(one, kind, monkeypatch) as (path, words), _mounts(path):
        one.mount(*words)
        assert _paths(one) == _INSIDE
        assert (one.merged / "data/sub/deep/er/file").read_text() == "er\n"
        one.umount()
        assert (path / "sub/deep/er/file").read_text() == "er\n"  # the host's own mounts stay


@pytest.mark.parametrize("kind", KINDS)
def test_busy(one: Storage, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes, including the content of a tmpfs."""
    with _source(one, kind, monkeypatch) as (path, words), _mounts(path):
        one.mount(*words)
        before = _paths(one)
        for busy in ("data", "data/sub", "data/sub/deep/er", "data/sub/deep/er/bound"):
            fd = os.open(one.merged / busy, os.O_RDONLY)
            try:
                refused(one.unionfs("umount", one.merged), "is busy", f"pid {os.getpid()}")
            finally:
                os.close(fd)
            assert _paths(one) == before == _INSIDE
            assert (one.merged / "data/sub/deep/er/file").read_text() == "er\n"
            assert (one.merged / "data/sub/file").read_text() == "sub\n"
            (one.merged / "data/sub/other/new").write_text(f"{busy}\n")
            assert (path / "sub/deep/er/bound/new").read_text() == f"{busy}\n"
        one.umount()


@pytest.mark.parametrize("kind", ["plugin", "bind"])
def test_mounts_of_others_are_left(one: Storage, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one mounted on top of a submount of the source."""
    with _source(one, kind, monkeypatch) as (path, words), _mounts(path):
        (path / "plain").mkdir()
        one.mount(*words)
        for where in ("data", "data/sub", "data/sub/deep/er", "data/sub/other", "data/plain"):
            foreign = one.merged / where
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", foreign], check=True)
            try:
                refused(one.unionfs("umount", one.merged), "is busy", f"{foreign} is mounted inside it")
            finally:
                syscalls.umount(foreign)
            assert _paths(one) == _INSIDE
        one.umount()
