"""Existing but unreadable xattrs: an empty `security.capability`, or an error of the filesystem."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.security.test_layers_errors import failing as failing
from tests.support import snapshot
from tests.support.mounting import mounted
from tests.unit.test_storage_populate import fill
from tests.unit.union_support import OpenUnion, whiteout
from tests.unit.union_support import open_union as open_union
from tests.volumes.conftest import Store
from unionfs.storage.archive.walk import read_xattrs
from unionfs.union.diff import diff
from unionfs.union.layers import LayerStack

BROKEN = "security.capability"


def spoil(path: Path) -> None:
    """Set one unreadable xattr, and one readable one."""
    os.setxattr(path, "user.kept", b"value")
    os.setxattr(path, BROKEN, b"")
    with pytest.raises(OSError, match="Invalid argument"):
        os.getxattr(path, BROKEN)


def tree(top: Path) -> None:
    """A directory, a file in it and an empty file, all with unreadable xattrs."""
    (top / "dir").mkdir(parents=True, exist_ok=True)
    (top / "dir/file").write_text("data")
    (top / "empty").touch()
    for name in ("dir", "dir/file", "empty"):
        spoil(top / name)
    (top / "other").write_text("other")


pytestmark = pytest.mark.usefixtures("as_root")


class TestDiff:
    def test_one_directory_of_many(self, as_root: None, tmp_path: Path) -> None:
        upper, lower = tmp_path / "upper", tmp_path / "lower"
        for layer in (upper, lower):
            for name in ("dir", "same"):
                (layer / name).mkdir(parents=True)
                os.utime(layer / name, ns=(0, 0))
        (upper / "new").touch()
        spoil(upper / "dir")
        os.utime(upper / "dir", ns=(0, 0))
        found = list(diff(str(upper), [str(lower)], b"trusted.overlay."))
        assert found == [("C", b"/dir"), ("A", b"/new")]

    def test_errors_of_the_filesystem(self, failing: Path, area: Path) -> None:
        upper = area / "upper"
        (upper / "xattr-dir").mkdir(parents=True)
        (upper / "new").touch()
        st = (failing / "xattr-dir").stat()
        os.utime(upper / "xattr-dir", ns=(st.st_atime_ns, st.st_mtime_ns))
        found = list(diff(str(upper), [str(failing)], b"trusted.overlay."))
        assert found == [("A", b"/new"), ("C", b"/xattr-dir")]


class TestVolumes:
    def test_backup_restore_verify_and_clone(self, store: Store, area: Path) -> None:
        tree(store.create("data"))
        done = store("backup", "data", "-o", area / "b.tar")
        assert done.returncode == 0, done.stderr
        for name in ("dir", "dir/file", "empty"):
            assert f"unionfs: {name}: its xattr {BROKEN} cannot be read (invalid argument)" in done.stderr
        assert "other" not in done.stderr
        store.ok("verify", "data")
        store.ok("clone", "data", "copy")
        restored = store.create("restored")
        store.ok("restore", "restored", "-i", area / "b.tar")
        for data in (store.data("copy"), restored):
            for name in ("dir", "dir/file", "empty"):
                assert snapshot.read_xattrs(str(data / name)) == {"user.kept": b"value"}
            assert (data / "dir/file").read_text() == "data"

    def test_an_incremental_backup(self, store: Store, area: Path) -> None:
        tree(store.create("data"))
        store.ok("backup", "data", "-o", area / "b.tar")
        (store.data("data") / "new").touch()
        store.ok("backup", "data", "-o", area / "c.tar", "--since", area / "b.tar")
        store.ok("verify", "data")

    def test_errors_of_the_filesystem(self, failing: Path) -> None:
        notes: list[str] = []
        fd = os.open(failing / "xattr-dir", os.O_RDONLY)
        try:
            assert read_xattrs(fd, notes.append) == {}
        finally:
            os.close(fd)
        assert notes == ["its xattrs cannot be read (input/output error)"]


class TestPopulate:
    def test_what_cannot_be_read_is_left_out(
        self, as_root: None, open_union: OpenUnion, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tree(tmp_path / "l0/data")
        (tmp_path / "l0/data/link").symlink_to("nowhere")
        volume = tmp_path / "volume"
        volume.mkdir()
        assert fill(open_union().stack, volume, b"data")
        assert sorted(os.listdir(volume)) == ["dir", "empty", "link", "other"]
        for name in ("dir", "dir/file", "empty"):
            assert snapshot.read_xattrs(str(volume / name)) == {"user.kept": b"value"}
        assert caplog.text.count(f"the xattr {BROKEN} of") == 3

    def test_names_that_fail(self, failing: Path, area: Path, caplog: pytest.LogCaptureFixture) -> None:
        above = area / "above"
        above.mkdir()
        (above / "mine").touch()
        whiteout(above / "ENOMEM")  # may be a lack on this host, which ends the population
        volume = area / "volume"
        volume.mkdir()
        stack = LayerStack.open([str(above), str(failing)], None, None)
        try:
            assert fill(stack, volume)
        finally:
            stack.close()
        assert {"mine", "dir", "xattr-dir"} <= set(os.listdir(volume))
        assert "EIO" not in os.listdir(volume)
        assert "EIO cannot be looked up: input/output error; it is left out" in caplog.text


class TestCopyUp:
    @pytest.mark.parametrize("name", ["dir", "dir/file", "empty"])
    def test_an_empty_capability_stops_nobody(self, root: None, area: Path, session: str, name: str) -> None:
        """Kernel overlayfs returns EINVAL; `cp -a` skips the xattr."""
        tree(area / "lower")
        subprocess.run(["cp", "-a", area / "lower", area / "reference"], check=True)
        for made in ("upper", "work"):
            (area / made).mkdir()
        with mounted(
            area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
        ) as mount:
            os.chmod(mount.mountpoint / name, 0o701)
            if name == "dir":
                (mount.mountpoint / "dir/new").touch()
        found = snapshot.read_xattrs(str(area / "upper" / name))
        wanted = snapshot.read_xattrs(str(area / "reference" / name))
        assert {key: found[key] for key in found if not key.startswith("trusted.")} == wanted
