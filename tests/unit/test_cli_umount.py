"""`unionfs umount --all`, without any mount of this machine: what it would unmount, and in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from unionfs.cli.common import run
from unionfs.cli.main import cli
from unionfs.daemon import live, unmount
from unionfs.errors import UserError


def _mount(path: str, lives_with: tuple[int, int] | None = None) -> SimpleNamespace:
    return SimpleNamespace(settings=SimpleNamespace(mountpoint=path, lives_with=lives_with))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, bool]]:
    """The calls, with `lazy` and `force`."""
    calls = []

    def umount(path: str, *, lazy: bool, force: bool, container_of: object) -> None:
        calls.append((path, lazy, force))
        if path == "/busy":
            raise UserError("/busy is busy.")

    monkeypatch.setattr(unmount, "umount", umount)
    mounts = [_mount("/old"), _mount("/busy"), _mount("/of/a/container", (1, 2)), _mount("/new")]
    monkeypatch.setattr(live, "live_mounts", lambda: mounts)
    return calls


def test_the_newest_first_without_those_of_containers(ended: list[tuple[str, bool, bool]]) -> None:
    assert run(cli, ["umount", "--all", "--lazy"], "unionfs") == 1
    assert ended == [("/new", True, False), ("/busy", True, False), ("/old", True, False)]


def test_those_that_are_named(ended: list[tuple[str, bool, bool]]) -> None:
    assert run(cli, ["umount", "-f", "/a", "/b", "/a"], "unionfs") == 0
    assert ended == [("/a", False, True), ("/b", False, True)]


@pytest.mark.parametrize("words", [(), ("--all", "/a")])
def test_either_names_or_all(
    ended: list[tuple[str, bool, bool]], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["umount", *words], "unionfs") == 1
    assert "either mountpoints or --all" in capsys.readouterr().err
    assert ended == []
