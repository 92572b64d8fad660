"""The snapshots of an upper on disk."""

from __future__ import annotations

from pathlib import Path

from unionfs.storage.snapshot_record import added
from unionfs.storage.snapshots import opened


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
