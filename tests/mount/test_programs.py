"""Programs and libraries of the lowers: hybrid passes them through also with an upper.

They are files of more than 64 KiB that begin as ELF files do, whatever their permission bits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.mounting import Mount, command, kernel_mounted, mounted
from tests.support.worker import REPOSITORY
from tests.support.world import World, errno_of

MakeWorld = Callable[..., World]

SMALL = 65_536
ELF = b"\x7fELF"
PROGRAM = ELF + bytes(range(256)) * 400
OTHER = ELF + bytes(reversed(range(256))) * 400
DATA = b"0123456789" * 10_000

FILES = {
    "library": (PROGRAM, 0o644),
    "executable": (PROGRAM, 0o755),
    "unreadable": (PROGRAM, 0o000),
    "just large enough": (PROGRAM[: SMALL + 1], 0o644),
    "small": (PROGRAM[:SMALL], 0o755),
    "script": (b"#!/bin/sh\n" + b"true\n" * 20_000, 0o755),
    "data": (DATA, 0o644),
    "later": (b"\0" + PROGRAM, 0o755),
    "almost": (b"\x7fELG" + PROGRAM[4:], 0o755),
    "short": (ELF[:3], 0o755),
    "empty": (b"", 0o755),
}
PROGRAMS = {"library", "executable", "unreadable", "just large enough"}


@contextlib.contextmanager
def _mount(area: Path, session: str, *options: str) -> Iterator[Mount]:
    for name in ("lower", "upper", "work"):
        (area / name).mkdir(exist_ok=True)
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session,
        options=options,
    ) as mount:  # fmt: skip
        yield mount


@pytest.fixture
def lower(area: Path) -> Path:
    found = area / "lower"
    found.mkdir()
    _build(found)
    return found


def _build(root: Path) -> None:
    for name, (content, mode) in FILES.items():
        (root / name).write_bytes(content)
        (root / name).chmod(mode)
    shutil.copy("/bin/bash", root / "bash")


def _opened_with_backing_file(mount: Mount) -> int:
    return mount.figure("opened_with_backing_file") if mount.session.startswith("direct") else 0


def _passed(mount: Mount) -> set[str]:
    """Those of the files whose open for reading has a backing file."""
    found = set()
    for name, (content, _) in FILES.items():
        before = _opened_with_backing_file(mount)
        assert (mount.mountpoint / name).read_bytes() == content
        if _opened_with_backing_file(mount) > before:
            found.add(name)
    return found


# -- which files ---------------------------------------------------------------------------------------


def test_which_files_are_passed_through(root: None, area: Path, lower: Path, session: str) -> None:
    """And each time that they are opened, until they are copied up."""
    expected = {"direct-hybrid": PROGRAMS, "direct-passthrough": set(FILES)}.get(session, set())
    with _mount(area, session) as mount:
        for _ in range(2):
            assert _passed(mount) == expected
        if session.startswith("direct"):
            assert dc.wait_for(lambda: mount.figure("backing_files") == 0)
            assert mount.figure("backing_files_refused") == 0
            assert mount.figure("backing_files_kept") == (len(PROGRAMS) if session == "direct-hybrid" else 0)


def test_a_program_is_kept_for_its_next_start(root: None, area: Path, lower: Path, session: str) -> None:
    """Until it is copied up, or the lower's file may be another one; a limited number of them."""
    if session != "direct-hybrid":
        pytest.skip("only hybrid keeps them")
    for number in range(300):
        (lower / f"p{number}").write_bytes(PROGRAM[:-1] + bytes([number % 256]))
    with _mount(area, session) as mount:
        top = mount.mountpoint
        empty = dc.descriptors(mount)
        for _ in range(3):
            assert (top / "library").read_bytes() == PROGRAM
        assert dc.wait_for(lambda: mount.figure("backing_files_kept") == 1)
        assert dc.descriptors(mount) <= empty + 2
        (top / "library").chmod(0o600)
        assert (top / "library").read_bytes() == PROGRAM
        (top / "library").write_bytes(OTHER)
        assert (top / "library").read_bytes() == OTHER
        assert mount.figure("backing_files_kept") == 0
        assert (top / "executable").read_bytes() == PROGRAM
        (lower / "new").write_bytes(OTHER)
        os.rename(lower / "new", lower / "executable")
        subprocess.run([*command(), "refresh", str(top)], check=True, cwd=REPOSITORY)
        assert (top / "executable").read_bytes() == OTHER
        for _ in range(2):
            for number in range(300):
                assert (top / f"p{number}").read_bytes()[-1] == number % 256
        assert dc.wait_for(lambda: mount.figure("backing_files") == 0)
        assert mount.figure("backing_files_kept") == 256
        assert dc.descriptors(mount) < empty + 300


def test_watched_lowers_are_not(root: None, area: Path, lower: Path, session: str) -> None:
    with _mount(area, session, "watch_lower") as mount:
        assert bool(_passed(mount)) == (session == "direct-passthrough")


def test_a_stacked_lower_is_not(kernel_overlay: None, area: Path, lower: Path, session: str) -> None:
    """The union could be no lower of another one."""
    (area / "empty").mkdir()
    for name in ("upper", "work"):
        (area / name).mkdir()
    with (
        kernel_mounted(area, lowers=[lower, area / "empty"], name="ground") as ground,
        mounted(
            area, lowers=[ground.mountpoint], upper=area / "upper", work=area / "work", session=session
        ) as mount,
    ):
        assert bool(_passed(mount)) == (session == "direct-passthrough")


def test_a_copy_of_metadata(root: None, area: Path, lower: Path, session: str) -> None:
    """The data of such a file is still the lower's."""
    with _mount(area, session, "metacopy=on") as mount:
        for name in FILES:
            (mount.mountpoint / name).chmod(0o700)
        if session == "direct-hybrid":
            assert _passed(mount) >= PROGRAMS
        assert (area / "upper/library").stat().st_blocks < 10
    assert (lower / "library").stat().st_mode & 0o777 == 0o644


def test_the_daemon_reads_nothing_of_it(root: None, area: Path, lower: Path, session: str) -> None:
    if not dc.passes_through(session):
        pytest.skip("the other ways of I/O read through the daemon")
    with _mount(area, session) as mount:
        assert subprocess.call([mount.mountpoint / "bash", "-c", "exit 3"]) == 3
        assert mount.inspect()["figures"]["requests"].get("read", 0) == 0


def test_why(root: None, area: Path, lower: Path, session: str) -> None:
    if session != "direct-hybrid":
        pytest.skip("only hybrid makes a difference")
    with _mount(area, session) as mount:
        found = mount.inspect()
        assert "programs and libraries" in found["io"]["why"]
        assert found["figures"]["passthrough"] == {"upper": True, "lower": True, "lower_programs_only": True}


# -- programs that run ---------------------------------------------------------------------------------


def _writes(root: Path, program: Path) -> list[int]:
    """The results of all ways to change a program in place."""
    found = [
        errno_of(lambda flags=flags: os.close(os.open(program, flags)))
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_CREAT)
    ]
    found.append(errno_of(os.truncate, program, 100))
    found.append(subprocess.call(["cp", root / "data", program], stderr=subprocess.DEVNULL))
    return found


@contextlib.contextmanager
def _running(program: Path) -> Iterator[None]:
    running = subprocess.Popen([program, "-c", "read x; exit 5"], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        assert running.stdin is not None
        running.stdin.write(b"\n")
        running.stdin.close()
        assert running.wait() == 5


METADATA: dict[str, Callable[[Path], object]] = {
    "nothing": lambda program: None,
    "chmod": lambda program: program.chmod(0o711),
    "chown": lambda program: os.chown(program, 1, 1),
    "utime": lambda program: os.utime(program, (1, 1)),
    "xattr": lambda program: os.setxattr(program, "trusted.x", b"1"),
    "link": lambda program: os.link(program, program.parent / "link"),
}


@pytest.mark.parametrize("change", METADATA)
def test_a_running_program_cannot_be_changed(world: MakeWorld, change: str) -> None:
    """Nor after a change of its metadata, which copies it up, and another start."""
    made = world(_build)

    def calls(root: Path) -> list[object]:
        program = root / "bash"
        found: list[object] = []
        with _running(program):
            found.append(_writes(root, program))
            METADATA[change](program)
            found.append(_writes(root, program))
            found.append(subprocess.call([program, "-c", "exit 3"]))
            found.append(_writes(root, program))
            with _running(program):
                found.append(_writes(root, program))
            found.append(program.read_bytes() == Path("/bin/bash").read_bytes())
        found.append(program.read_bytes() == Path("/bin/bash").read_bytes())
        found.append(_writes(root, program))
        return [*found, program.read_bytes() == DATA]

    made.as_kernel(calls)
    assert (made.lower / "bash").read_bytes() == Path("/bin/bash").read_bytes()


def test_a_running_program_is_replaced(world: MakeWorld) -> None:
    """As package managers do: by a rename over it, or by its removal."""
    made = world(_build)

    def calls(root: Path) -> list[object]:
        program = root / "bash"
        found: list[object] = []
        with _running(program):
            shutil.copy("/bin/sh", root / "new")
            os.rename(root / "new", program)
            found.append(subprocess.call([program, "-c", "exit 4"]))
            found.append(errno_of(lambda: os.close(os.open(program, os.O_RDWR))))
        with _running(program):
            os.unlink(program)
            found.append(errno_of(os.stat, program))
            shutil.copy("/bin/sh", program)
            found.append(subprocess.call([program, "-c", "exit 4"]))
        return found

    made.as_kernel(calls)


def test_what_is_open_for_writing_cannot_be_executed(world: MakeWorld) -> None:
    made = world(_build)

    def calls(root: Path) -> list[object]:
        program = root / "bash"
        with program.open("rb") as reader:  # in passthrough
            with program.open("r+b") as writer:
                found: list[object] = [errno_of(subprocess.call, [program, "-c", "exit 3"])]
                writer.write(b"\x7fELF")
            found.append(subprocess.call([program, "-c", "exit 3"]))
            found.append(reader.read() == Path("/bin/bash").read_bytes())
        return found

    assert made.as_kernel(calls)[0] == errno.ETXTBSY


# -- others that use them ------------------------------------------------------------------------------


def test_a_mapped_library_is_overwritten(world: MakeWorld) -> None:
    """By cp, in place. A mapping keeps the old data, as on overlayfs, unless it is of the page cache."""
    made = world(_build)

    def calls(root: Path) -> list[object]:
        library = root / "library"
        with library.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        with mapped:
            found: list[object] = [mapped[:100] == PROGRAM[:100]]
            (root / "other").write_bytes(OTHER)
            found.append(subprocess.call(["cp", root / "other", library]))
            found.append(library.read_bytes() == OTHER)
            if dc.passes_through(made.mount.session):
                found.append(mapped[:] == PROGRAM)
        return found

    made.as_kernel(calls)


def test_an_open_program_gets_other_metadata(world: MakeWorld) -> None:
    """Its data is the same, so nothing else changes: old and new descriptors are of one inode."""
    made = world(_build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for number, change in enumerate([METADATA["chmod"], METADATA["chown"], METADATA["utime"]]):
            path = root / ["library", "executable", "just large enough"][number]
            with path.open("rb") as old:
                fcntl.flock(old, fcntl.LOCK_SH)
                change(path)
                with path.open("rb") as new, open(f"/proc/self/fd/{old.fileno()}", "rb") as again:
                    found.append(errno_of(fcntl.flock, new, fcntl.LOCK_EX | fcntl.LOCK_NB))
                    found.append(os.path.samestat(os.fstat(old.fileno()), os.fstat(new.fileno())))
                    found += [file.read() == PROGRAM[: os.fstat(old.fileno()).st_size]
                              for file in (old, new, again)]  # fmt: skip
        return found

    made.as_kernel(calls)


@pytest.mark.parametrize("how", ["shorter", "longer", "shorter and longer", "same"])
def test_an_open_program_is_truncated(world: MakeWorld, how: str) -> None:
    """By name, without an open: later opens see it, whatever its size is in the end."""
    made = world(_build)
    size = len(PROGRAM)
    sizes = {"shorter": [100], "longer": [size + 5000], "shorter and longer": [100, size], "same": [size]}

    def calls(root: Path) -> list[object]:
        path = root / "library"
        with path.open("rb") as old:
            st = os.fstat(old.fileno())
            for new in sizes[how]:
                os.truncate(path, new)
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
            with path.open("rb") as reader:
                data = reader.read()
            return [os.fstat(old.fileno()).st_size, data, path.read_bytes() == data]

    made.as_kernel(calls)
    assert (made.lower / "library").read_bytes() == PROGRAM


def test_a_reader_keeps_the_old_program(root: None, area: Path, lower: Path, session: str) -> None:
    """While a writer and later readers see the new one; afterwards nothing is left over."""
    with _mount(area, session) as mount:
        path = mount.mountpoint / "library"
        before = dc.descriptors(mount) if mount.is_ours else 0
        with dc.opened(path) as old, dc.opened(path, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEW", 10)
            with dc.opened(path) as later, dc.opened(f"/proc/self/fd/{writer}") as again:
                for fd in (writer, later, again):
                    assert os.pread(fd, 200_000, 0) == PROGRAM[:10] + b"NEW" + PROGRAM[13:]
            kept = dc.passes_through(session)
            assert os.pread(old, 200_000, 0) == (PROGRAM if kept else PROGRAM[:10] + b"NEW" + PROGRAM[13:])
            assert os.fstat(old).st_ino == os.fstat(writer).st_ino == path.stat().st_ino
        if session.startswith("direct"):
            assert dc.wait_for(lambda: mount.figure("open_files") == 0)
            assert mount.figure("backing_files") == 0
        assert dc.wait_for(lambda: dc.descriptors(mount) <= before + 3)
    assert (lower / "library").read_bytes() == PROGRAM


def test_many_users_at_once(root: None, area: Path, session: str) -> None:
    """First opens of files that are not in memory, writers and changes of metadata: nothing fails, and each
    reader sees the old program or the new one, whole."""
    count = 60
    (area / "lower").mkdir()
    for number in range(count):
        (area / f"lower/p{number}").write_bytes(PROGRAM if number % 3 else DATA)
    wrong: list[object] = []

    def user(seed: int) -> None:
        order = random.Random(seed)
        for number in range(count):
            path = mount.mountpoint / f"p{number}"
            old = PROGRAM if number % 3 else DATA
            try:
                match order.randrange(5):
                    case 0:
                        with path.open("r+b") as file:
                            file.write(OTHER[:4])
                    case 1:
                        path.chmod(0o700 + seed)
                    case _:
                        with dc.opened(path) as fd:
                            found = os.pread(fd, 1 << 20, 0)
                        if found[4:] != old[4:] or found[:4] not in (old[:4], OTHER[:4]):
                            wrong.append((number, len(found)))
            except OSError as error:
                wrong.append((number, error))

    with _mount(area, session) as mount:
        for number in range(count):
            with dc.opened(area / f"lower/p{number}") as fd:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        threads = [threading.Thread(target=user, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        if session.startswith("direct"):
            assert dc.wait_for(lambda: mount.figure("open_files") == 0)
            assert mount.figure("backing_files") == 0
