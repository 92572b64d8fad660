"""Forged archives as in the CVEs of tar programs: nothing outside the volume changes, memory is limited.

CVE-2001-1267, CVE-2007-4559 and CVE-2016-6321, names that lead outside: tests/volumes/test_archive_safety.py.
"""

from __future__ import annotations

import gzip
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import zstandard

from tests.mount.cli_calls import REPOSITORY, refused, wait_for
from tests.security.storage_actors import Outside, VolumeUser, meanwhile, resize_file
from tests.support.worker import Worker
from tests.volumes import forge, trees
from tests.volumes.conftest import Store
from tests.volumes.conftest import store as store
from tests.volumes.forge import Member, directory, file, other
from unionfs.errors import UserError
from unionfs.storage.archive import entry, headers, walk
from unionfs.storage.restore import restore

pytestmark = [pytest.mark.usefixtures("as_root"), pytest.mark.watchdog(200), pytest.mark.timeout(200)]

LONG = b"d" * 247
_MEMORY = 700 << 20
Restored = Callable[[Sequence[Member]], tuple[str, dict[str, int]]]


def chain(depth: int, target: bytes) -> list[Member]:
    """Directories with long names, symlinks down through them, and one at the end that leads up and out.

    So realpath(3) fails beyond PATH_MAX, and its caller accepts the path as safe: CVE-2025-4517,
    CVE-2025-4330 and CVE-2025-4138 of Python's tarfile.
    """
    members: list[Member] = []
    for number in range(depth):
        letter = b"%c" % (ord("a") + number)
        members += [directory(b"./" + LONG[number:] + b"/"), other("l", b"./" + letter, LONG[number:])]
    steps = b"/".join(b"%c" % (ord("a") + number) for number in range(depth))
    members.append(other("l", b"./link", steps + b"/" + b"../" * 20 + target.lstrip(b"/")))
    return members


def attempts(target: bytes) -> dict[str, Sequence[Member]]:
    """Archives that try to change files in the directory `target`, which has the file `journal`."""
    link, journal = other("l", b"./link", target), target + b"/journal"
    return {
        "a file through a chain of links": [*chain(16, target), file(b"./link/new/planted")],
        "a directory through a chain of links": [*chain(16, target), directory(b"./link/planted/")],
        "a hard link through a chain of links": [*chain(16, target), other("h", b"./x", b"./link/journal")],
        "a file through a link to a link": [link, other("l", b"./two", b"link"), file(b"./two/planted")],
        "a directory over a link": [link, directory(b"./link/")],
        "a file over a link": [other("l", b"./x", journal), file(b"./x", mode=0o6777)],
        "a file over a hard link to a link": [
            other("l", b"./x", journal), other("h", b"./y", b"./x"), file(b"./y", mode=0o6777),
        ],
        "a pipe over a link": [other("l", b"./x", journal), other("p", b"./x")],
        "a device over a link": [other("l", b"./x", journal), other("c", b"./x", rdev=(1, 3))],
        "a hard link to a link, then a directory": [
            link, other("h", b"./y", b"./link"), directory(b"./y/"), file(b"./y/planted"),
        ],
        "a directory that becomes a link": [
            directory(b"./d/"), directory(b"./d/new/"), other("l", b"./d", target), file(b"./d/new/planted"),
        ],
        "a root with a mode": [link, directory(b"./link/")],
        "a name that is too long": [file(b"./" + b"n" * 90), directory(b"./" + b"x" * 90 + b"/")],
    }  # fmt: skip


class TestForged:
    @pytest.mark.parametrize("how", attempts(b"/x"))
    def test_nothing_outside_changes(self, store: Store, area: Path, outside: Outside, how: str) -> None:
        data = store.create("data")
        forged = area / "forged.tar"
        forge.write(forged, attempts(os.fsencode(outside.path))[how])
        try:
            restore(store.volumes(), "data", str(forged))
        except UserError:
            assert os.listdir(data) == []
        outside.check()
        assert sorted(path.name for path in data.parent.iterdir() if path.name != "manifest") == [
            "_data", "spare", "volume.json",
        ]  # fmt: skip

    def test_links_are_kept_as_they_are(self, store: Store, area: Path, outside: Outside) -> None:
        """The chain itself is an ordinary tree."""
        data = store.create("data")
        forge.write(area / "chain.tar", chain(16, os.fsencode(outside.path)))
        restore(store.volumes(), "data", str(area / "chain.tar"))
        assert os.readlink(data / "a") == LONG.decode()
        assert len(os.listdir(data)) == 33

    @pytest.mark.parametrize("length", [300, 1 << 20])
    def test_a_name_that_no_filesystem_holds(self, store: Store, area: Path, length: int) -> None:
        data = store.create("data")
        forge.write(area / "long.tar", [file(b"./" + b"n" * length)])
        with pytest.raises(UserError, match="cannot be made here: file name too long"):
            restore(store.volumes(), "data", str(area / "long.tar"))
        assert os.listdir(data) == []

    def test_an_owner_that_stands_for_none(self, store: Store, area: Path) -> None:
        """chown(2) keeps the owner for -1: root."""
        store.create("data")
        entry, name, data = file(b"./x", mode=0o4755)
        forge.write(area / "owner.tar", [(entry._replace(uid=0xFFFFFFFF), name, data)])
        with pytest.raises(UserError, match="not a user id"):
            restore(store.volumes(), "data", str(area / "owner.tar"))


@pytest.fixture
def restored(area: Path) -> Restored:
    """Restores an archive as uid 1000: the command's output, and the modes of the restored files."""
    user = VolumeUser(area)

    def restore_as_user(members: Sequence[Member]) -> tuple[str, dict[str, int]]:
        assert user("create", "data").returncode == 0
        done = user("restore", "data", "-i", forge.write(area / "b.tar", members))
        data = user.home / "root/volumes/data/_data"
        return done.stderr, {path.name: stat.S_IMODE(path.stat().st_mode) for path in data.iterdir()}

    return restore_as_user


class TestOrdinaryUser:
    def test_no_set_id_file_of_another_s_becomes_his(self, restored: Restored) -> None:
        """Anyone who runs it would act as this user, who only unpacked an archive."""
        entry, name, data = file(b"./mine", mode=0o6755)
        mine = (entry._replace(uid=1000, gid=1000), name, data)
        members = [file(b"./both", mode=0o6755), mine, file(b"./plain", mode=0o755)]
        told, modes = restored(members)
        assert modes == {"both": 0o755, "mine": 0o6755, "plain": 0o755}
        assert "set-id bits of others' files were left out, as of both" in told

    def test_no_device_is_made(self, restored: Restored) -> None:
        told, modes = restored([other("b", b"./disk", rdev=(7, 0))])
        assert "disk is a device file, which only root can make" in told
        assert modes == {}


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def _zeros(size: int, byte: bytes = b"\0") -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        for _ in range(size >> 20):
            yield byte * ((1 << 20) // len(byte))

    return pieces


def _bombs() -> dict[str, tuple[bytes, Callable[[], Iterator[bytes]]]]:
    """Headers and their data: small when compressed."""
    large = 1 << 30
    field = headers._field
    sparse = b"".join(
        headers._record(b"GNU.sparse." + key, value)
        for key, value in {
            b"major": b"1", b"minor": b"0", b"name": b"./x", b"realsize": b"1000000000",
        }.items()
    )  # fmt: skip
    map_header = headers._pax(sparse) + field(b"./x", 0o644, 0, 0, large, 0, b"0", b"", (0, 0))
    manifest = headers.special_file(b".unionfs-backup/manifest", large, 0)
    pax = field(b"x", 0o644, 0, 0, 60 << 20, 0, b"x", b"", (0, 0))
    return {
        "records of an extended header": (pax, _zeros(60 << 20, b"8 a=bcd\n")),
        "a map without lines": (map_header, _zeros(large, b"1")),
        "a map with many lines": (map_header + b"16777216\n", _zeros(large, b"0\n")),
        "a manifest without lines": (manifest, _zeros(large)),
        "a huge file name": (field(b"x", 0o644, 0, 0, (1 << 33) - 1, 0, b"x", b"", (0, 0)), _zeros(large)),
    }


class TestBombs:
    @pytest.mark.parametrize("how", _bombs())
    def test_memory_is_bounded(self, store: Store, area: Path, how: str) -> None:
        data = store.create("data")
        (data / "old").touch()
        start = forge.archive([])[:-1024]
        header, rest = _bombs()[how]
        made = zstandard.ZstdCompressor().compressobj()
        with (area / "bomb.zst").open("wb") as out:
            out.write(made.compress(start[: start.rindex(b".unionfs-backup/manifest")] + header))
            for piece in rest():
                out.write(made.compress(piece))
            out.write(made.compress(bytes(1024)) + made.flush())
        assert (area / "bomb.zst").stat().st_size < 4 << 20
        refused(store("restore", "data", "-i", area / "bomb.zst", preexec_fn=_limit), "cannot be trusted")
        assert os.listdir(data) == ["old"]

    def test_a_huge_window(self, store: Store, area: Path) -> None:
        """A frame may require 2 GiB from its reader."""
        store.create("data")
        parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False, compression_level=1)
        made = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        (area / "b.zst").write_bytes(made.compress(forge.archive([])) + made.flush())
        refused(store("restore", "data", "-i", area / "b.zst", preexec_fn=_limit), "cannot be trusted")

    def test_a_gzip_of_gigabytes(self, store: Store, area: Path) -> None:
        store.create("data")
        start = forge.archive([])[:-1024]
        with gzip.open(area / "b.gz", "wb", compresslevel=1) as out:
            out.write(start[: start.rindex(b".unionfs-backup/manifest")])
            out.write(headers.special_file(b".unionfs-backup/deleted", 1 << 30, 0))
            for piece in _zeros(512 << 20)():
                out.write(piece)
        refused(store("restore", "data", "-i", area / "b.gz", preexec_fn=_limit), "cannot be trusted")

    def test_deep_brackets(self, store: Store, area: Path) -> None:
        """The archive's description is JSON, too deep for a recursive parser."""
        store.create("data")
        text = '{"format": 1, "id": "x", "volume": ' + "[" * 100_000 + "]" * 100_000 + "}"
        header = headers.special_file(b".unionfs-backup/info.json", len(text), 0)
        (area / "deep.tar").write_bytes(header + text.encode() + bytes(-len(text) % 512 + 1024))
        refused(store("restore", "data", "-i", area / "deep.tar"), "malformed")

    def test_a_file_with_too_many_holes_is_kept_without(
        self, area: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every written archive is readable: the writer has the reader's limit."""
        monkeypatch.setattr(walk, "MOST_SEGMENTS", 4)
        with (area / "holes").open("wb") as out:
            for number in range(8):
                out.seek(number << 17)
                out.write(b"x" * 4096)
        fd = os.open(area / "holes", os.O_RDONLY)
        size = os.fstat(fd).st_size
        assert walk.data_segments(fd, size) == [(0, size)]
        os.close(fd)
        assert entry.MOST_SEGMENTS == 1 << 20


class TestBackups:
    def test_a_sparse_file_that_changes_its_size_ends_the_loop(self, store: Store, area: Path) -> None:
        """CVE-2018-20482: GNU tar read the end of such a file for ever."""
        data = store.create("data")
        pool = area / "pool"
        pool.mkdir()
        os.chown(pool, 1000, 1000)
        (pool / "sparse").touch()
        os.chown(pool / "sparse", 1000, 1000)
        with meanwhile(resize_file, area / "stop", pool / "sparse"):
            assert wait_for(lambda: (pool / "sparse").stat().st_size > 0)
            pool.rename(data / "pool")
            for _ in range(10):
                done = _backup(store, area / "b.tar")
                assert done.returncode == 0, done.stderr
                store.ok("verify", area / "b.tar")

    def test_modes_whatever_the_umask(self, store: Store, area: Path) -> None:
        """An archive contains private content; tar(1) leaves the mode to the umask."""
        (store.create("data") / "secret").touch(mode=0o600)
        for umask in (0, 0o077):
            old = os.umask(umask)
            try:
                store.ok("backup", "data", "-o", area / "b.tar")
            finally:
                os.umask(old)
            assert stat.S_IMODE((area / "b.tar").stat().st_mode) == 0o600
            (area / "b.tar").chmod(0o644)
        assert stat.S_IMODE((store.root / "volumes/data/manifest").stat().st_mode) == 0o600
        assert "./secret" in trees.tar("-tf", area / "b.tar")

    def test_no_symlink_of_another_s_is_written_through(
        self, store: Store, area: Path, outside: Outside, user: Worker
    ) -> None:
        """In a directory such as /tmp, whether the kernel has that rule (fs.protected_symlinks) or not."""
        (store.create("data") / "file").touch()
        shared = area / "shared"
        shared.mkdir()
        shared.chmod(0o1777)
        for name, target in {"one": outside.path / "journal", "two": outside.path / "planted"}.items():
            user.call(os.symlink, str(target), str(shared / name))
            refused(store("backup", "data", "-o", shared / name), "symlink of another user's")
        outside.check()
        (area / "link").symlink_to(area / "real")
        (area / "real").touch()
        store.ok("backup", "data", "-o", area / "link")
        assert (area / "link").is_symlink()
        assert (area / "real").stat().st_size > 0


def _backup(store: Store, target: Path) -> subprocess.CompletedProcess[str]:
    """Run it in a process that can be killed if it hangs."""
    return subprocess.run(
        [sys.executable, "-m", "unionfs", "volume", "backup", "data", "-o", target],
        env={**os.environ, "UNIONFS_ROOT": str(store.root), "PYTHONPATH": str(REPOSITORY)},
        cwd="/", capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
