"""Copy-up of metadata alone (``metacopy=on``), beside kernel overlayfs with the same option.

Both make the same changes to copies of the same layers, and then continue the upper of the other.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.mounting import Mount, kernel_mounted, mounted
from tests.support.snapshot import read_xattrs
from tests.support.world import errno_of

SIZE = 300_000
CONTENT = os.urandom(SIZE)
ON = ("metacopy=on",)
_BLOCKS_OF_SMALL = 16
"""A block of data, and one of xattrs that do not fit into the inode."""
OURS = ("trusted.overlay.metacopy", "trusted.overlay.redirect")
"""The xattrs in the upper that both write; `origin` depends on the layers."""


def build(lowers: list[Path]) -> None:
    """Two lowers; the upper one has a metacopy file, too."""
    top, bottom = lowers
    for lower in lowers:
        (lower / "d").mkdir(parents=True)
    (bottom / "f").write_bytes(CONTENT)
    (bottom / "d/f").write_bytes(CONTENT[::-1])
    (bottom / "d/small").write_bytes(b"small")
    (bottom / "d/empty").touch()
    (bottom / "d/setuid").write_bytes(b"program")
    os.chown(bottom / "d/setuid", 1000, 1000)
    os.chmod(bottom / "d/setuid", 0o6755)
    with (bottom / "d/sparse").open("wb") as sparse:
        sparse.seek(1 << 20)
        sparse.write(b"end")
    (bottom / "elsewhere").write_bytes(CONTENT)
    (top / "middle").touch()
    os.truncate(top / "middle", SIZE)
    os.setxattr(top / "middle", "trusted.overlay.metacopy", b"")
    os.setxattr(top / "middle", "trusted.overlay.redirect", b"/elsewhere")
    os.chmod(top / "middle", 0o640)


FILES = ("f", "d/f", "d/small", "d/setuid", "d/sparse", "middle")
EMPTY = "d/empty"
"""Has no data to be left in the lower."""


def change_metadata(root: Path) -> None:
    """Every kind of change that leaves the data in the lower."""
    os.chmod(root / "f", 0o600)
    os.chown(root / "d/f", 1000, 1001)
    os.utime(root / "d/small", (10, 20))
    os.setxattr(root / "d/sparse", "user.mine", b"1")
    os.chown(root / "d/setuid", 0, 0)
    os.chmod(root / "middle", 0o444)
    os.chmod(root / EMPTY, 0o4711)


def other_names(root: Path) -> None:
    os.rename(root / "f", root / "d/g")
    os.link(root / "d/f", root / "d/link")
    os.rename(root / "d/link", root / "moved")
    os.rename(root / "middle", root / "d/middle")
    os.rename(root / "d/small", root / "d/renamed")


def write(root: Path) -> None:
    """The first change of data of each kind."""
    with (root / "f").open("r+b") as file:
        file.seek(1000)
        file.write(b"written")
    with (root / "d/f").open("ab") as file:
        file.write(b"appended")
    os.truncate(root / "d/sparse", 1 << 19)
    (root / "d/small").write_bytes(b"")
    with (root / "middle").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[5:10] = b"store"


def write_all(root: Path) -> None:
    for name in FILES:
        if (root / name).exists():
            with (root / name).open("r+b") as file:
                file.write(b"1")


def seen(root: Path) -> dict[str, object]:
    """What a reader sees of the tree."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        name = str(path.relative_to(root))
        found[name] = (oct(st.st_mode), st.st_uid, st.st_gid)
        if path.is_file():
            xattrs = read_xattrs(str(path))
            found[name] = (
                *(oct(st.st_mode), st.st_uid, st.st_gid, st.st_size, st.st_nlink, xattrs),
                st.st_blocks >= st.st_size // 1024, path.read_bytes(),
            )  # fmt: skip
    return found


def kept(upper: Path) -> dict[str, object]:
    """What the upper has of each regular file: data (unless it is small), and which of the xattrs
    that both write. (A redirect within one directory is relative there, and absolute here.)"""
    return {
        str(path.relative_to(upper)): (path.lstat().st_blocks > _BLOCKS_OF_SMALL, {
            name for name in os.listxattr(path) if name in OURS
        })
        for path in sorted(upper.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.lstat().st_size
    }  # fmt: skip


class Both:
    """The layers of the union and of kernel overlayfs, and their mounts."""

    def __init__(self, area: Path, session: str) -> None:
        self._area, self.session = area, session
        for side in ("union", "kernel"):
            build(self.lowers(side))
            for name in ("upper", "work"):
                (area / side / name).mkdir()

    def lowers(self, side: str) -> list[Path]:
        return [self._area / side / "l0", self._area / side / "l1"]

    def upper(self, side: str) -> Path:
        return self._area / side / "upper"

    @contextlib.contextmanager
    def mount(self, side: str, *, by: str = "", options: tuple[str, ...] = ON) -> Iterator[Mount]:
        """One side's layers, mounted ``by`` the union or the kernel, by default its own."""
        work = self._area / side / "work"
        if (by or side) == "union":
            context = mounted(
                self._area / side, lowers=self.lowers(side), upper=self.upper(side), work=work,
                session=self.session, options=options,
            )  # fmt: skip
        else:
            context = kernel_mounted(
                self._area / side, lowers=self.lowers(side), upper=self.upper(side), work=work,
                options=options,
            )  # fmt: skip
        with context as mount:
            yield mount

    def after(self, *steps: Callable[[Path], object], swapped: bool = False) -> None:
        """Make the same changes on both sides, and compare results and uppers.

        ``swapped``: each on the layers of the other.
        """
        found, other = {}, {"union": "kernel", "kernel": "union"}
        for side in ("union", "kernel"):
            with self.mount(side, by=other[side] if swapped else side) as mount:
                for step in steps:
                    step(mount.mountpoint)
                found[side] = seen(mount.mountpoint)
        assert found["union"] == found["kernel"]
        assert kept(self.upper("union")) == kept(self.upper("kernel"))


@pytest.fixture
def both(kernel_overlay: None, area: Path, session: str) -> Both:
    return Both(area, session)


STEPS = [
    (), (change_metadata,), (change_metadata, write), (write,), (other_names,), (change_metadata, other_names)
]  # fmt: skip


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "-".join(step.__name__ for step in steps))
def test_same_as_the_kernel_and_exchanged(both: Both, steps: tuple[Callable[[Path], object], ...]) -> None:
    both.after(*steps)
    both.after(swapped=True)
    both.after(write_all)


@pytest.mark.parametrize("before", [change_metadata, other_names], ids=lambda step: step.__name__)
def test_the_other_continues(both: Both, before: Callable[[Path], object]) -> None:
    """Metadata, names and data of an upper that the other filesystem began."""

    def go_on(root: Path) -> None:
        for name in ("d/f", "d/setuid", "d/sparse"):
            os.chmod(root / name, 0o4711)
        os.rename(root / "d/sparse", root / "last")
        with (root / "d/f").open("r+b") as file:
            file.write(b"changed")

    both.after(before)
    both.after(go_on, swapped=True)
    both.after()


def test_without_the_option_metacopy_is_read(both: Both) -> None:
    """Unlike the kernel, which refuses to: only root can have made such a file."""
    with both.mount("kernel") as mount:
        change_metadata(mount.mountpoint)
        other_names(mount.mountpoint)
        expected = seen(mount.mountpoint)
    with both.mount("kernel", by="union", options=("metacopy=off",)) as mount:
        assert seen(mount.mountpoint) == expected
        os.rename(mount.mountpoint / "d/sparse", mount.mountpoint / "d/whole")
        os.chmod(mount.mountpoint / "elsewhere", 0o600)
    with both.mount("kernel") as mount:
        assert (mount.mountpoint / "d/whole").read_bytes()[-3:] == b"end"
    for name in ("d/whole", "elsewhere"):
        assert "trusted.overlay.metacopy" not in os.listxattr(both.upper("kernel") / name)


def test_as_a_lower(both: Both, area: Path, session: str) -> None:
    """Read-only, without an upper of its own."""
    with both.mount("kernel") as mount:
        change_metadata(mount.mountpoint)
        other_names(mount.mountpoint)
        expected = seen(mount.mountpoint)
    layers = [both.upper("kernel"), *both.lowers("kernel")]
    with mounted(area, lowers=layers, session=session) as mount:
        found = seen(mount.mountpoint)
    assert {name: value[-2:] for name, value in found.items() if isinstance(value, tuple)} == {
        name: value[-2:] for name, value in expected.items() if isinstance(value, tuple)
    }


def test_chown_of_much_data_writes_little(both: Both) -> None:
    """Less than 1 % of it reaches the upper."""
    lower = both.lowers("union")[1] / "much"
    lower.mkdir()
    for index in range(64):
        with (lower / str(index)).open("wb") as file:
            file.write(os.urandom(4096))
            os.posix_fallocate(file.fileno(), 0, 16 << 20)
    with both.mount("union") as mount:
        subprocess.run(["chown", "-R", "1000:1000", mount.mountpoint / "much"], check=True)
        assert (mount.mountpoint / "much/7").stat().st_uid == 1000
        assert mount.figure("copied_bytes") == 0
    done = subprocess.run(["du", "-sk", both.upper("union")], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) * 1024 < 64 * (16 << 20) // 100


def test_open_files_go_on(both: Both) -> None:
    """The same descriptor before, during and after: data, mode and size."""

    def steps(root: Path) -> list[object]:
        path, seen_ = root / "f", []
        reader = os.open(path, os.O_RDONLY)
        mapping = mmap.mmap(reader, SIZE, prot=mmap.PROT_READ)
        os.chmod(path, 0o600)
        seen_ += [os.pread(reader, 10, 50), stat.S_IMODE(os.fstat(reader).st_mode), mapping[:10]]
        os.fchmod(reader, 0o640)
        os.fsync(reader)
        os.fdatasync(reader)
        seen_ += [os.pread(reader, 10, 50), oct(os.stat(path).st_mode), os.fstat(reader).st_size]
        mapping.close()
        os.close(reader)
        writer = os.open(path, os.O_RDWR)
        os.pwrite(writer, b"new", 50)
        os.fchown(writer, 1000, 1000)
        seen_ += [os.pread(writer, 10, 45), path.read_bytes()[45:55], os.fstat(writer).st_uid]
        os.unlink(path)
        seen_ += [os.pread(writer, 10, 45), os.fstat(writer).st_nlink]
        os.close(writer)
        return seen_

    found = []
    for side in ("union", "kernel"):
        with both.mount(side) as mount:
            found.append(steps(mount.mountpoint))
    assert found[0] == found[1]


def test_ranges(both: Both) -> None:
    """fallocate, copy_file_range, lseek and O_TRUNC on files whose data is in the lower."""

    def steps(root: Path) -> list[object]:
        for name in FILES:
            os.chmod(root / name, 0o600)
        seen_: list[object] = []
        if both.session in ("direct-hybrid", "direct-passthrough"):  # the others leave it to the kernel
            with (root / "d/sparse").open("rb") as file:
                seen_.append(os.lseek(file.fileno(), 0, os.SEEK_DATA))
        with (root / "f").open("rb") as source, (root / "d/small").open("r+b") as target:
            seen_.append(os.copy_file_range(source.fileno(), target.fileno(), 1000, 0, 2))
        with (root / "d/f").open("r+b") as file:
            os.posix_fallocate(file.fileno(), SIZE, 1000)
        os.close(os.open(root / "middle", os.O_RDONLY | os.O_TRUNC))
        os.truncate(root / "f", 2 * SIZE)
        return [*seen_, *((root / name).read_bytes() for name in FILES)]

    found = []
    for side in ("union", "kernel"):
        with both.mount(side) as mount:
            found.append(steps(mount.mountpoint))
    assert found[0] == found[1]


def test_missing_data(both: Both) -> None:
    """The name can be listed, examined and removed. (The kernel does not look it up.)"""
    with both.mount("kernel") as mount:
        change_metadata(mount.mountpoint)
    os.unlink(both.lowers("kernel")[1] / "d/f")
    with both.mount("kernel", by="union") as mount:
        path = mount.mountpoint / "d/f"
        assert "f" in os.listdir(path.parent)
        assert path.stat().st_uid == 1000
        expected = errno.EIO
        assert errno_of(path.read_bytes) == expected
        if "cached" not in mount.session:  # where the kernel sends no open, the write fails
            assert errno_of(os.open, path, os.O_RDWR) == expected
        os.chmod(path, 0o600)
        assert "no lower has its data" in mount.log_text()
        path.unlink()
        assert not path.exists()


def test_a_full_upper_keeps_the_data(
    kernel_overlay: None, area: Path, session: str, filesystem: Callable[..., Path]
) -> None:
    """ENOSPC while the data follows: the file reads as before, and is metacopy."""
    small = filesystem("tmpfs", 4 << 20)
    for name in ("upper", "work"):
        (small / name).mkdir()
    (area / "lower").mkdir()
    content = os.urandom(16 << 20)
    (area / "lower/big").write_bytes(content)
    with mounted(
        area, lowers=[area / "lower"], upper=small / "upper", work=small / "work", session=session, options=ON
    ) as mount:
        big = mount.mountpoint / "big"
        os.chmod(big, 0o600)

        def change() -> None:
            with big.open("r+b") as file:
                file.write(b"changed")
                file.flush()
                os.fsync(file.fileno())

        assert errno_of(change) == errno.ENOSPC
        # What the cached mode could not write leaves the page cache after the answer.
        assert dc.wait_for(lambda: big.read_bytes() == content)
        assert "trusted.overlay.metacopy" in os.listxattr(small / "upper/big")
        (mount.mountpoint / "fits").write_bytes(bytes(2 << 20))
    shutil.rmtree(small / "upper")
