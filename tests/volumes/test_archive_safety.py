"""Truncated, damaged and forged archives, full disks, killed processes and concurrent operations: the volume
is unchanged, nothing is written outside it, and no incomplete file has the final name."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.mount.cli_calls import UNIONFS, refused, wait_for
from tests.support import acl
from tests.volumes import forge, trees
from tests.volumes.conftest import Store
from tests.volumes.forge import Member, directory, file, other
from unionfs.errors import UserError
from unionfs.storage import backup
from unionfs.storage.archive import entry as entries
from unionfs.storage.archive import headers, manifest
from unionfs.storage.archive.entry import Entry, SparseDigest
from unionfs.storage.restore import restore

pytestmark = pytest.mark.usefixtures("as_root")


def forged(outside: bytes) -> dict[str, Sequence[Member]]:
    """Archives that try to create the file `outside` (an absolute path) or another one outside the volume."""
    above, name = os.path.split(outside)
    return {
        "dot dot": [file(b"./../escaped")],
        "dot dot inside": [directory(b"./d/"), file(b"./d/../../escaped")],
        "dot dot at the end": [directory(b"./..")],
        "dot": [directory(b"./d/"), file(b"./d/./x")],
        "empty part": [directory(b"./d/"), file(b"./d//x")],
        "absolute": [file(outside)],
        "absolute after dot": [file(b"./" + outside)],
        "without dot": [file(b"escaped")],
        "archive's own name": [file(b".unionfs-backup/escaped")],
        "through a symlink": [other("l", b"./link", above), file(b"./link/" + name)],
        "through a relative symlink": [other("l", b"./link", b"../.."), file(b"./link/escaped")],
        "through a symlink deep": [
            directory(b"./a/"),
            other("l", b"./a/link", b"../.."),
            directory(b"./a/link/b/"),
        ],
        "symlink over a directory": [
            directory(b"./a/"),
            file(b"./a/x"),
            other("l", b"./a", above),
            file(b"./a/" + name),
        ],
        "hard link outside": [other("h", b"./x", b"./../../../../volume.json")],
        "hard link absolute": [other("h", b"./x", b"/etc/passwd")],
        "hard link without dot": [other("h", b"./x", b"volume.json")],
        "hard link through a symlink": [other("l", b"./link", b"/etc"), other("h", b"./x", b"./link/passwd")],
        "hard link to a directory": [directory(b"./d/"), other("h", b"./x", b"./d")],
        "hard link to the root": [other("h", b"./x", b"./")],
        "hard link to itself": [other("h", b"./x", b"./x")],
        "hard link to nothing": [other("h", b"./x", b"./y")],
        "below a file": [file(b"./f"), file(b"./f/x")],
        "below nothing": [file(b"./d/x")],
        "below a pipe": [other("p", b"./p"), file(b"./p/x")],
        "root as a file": [file(b"./")],
        "directory without slash": [other("d", b"./d")],
        "empty symlink": [other("l", b"./x", b"")],
    }


def _outside(store: Store) -> bytes:
    """A missing path, unique to this test."""
    return os.fsencode(store.root.parent / "outside")


def _volume(store: Store) -> tuple[Path, dict[bytes, dict[str, object]]]:
    data = store.create("data")
    (data / "old").write_text("old content")
    (data / "dir").mkdir()
    return data, trees.value(data)


def _is_untouched(store: Store, before: object) -> None:
    assert trees.value(store.data("data")) == before
    assert sorted(os.listdir(store.data("data").parent)) == ["_data", "spare", "volume.json"]
    assert not os.path.lexists(_outside(store))


def _restore(store: Store, archive: Path) -> str:
    """Restore in this process, to be fast; returns the sentence of the refusal."""
    with pytest.raises(UserError) as caught:
        restore(store.volumes(), "data", str(archive))
    return str(caught.value)


class TestForged:
    @pytest.mark.parametrize("how", forged(b"/x"))
    def test_archives_that_point_outside_are_refused(self, store: Store, area: Path, how: str) -> None:
        _, before = _volume(store)
        sentence = _restore(store, forge.write(area / "forged.tar", forged(_outside(store))[how]))
        assert "cannot be trusted" in sentence, sentence
        assert "forged.tar" in sentence
        _is_untouched(store, before)
        assert not list(area.rglob("escaped"))

    def test_by_the_command_line_it_is_one_sentence(self, store: Store, area: Path) -> None:
        _, before = _volume(store)
        archive = forge.write(area / "forged.tar", forged(_outside(store))["through a symlink"])
        refused(
            store("restore", "data", "-i", archive),
            "cannot be trusted",
            "lies below link, which is not a directory",
        )
        _is_untouched(store, before)

    def test_the_forger_s_tools_make_good_archives_too(self, store: Store, area: Path) -> None:
        data, _ = _volume(store)
        members = [
            directory(b"./d/"),
            file(b"./d/x"),
            other("l", b"./l", b"/etc"),
            other("h", b"./h", b"./d/x"),
        ]
        restore(store.volumes(), "data", str(forge.write(area / "good.tar", members)))
        assert (data / "h").read_text() == "forged\n"
        assert os.readlink(data / "l") == "/etc"  # a symlink may lead anywhere: no write goes through it

    @pytest.mark.parametrize(
        ("info", "words"),
        [
            ({"format": 2}, "newer unionfs"),
            ({"format": "x"}, "newer"),
            ({"id": 7}, "malformed"),
            ({"base": {"id": "x", "file": "../../../etc/passwd", "started": 1}}, "is not beside it"),
            ({"base": {"id": "forged", "file": "forged.tar", "started": 1}}, "itself as its base"),
            ({"base": 7}, "malformed"),
            ({"base": {}}, "malformed"),
        ],
    )
    def test_what_it_says_of_itself(
        self, store: Store, area: Path, info: dict[str, object], words: str
    ) -> None:
        _, before = _volume(store)
        assert words in _restore(store, forge.write(area / "forged.tar", [], info=info))
        _is_untouched(store, before)

    def test_other_archives_are_not_taken(self, store: Store, area: Path) -> None:
        _, before = _volume(store)
        trees.tar("-C", store.data("data"), "-cf", area / "plain.tar", ".")
        trees.tar("-C", store.data("data"), "-czf", area / "plain.tar.gz", ".")
        (area / "empty").touch()
        (area / "text").write_text("hello" * 1000)
        (area / "zeros").write_bytes(bytes(10240))
        (area / "zstd").write_bytes(b"\x28\xb5\x2f\xfd" + os.urandom(100))
        for name in ("plain.tar", "plain.tar.gz", "empty", "text", "zeros", "zstd"):
            assert "cannot be trusted" in _restore(store, area / name), name
        assert "directory" in _restore(store, area)
        assert "no such file" in _restore(store, area / "none")
        _is_untouched(store, before)

    def test_headers_that_ask_for_too_much(self, store: Store, area: Path) -> None:
        _, before = _volume(store)
        start = forge.archive([])[:-1024]
        start = start[: start.rindex(b".unionfs-backup/manifest")]
        huge = 0o77777777777
        field = headers._field
        members = {
            "pax": field(b"x", 0o644, 0, 0, huge, 0, b"x", b"", (0, 0)),
            "size": field(b"./x", 0o644, 0, 0, huge, 0, b"0", b"", (0, 0)) + bytes(1000),
            "type": field(b"./x", 0o644, 0, 0, 0, 0, b"L", b"", (0, 0)),
            "contiguous": field(b"./x", 0o644, 0, 0, 0, 0, b"7", b"", (0, 0)),
            "global": field(b"./x", 0o644, 0, 0, 0, 0, b"g", b"", (0, 0)),
            "data of a directory": field(b"./x/", 0o755, 0, 0, 512, 0, b"5", b"", (0, 0)) + bytes(512),
            "two pax": headers._pax(b"")
            + headers._pax(b"")
            + field(b"./x", 0, 0, 0, 0, 0, b"0", b"", (0, 0)),
            "record": headers._pax(b"99999999999999999999 a=b\n"),
            "record without end": headers._pax(b"12 mtime=123"),
            "unknown record": headers._pax(b"9 abc=de\n") + field(b"./x", 0, 0, 0, 0, 0, b"0", b"", (0, 0)),
            "map": _sparse(b"99999999\n"),
            "map words": _sparse(b"x\n1\n"),
            "map outside": _sparse(b"1\n5\n900\n"),
            "map backwards": _sparse(b"2\n5\n1\n0\n1\n"),
            "map without data": _sparse(b"1\n0\n9\n"),
        }
        for name, data in members.items():
            (area / "forged.tar").write_bytes(start + data)
            assert "cannot be trusted" in _restore(store, area / "forged.tar"), name
        _is_untouched(store, before)

    def test_a_bomb_of_zeros_takes_no_memory(self, store: Store, area: Path) -> None:
        import zstandard

        _, before = _volume(store)
        start = forge.archive([])[:-1024]
        start = start[: start.rindex(b".unionfs-backup/manifest")]
        start += headers.special_file(b"./x", 1 << 33, 0)
        made = zstandard.ZstdCompressor().compressobj()
        with (area / "bomb.zst").open("wb") as out:
            out.write(made.compress(start))
            for _ in range(2048):
                out.write(made.compress(bytes(1 << 20)))
            out.write(made.flush())
        assert (area / "bomb.zst").stat().st_size < 1 << 20

        def limit() -> None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

        refused(
            store("restore", "data", "-i", area / "bomb.zst", "--verify-only", preexec_fn=limit), "cut off"
        )
        _is_untouched(store, before)

    def test_deletions_stay_inside(self, store: Store, area: Path) -> None:
        _, before = _volume(store)
        store.ok("backup", "data", "-o", area / "a.tar")
        store.ok("backup", "data", "-o", area / "b.tar", "--since", area / "a.tar")
        store.data("data").parent.joinpath("manifest").unlink()
        whole = (area / "b.tar").read_bytes()
        for path in (b"../../../../x", b".", b"/etc/passwd", b"dir/../../x"):
            (area / "forged.tar").write_bytes(_with_deletion(whole, path))
            assert "cannot be trusted" in _restore(store, area / "forged.tar")
            _is_untouched(store, before)


def _sparse(text: bytes) -> bytes:
    """A sparse file's member of 1000 bytes with this map."""
    records = (
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n23 GNU.sparse.name=./x\n29 GNU.sparse.realsize=1000\n"
    )
    field = headers._field(b"./x", 0o644, 0, 0, 512, 0, b"0", b"", (0, 0))
    return headers._pax(records) + field + text.ljust(512, b"\0")


def _with_deletion(whole: bytes, path: bytes) -> bytes:
    """An incremental archive with another list of deletions, and a manifest that agrees."""
    import io

    at = whole.index(b".unionfs-backup/deleted")
    listed = path + b"\n"
    deleted = headers.special_file(b".unionfs-backup/deleted", len(listed), 0) + listed.ljust(512, b"\0")
    lines = io.BytesIO()
    made = manifest.ManifestWriter(lines)
    old = whole[whole.index(manifest.FIRST_LINE) :].split(b"\nend ")[0].split(b"\n")[1:]
    for line in old:
        made.add(
            manifest.member_line(b"deleted", entries.digest_of(listed))
            if line.startswith(b"deleted ")
            else line + b"\n"
        )
    made.finish()
    text = lines.getvalue()
    return (
        whole[:at]
        + deleted
        + headers.special_file(b".unionfs-backup/manifest", len(text), 0)
        + text
        + bytes(-len(text) % 512 + 1024)
    )


class TestDamaged:
    @pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.zst"])
    def test_archives_that_are_cut_off_are_refused(self, store: Store, area: Path, ending: str) -> None:
        data, _ = _volume(store)
        trees.fill(data / "dir")
        before = trees.value(data)
        archive = area / f"whole{ending}"
        store.ok("backup", "data", "-o", archive)
        store.data("data").parent.joinpath("manifest").unlink()
        whole = archive.read_bytes()
        random.seed(5)
        cuts = {1, 10, 511, 512, 1536, len(whole) - 1025, len(whole) // 2, len(whole) - 520}
        cuts |= {random.randrange(len(whole) - 1024) for _ in range(12)}
        if ending == ".tar":
            cuts |= {len(whole) - 512, len(whole) - 1024, len(whole) - 1}
        for cut in sorted(cuts):
            (area / "cut").write_bytes(whole[:cut])
            assert "cannot be trusted" in _restore(store, area / "cut"), cut
            with pytest.raises(UserError, match="cannot be trusted"):
                backup.verify_archive(str(area / "cut"))
        for more in (b"x", os.urandom(2000), whole):
            (area / "cut").write_bytes(whole + more)
            assert "cannot be trusted" in _restore(store, area / "cut")
        _is_untouched(store, before)

    def test_no_bit_can_change_unnoticed(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").write_text("content" * 200)
        os.symlink("target", data / "link")
        os.setxattr(data / "file", "user.a", b"b")
        os.mknod(data / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with (data / "sparse").open("wb") as hole:
            hole.truncate(1 << 20)
            hole.write(b"start")
        os.setxattr(data / "sparse", acl.ACCESS, acl.simple(6, 4, 0, users={1000: 6}))
        before = trees.value(data)
        store.ok("backup", "data", "-o", area / "whole.tar")
        store.data("data").parent.joinpath("manifest").unlink()
        whole = (area / "whole.tar").read_bytes()
        random.seed(7)
        unnoticed = []
        places = {random.randrange(len(whole)) for _ in range(1500)}
        for at in sorted(places):
            changed = bytearray(whole)
            changed[at] ^= 1 << random.randrange(8)
            (area / "changed.tar").write_bytes(changed)
            try:
                backup.verify_archive(str(area / "changed.tar"))
                unnoticed.append(at)
            except UserError:
                pass
        assert unnoticed == []
        for at in random.sample(sorted(places), 40):
            changed = bytearray(whole)
            changed[at] ^= 1
            (area / "changed.tar").write_bytes(changed)
            assert "volume" not in _restore(store, area / "changed.tar").split()[:1]
        _is_untouched(store, before)


class TestFullDisks:
    def test_in_the_middle_of_a_backup(self, store: Store, filesystem: Callable[..., Path]) -> None:
        data = store.create("data")
        small = filesystem("tmpfs", 4 << 20)
        (data / "file").write_bytes(os.urandom(1 << 20))
        store.ok("backup", "data", "-o", small / "b.tar.zst")
        good = (small / "b.tar.zst").read_bytes()
        (data / "more").write_bytes(os.urandom(8 << 20))
        for name in ("b.tar.zst", "other.tar", "third.tar.gz"):
            refused(
                store("backup", "data", "-o", small / name), "no space left", name,
                "the incomplete file was removed",
            )
        assert [path.name for path in small.iterdir()] == ["b.tar.zst"]
        assert (small / "b.tar.zst").read_bytes() == good
        assert (
            os.statvfs(small).f_bavail * os.statvfs(small).f_frsize > 2 << 20
        )  # no nameless file is left either

    @pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
    def test_in_the_middle_of_a_restore(self, filesystem: Callable[..., Path], area: Path, kind: str) -> None:
        big = Store(area / "big")
        (big.create("data") / "file").write_bytes(os.urandom(60 << 20))
        for number in range(50):
            (big.data("data") / f"more {number}").write_bytes(os.urandom(10_000))
        big.ok("backup", "data", "-o", area / "b.tar.zst")
        store = Store(filesystem(kind, 48 << 20) / "root")
        _, before = _volume(store)
        message = refused(
            store("restore", "data", "-i", area / "b.tar.zst"), "data cannot be restored", "no space left"
        )
        assert "its content is as it was" in message
        _is_untouched(store, before)

    def test_in_a_volume_with_a_size(self, store: Store, area: Path) -> None:
        (store.create("big") / "file").write_bytes(os.urandom(30 << 20))
        store.ok("backup", "big", "-o", area / "b.tar")
        store.create("-o", "size=16m", "data")
        with store.volumes().used("data", "test") as path:
            (Path(path) / "old").write_text("old")
        refused(store("restore", "data", "-i", area / "b.tar"), "no space left")
        with store.volumes().used("data", "test") as path:
            assert os.listdir(path) == ["old"]
        assert sorted(os.listdir(store.root / "volumes/data")) == ["_data", "image", "spare", "volume.json"]


def _start(store: Store, *arguments: str | Path, **named: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*UNIONFS, "volume", *map(str, arguments)],
        env={**os.environ, "UNIONFS_ROOT": str(store.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        **named,  # type: ignore[call-overload]
    )


class TestKilled:
    def test_in_the_middle_of_a_backup(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").write_bytes(os.urandom(30 << 20))
        (area / "out").mkdir()
        (area / "out/b.tar.gz").write_text("the one before")
        child = _start(store, "backup", "data", "-o", area / "out/b.tar.gz")
        assert wait_for(lambda: _written(child.pid) > 1 << 20)
        child.kill()
        child.communicate()
        assert [path.name for path in (area / "out").iterdir()] == ["b.tar.gz"]
        assert (area / "out/b.tar.gz").read_text() == "the one before"
        store.ok("backup", "data", "-o", area / "out/b.tar.gz")
        assert store.ok("rm", "data") == "data\n"

    @pytest.mark.parametrize("options", [(), ("-o", "size=100m"), ("-o", "type=none", "-o", "o=bind")])
    @pytest.mark.parametrize("again", [True, False])
    def test_in_the_middle_of_a_restore(
        self, store: Store, area: Path, options: tuple[str, ...], again: bool
    ) -> None:
        source = store.create("source")
        for number in range(30):
            (source / f"file {number}").write_bytes(os.urandom(1 << 20))
        store.ok("backup", "source", "-o", area / "b.tar")
        whole = (area / "b.tar").read_bytes()
        if "type=none" in options:
            (area / "bound").mkdir()
            options = (*options, "-o", f"device={area}/bound")
        store.create(*options, "data")
        with store.volumes().used("data", "test") as path:
            (Path(path) / "old").write_text("old")
        child = _start(store, "restore", "data", stdin=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.write(whole[: len(whole) // 2])
        child.stdin.flush()
        # Half of it is there, and the reader waits for the other half.
        assert wait_for(lambda: _read(child.pid) > len(whole) // 3)
        refused(store("rm", "data"), "busy with a restore", f"pid {child.pid}")
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if not again:
            store.ok("rm", "data")
            assert sorted(os.listdir(store.root / "volumes")) == ["source"]
            return
        with store.volumes().used("data", "test") as path:
            assert [name for name in os.listdir(path) if not name.startswith(".")] == ["old"]
        assert store.ok("restore", "data", "-i", area / "b.tar") == "data\n"
        with store.volumes().used("data", "test") as path:
            assert len(os.listdir(path)) == 30
        assert not [name for name in os.listdir(store.root / "volumes/data") if name.startswith(".")]
        store.ok("rm", "data")


def _io(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _written(pid: int) -> int:
    return _io(pid, "wchar")


def _read(pid: int) -> int:
    return _io(pid, "rchar")


class TestAtOnce:
    def test_a_lock_whose_file_is_replaced(
        self, store: Store, area: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between open and lock it is removed with its volume, and the next one's is taken at once."""
        store.create("data")
        lock, taken = fcntl.flock, []

        def replaced(fd: int, operation: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.endswith("/data.work") and not taken:
                os.unlink(path)
                taken.append(os.open(path, os.O_RDWR | os.O_CREAT))
                lock(taken[0], fcntl.LOCK_EX)
            lock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", replaced)
        refused(store("backup", "data", "-o", area / "b.tar"), "is busy with another operation")
        os.close(taken[0])
        store.ok("backup", "data", "-o", area / "b.tar")

    def test_two_backups_or_a_backup_and_a_removal(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").write_bytes(os.urandom(4 << 20))
        child = _start(store, "backup", "data", "--compress", "none", "-o", "-")
        assert child.stdout is not None
        assert child.stdout.read(1 << 20)  # it has started, and waits for its reader
        try:
            busy = f"busy with a backup (pid {child.pid})"
            refused(store("backup", "data", "-o", area / "b.tar"), busy)
            refused(store("rm", "data"), busy)
            refused(store("rm", "-f", "data"), busy)
            refused(store("restore", "data", "-i", area / "b.tar"), busy)
            refused(store("clone", "data", "copy"), busy)
            done = store("prune", "-a", "-f")
            assert "data" not in done.stdout
            with store.volumes().used("data", "test"):  # it may be used
                pass
        finally:
            rest = child.stdout.read()
            assert child.wait() == 0
        assert not (area / "b.tar").exists()
        assert rest.endswith(bytes(1024))
        store.ok("rm", "data")

    def test_a_user_who_comes_during_a_restore_keeps_the_old(self, store: Store, area: Path) -> None:
        data, before = _volume(store)
        (store.create("source") / "new").write_bytes(os.urandom(4 << 20))
        store.ok("backup", "source", "-o", area / "b.tar")
        whole = (area / "b.tar").read_bytes()
        child = subprocess.Popen(
            [*UNIONFS, "volume", "restore", "data"],
            env={**os.environ, "UNIONFS_ROOT": str(store.root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdin is not None
        child.stdin.write(whole[: 2 << 20])
        child.stdin.flush()
        assert wait_for(lambda: _read(child.pid) > 1 << 20)
        with store.volumes().used("data", "test"):
            _, err = child.communicate(whole[2 << 20 :])
            assert child.returncode == 1
            assert b"in use by a test" in err
            assert trees.value(data) == before
        _is_untouched(store, before)


class TestSparseDigest:
    def test_it_does_not_depend_on_how_holes_are_recorded(self) -> None:
        random.seed(1)
        for _ in range(200):
            size = random.randrange(1, 60_000)
            content = bytearray(size)
            for _ in range(random.randrange(5)):
                at = random.randrange(size)
                content[at : at + 5000] = os.urandom(len(content[at : at + 5000]))
            digests = set()
            for _ in range(4):
                digest, at = SparseDigest(), 0
                while at < size:
                    length = random.randrange(1, 20_000)
                    piece = bytes(content[at : at + length])
                    if piece.strip(b"\0") or random.random() < 0.5:
                        digest.update(at, piece)
                    at += length
                digests.add(digest.hexdigest(size))
            assert len(digests) == 1

    def test_it_depends_on_content_place_and_size(self) -> None:
        def of(offset: int, data: bytes, size: int) -> str:
            digest = SparseDigest()
            digest.update(offset, data)
            return digest.hexdigest(size)

        block = b"x" * 4096
        assert (
            len({of(0, block, 8192), of(4096, block, 8192), of(0, block, 8193), of(0, b"y" * 4096, 8192)})
            == 4
        )
        assert of(1, b"x", 9) != of(2, b"x", 9)


def test_fast_headers_are_those_of_the_general_way() -> None:
    plain = headers.PlainFiles()
    random.seed(3)
    for _ in range(500):
        path = bytes(random.choice(b"abc/\xff\n") for _ in range(random.randrange(1, 97)))
        made = Entry(
            path,
            "f",
            random.randrange(0o10000),
            random.randrange(3_000_000),
            random.randrange(3_000_000),
            random.randrange(262_144),
            random.randrange(10**18, 2 * 10**18),
        )
        fast = plain.encode(path, made.mode, made.uid, made.gid, made.size, made.mtime)
        if fast is not None:
            assert fast == headers.encode(made, made.size)
        else:
            assert made.uid > 0o7777777 or made.gid > 0o7777777 or len(path) > 98 or made.mtime % 10**9 == 0
