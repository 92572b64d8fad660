"""The snapshots of an upper on disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.support.patience import patient
from unionfs.errors import UserError
from unionfs.storage import snapshots
from unionfs.storage.snapshot_record import added
from unionfs.storage.snapshots import Store, opened


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """An upper that may have snapshots."""
    for name in ("upper", "upper.snapshots"):
        (tmp_path / name).mkdir()
    return tmp_path / "upper"


def test_what_is_left_is_never_a_layer_again(tmp_path: Path) -> None:
    """A daemon was killed while it took a snapshot. The next one finds that to be waste, and removes it when
    there may be another snapshot."""
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper.snapshots/0001").mkdir(parents=True)
    with opened(str(tmp_path / "upper")) as store:
        with store.locked():
            waste = store.waste()
        with store.locked():
            record, id_ = added(store.record(), "first")
            with store.staged(id_) as fd:
                store.announce(record, fd)
                store.exchange(id_)
            store.finish(record)
        for name in waste:
            store.discard(name)
        assert waste == ["0001"]
        assert list(store.record().layers) == [id_]
        assert (tmp_path / "upper.snapshots" / id_).is_dir()
        assert not (tmp_path / "upper.snapshots/pending.json").exists()
        with store.locked():
            assert store.waste() == []


def test_only_directories_are_waste(upper: Path) -> None:
    beside = upper.parent / "upper.snapshots"
    (beside / "link").symlink_to(upper)
    (beside / "file").touch()
    for name in ("0007", ".joining"):
        (beside / name).mkdir()
    with opened(str(upper)) as store, opened(str(upper)) as other, store.locked():
        assert sorted(store.waste()) == [".joining", "0007"]
        with other.joining() as joins:  # another process fills it
            assert joins
            assert store.waste() == ["0007"]
            with store.joining() as again:
                assert not again


def test_one_changes_them_at_a_time(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one waits for a while."""
    with opened(str(upper)) as store, opened(str(upper)) as other:
        held, ends = threading.Event(), threading.Event()

        def hold() -> None:
            with other.locked():
                held.set()
                ends.wait(patient(10))

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(patient(10))
        with monkeypatch.context() as patch:
            patch.setattr(snapshots, "_LOCK_SECONDS", 0.1)
            with pytest.raises(UserError, match="in use by another process"), store.locked():
                pass
        monkeypatch.setattr(snapshots, "_LOCK_SECONDS", patient(10))
        threading.Timer(0.1, ends.set).start()
        with store.locked():
            assert ends.is_set()
        thread.join()


@pytest.mark.parametrize("another", [False, True])
def test_an_upper_that_was_renamed(upper: Path, another: bool) -> None:
    """Its name leads to none, or to another directory: its snapshots are not those beside that."""
    fd = os.open(upper, os.O_PATH)
    upper.rename(upper.parent / "moved")
    if another:
        upper.mkdir()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UserError, match="was renamed while it is mounted"):
        Store(fd, str(upper))
    assert os.listdir("/proc/self/fd") == before
    os.close(fd)
