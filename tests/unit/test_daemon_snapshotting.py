"""What a daemon does with snapshots by itself, and in which order it changes what lies on disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from unionfs.daemon import snapshotting
from unionfs.daemon.settle import settle
from unionfs.daemon.snapshotting import Snapshotting, _why_not, recover
from unionfs.errors import UserError
from unionfs.settings.specs import TmpfsOptions, TmpfsSpec
from unionfs.storage.snapshot_record import added
from unionfs.storage.snapshots import Store, opened
from unionfs.sys.fds import Owned
from unionfs.union.stacking import Copied


async def test_a_failure_of_cleaning_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It runs beside the session, which goes on."""
    (tmp_path / "upper").touch()
    with Owned(os.open(tmp_path / "upper", os.O_RDONLY)) as fd:  # which has no `..`
        stack: Any = SimpleNamespace(upper=SimpleNamespace(root_fd=fd))
        serving: Any = SimpleNamespace(settings=SimpleNamespace(upper=str(tmp_path / "upper")))
        nothing: Any = None
        await Snapshotting(nothing, stack, serving, lambda: None).clean()
    assert "what snapshots have left cannot be removed: [Errno 20]" in caplog.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"read_only": True}, "it is read-only; "),
        ({"upper": None, "work": None}, "it has no upper; "),
        ({"upper": None, "work": None, "upper_tmpfs": TmpfsOptions()}, "its upper is in memory; "),
        ({"outlive": True}, "it has outlive; "),
        ({"storage": (TmpfsSpec(target="/t"),)}, "it has storage (-v, --mount, --tmpfs); "),
        ({"watch_lower": True}, "it has --watch-lower; "),
        ({"lives_with": (1, 2)}, "it has a command in it (`unionfs run`, `unionfs try`); "),
        ({}, ""),
    ],
    ids=str,
)
def test_mounts_that_have_no_snapshots(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    (tmp_path / "upper").mkdir()
    settings = settle("/m", lowers=["/l"], upper=str(tmp_path / "upper"), work="/w", trusted_xattrs=True)
    settings = replace(settings, **{"read_only": False, **changes})
    with Owned(os.open(tmp_path / "upper", os.O_RDONLY)) as fd:
        stack: Any = SimpleNamespace(upper=SimpleNamespace(root_fd=fd), keeps_permissions=False, owners=None)
        found = _why_not(settings, stack, possible=True)
        assert found.startswith(text)
        assert bool(found) == bool(text)
        if text:
            return
        assert _why_not(settings, stack, possible=False).startswith("its session is pyfuse3")
        stack.keeps_permissions = True
        assert _why_not(settings, stack, possible=True) == "it has xattr_permissions; mount it without"
        stack.keeps_permissions, stack.owners = False, object()
        assert _why_not(settings, stack, possible=True).startswith("it has other owners (uidmapping")
        stack.owners = None
        for name in ("link", "branch.json", "container.json", "volume.json"):
            (tmp_path / name).touch()
            assert "belongs to a branch, volume or container" in _why_not(settings, stack, possible=True)
            (tmp_path / name).unlink()
        stack.upper = None
        assert _why_not(settings, stack, possible=True).startswith("it has no upper")


def test_a_mount_without_an_upper(tmp_path: Path) -> None:
    """Nothing is to be finished. With an upper in memory only the settings name none."""
    named: Any = SimpleNamespace(upper=str(tmp_path))
    unnamed: Any = SimpleNamespace(upper=None)
    for stack in (SimpleNamespace(upper=None), SimpleNamespace(upper=SimpleNamespace(root_fd=-1))):
        given: Any = stack
        recover(given, unnamed)
    none: Any = SimpleNamespace(upper=None)
    recover(none, named)


class _Killed(BaseException):
    """The end of the daemon at a step."""


class _Union:
    """Stands for the union and its layers: only the steps on disk happen. `ends_at` is one of them."""

    def __init__(self, root: Path) -> None:
        for name in ("lower", "upper", "work"):
            (root / name).mkdir()
        self.steps: list[str] = []
        self.ends_at = ""
        self.upper = root / "upper"
        self.root_fd = os.open(self.upper, os.O_RDONLY)
        self.settings = replace(
            settle(
                "/m", lowers=[str(root / "lower")], upper=str(self.upper), work=str(root / "work"),
                trusted_xattrs=True,
            ),
            read_only=False,
        )  # fmt: skip
        self.possible, self.union = True, self
        self.snapshots: Any = self
        self.keeps_permissions, self.owners, self.durable = False, None, True
        lower = str(root / "lower")
        self.layers = [SimpleNamespace(path=lower, is_upper=one) for one in (True, False)]
        self.replaced_by: list[Any] = []
        self.copied: list[Copied] = []
        own: Any = self
        self.stack: Any = None
        serving = SimpleNamespace(settings=self.settings, locate=lambda: None, changed=self._changed)
        self.serving: Any = serving
        stack: Any = SimpleNamespace(
            upper=self, layers=self.layers, keeps_permissions=False, owners=None, durable=True,
            claim=self._claim,
            protect=lambda fd: self.step(f"protect {fd == self.root_fd}"), own_lower=self._own,
            sync_upper=lambda: self.step("sync"), renew_index=lambda: self.step("renewed"),
        )  # fmt: skip
        self.stack = stack
        self.daemon = Snapshotting(own, stack, serving, lambda: self.step("published"))

    def step(self, name: str) -> None:
        self.steps.append(name)
        if name == self.ends_at:
            raise _Killed

    def _claim(self, _: int, upper: str) -> None:
        assert upper == str(self.upper)
        self.step("claimed")

    def _changed(self, settings: Any) -> None:
        self.serving.settings = settings

    @staticmethod
    def _own(fd: int) -> int:
        """As `LayerStack` does: takes the fd, and returns it."""
        os.close(fd)
        return fd

    def is_moved_to(self, layer: str) -> None:
        self.step(f"moved to {os.path.basename(layer)}")

    async def take(self, fd: int, upper: str, exchange: Callable[[], None]) -> tuple[list[Any], float]:
        await self.replace(fd, upper, [], exchange)
        return self.copied, 0.5

    async def replace(self, fd: int, upper: str, lowers: list[Any], exchange: Callable[[], None]) -> None:
        """As `fuse.snapshots` does: the fd is its own from then on."""
        assert upper == str(self.upper)
        self.replaced_by = lowers
        self.step("before")
        exchange()
        os.close(self.root_fd)
        self.root_fd = fd
        self.step("exchanged")

    def store(self) -> Store:
        return opened(str(self.upper))

    def shown(self) -> list[str]:
        with self.store() as store, store.locked():
            return [one.name for one in store.record().shown()]

    def is_recorded(self) -> bool:
        """Whether nothing is left to be completed by the next daemon."""
        return not (self.upper.parent / "upper.snapshots/pending.json").exists()

    def head(self) -> str | None:
        with self.store() as store, store.locked():
            return store.record().head


@pytest.fixture
def union(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Union]:
    async def nothing(_: object) -> None:
        pass

    monkeypatch.setattr(snapshotting, "write_back", nothing)
    monkeypatch.setattr(snapshotting, "lacking_names", lambda _: False)
    made = _Union(tmp_path)
    yield made
    os.close(made.root_fd)


async def test_the_steps_of_a_snapshot(union: _Union) -> None:
    """What the mount answers and records, and that it is on disk before that counts as done."""
    done = await union.daemon.obey("snapshot", {"name": "first"})
    layer = f"{union.upper}.snapshots/0001"
    assert done == {
        "done": True, "name": "first", "layer": layer, "created": done["created"], "seconds": 0.5,
        "open_files": 0, "files": [],
    }  # fmt: skip
    assert union.steps == [
        "claimed", "before", "exchanged", "moved to 0001", "protect True", "published", "sync",
    ]  # fmt: skip
    assert union.serving.settings.lowers == (layer, *union.settings.lowers)
    assert union.is_recorded()
    assert union.shown() == ["first"]


@pytest.mark.parametrize("order", ["snapshot", "restore"])
@pytest.mark.parametrize(("step", "is_done"), [("before", False), ("exchanged", True), ("published", True)])
async def test_an_end_at_a_step(union: _Union, order: str, step: str, is_done: bool) -> None:
    """The record that counts afterwards is that of the stack on disk."""
    await union.daemon.obey("snapshot", {"name": "first"})
    (union.upper / "later").touch()
    await union.daemon.obey("snapshot", {"name": "second"})
    (union.upper / "last").touch()
    union.steps.clear()
    union.ends_at = step
    with pytest.raises(_Killed):
        await union.daemon.obey(order, {"name": "third" if order == "snapshot" else "first"})
    assert union.steps[-1] == step
    assert (union.upper / "last").exists() is not is_done
    if order == "snapshot":
        assert union.shown() == ["first", "second", *(["third"] if is_done else [])]
    else:
        assert union.shown() == ["first", "second"]
        assert union.head() == ("0001" if is_done else "0002")


async def test_the_steps_of_a_restore(union: _Union) -> None:
    await union.daemon.obey("snapshot", {"name": "first"})
    first = union.serving.settings.lowers
    await union.daemon.obey("snapshot", {"name": "second"})
    union.steps.clear()
    done = await union.daemon.obey("restore", {"name": "first"})
    assert done == {"done": True, "name": "first", "lowers": list(first)}
    assert union.serving.settings.lowers == first
    assert union.steps == ["claimed", "before", "exchanged", "published"]
    assert union.is_recorded()
    assert union.replaced_by[0][0] == first[0]  # opened anew
    assert union.replaced_by[1:] == [union.layers[1]]  # the lower of the mount
    with pytest.raises(UserError, match="no snapshot is named"):
        await union.daemon.obey("restore", {})
    with pytest.raises(UserError, match="must be text"):
        await union.daemon.obey("restore", {"name": 1})


def test_how_a_copied_file_is_shown() -> None:
    for changed, state in ((True, "changed"), (False, "mapped")):
        one: Any = SimpleNamespace(path=b"dir/\xff", size=5, changed=changed)
        assert snapshotting._shown(one) == {"path": "dir/\udcff", "size": 5, "state": state}


@pytest.mark.parametrize("still", [False, True])
async def test_which_files_are_named(union: _Union, still: bool) -> None:
    """Those that the copy may lack something of: written meanwhile, or mapped by programs that went on."""
    union.copied = [
        Copied(b"quiet", 1, changed=False, mapped=False), Copied(b"changed", 2, changed=True, mapped=False),
        Copied(b"mapped", 3, changed=False, mapped=True), Copied(b"both\xff", 4, changed=True, mapped=True),
    ]  # fmt: skip
    done = await union.daemon.obey("snapshot", {"name": "first", "still": still})
    assert done["open_files"] == 4
    changed = {"path": "changed", "size": 2, "state": "changed"}
    mapped = {"path": "mapped", "size": 3, "state": "mapped"}
    both = {"path": "both\udcff", "size": 4, "state": "changed"}
    assert done["files"] == [changed, *([] if still else [mapped]), both]
    union.copied = [Copied(b"%d" % n, 0, changed=True, mapped=False) for n in range(150)]
    assert len((await union.daemon.obey("snapshot", {"name": "second"}))["files"]) == 100


async def test_what_is_refused(union: _Union, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made."""
    with pytest.raises(UserError, match="has no snapshot first"):
        await union.daemon.obey("restore", {"name": "first"})
    with pytest.raises(UserError, match="a/b"):
        await union.daemon.obey("snapshot", {"name": "a/b"})
    assert not (union.upper.parent / "upper.snapshots").exists()
    monkeypatch.setattr(snapshotting, "lacking_names", lambda _: True)
    assert await union.daemon.obey("snapshot", {"name": "first"}) == {"links": True}
    assert union.shown() == []

    async def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshotting, "lacking_names", lambda _: False)
    monkeypatch.setattr(snapshotting, "write_back", full)
    with pytest.raises(UserError, match=r"^/m cannot change its layers: no space left on device; "):
        await union.daemon.obey("snapshot", {"name": "first"})
    assert union.steps == []


async def test_a_record_that_cannot_be_written(union: _Union) -> None:
    """The change is made, and the sentence says so."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    union.stack.sync_upper = full
    with pytest.raises(UserError, match="snapshot first was taken, but could not be recorded: no space left"):
        await union.daemon.obey("snapshot", {"name": "first"})
    assert union.shown() == ["first"]


async def test_a_snapshot_that_is_cancelled(union: _Union) -> None:
    """After the exchange it is recorded all the same."""
    with trio.CancelScope() as scope:
        union.stack.protect = lambda fd: scope.cancel()
        await union.daemon.obey("snapshot", {"name": "first"})
    assert union.is_recorded()
    assert union.steps[-1] == "sync"


async def test_cleaning(union: _Union) -> None:
    """What no snapshot needs is removed, in a thread if there are snapshots."""
    started: list[object] = []
    before = trio.to_thread.run_sync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trio.to_thread, "run_sync", lambda *values, **_: started.append(values) or before(*values)
        )
        await union.daemon.clean()
        assert started == []
        await union.daemon.obey("snapshot", {"name": "first"})
        waste = union.upper.parent / "upper.snapshots/0009"
        waste.mkdir()
        started.clear()
        await union.daemon.clean()
        assert len(started) == 1
    assert not waste.exists()
    assert (union.upper.parent / "upper.snapshots/0001").is_dir()


@pytest.mark.parametrize("io", ["hybrid", "cached"])
async def test_what_a_restore_leaves(union: _Union, io: str) -> None:
    """The former upper is waste; in cached files of it may be open without an fd."""
    union.serving.settings = replace(union.serving.settings, io=io)
    await union.daemon.obey("snapshot", {"name": "first"})
    await union.daemon.obey("restore", {"name": "first"})
    former = union.upper.parent / "upper.snapshots/0002"
    for _ in range(20 if io == "cached" else 500):
        if former.exists():
            await trio.sleep(0.01)
    assert former.exists() is (io == "cached")


def test_a_daemon_that_was_killed(union: _Union) -> None:
    """The next one renews the index if the change is forgotten, and only then."""
    recover(union.stack, union.settings)
    assert union.steps == []
    snapshots = union.upper.parent / "upper.snapshots"
    assert not snapshots.exists()
    snapshots.mkdir()
    with union.store() as store, store.locked():
        record, id_ = added(store.record(), "first")
        os.mkdir(id_, dir_fd=store.fd)
        with Owned(os.open(id_, os.O_RDONLY, dir_fd=store.fd)) as fd:
            store.announce(record, fd)
    recover(union.stack, union.settings)
    assert union.steps == ["renewed"]
    recover(union.stack, union.settings)
    assert union.steps == ["renewed"]
