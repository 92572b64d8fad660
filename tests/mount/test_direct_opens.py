"""Many opens of one file: every one succeeds, and none leaks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mount import direct_calls as dc
from tests.support.mounting import Mount, mounted

FLAGS = {
    "read": os.O_RDONLY,
    "write": os.O_WRONLY,
    "both": os.O_RDWR,
    "append": os.O_WRONLY | os.O_APPEND,
    "truncate": os.O_RDWR | os.O_TRUNC,
    "create": os.O_RDWR | os.O_CREAT,
    "path": os.O_PATH,
}
CONTENT = b"0123456789" * 500
PROGRAM = b"\x7fELF" + b"0123456789" * 8000

# a plan: open in one of these ways, by name or through an fd; read, write or close the n-th open file
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.sampled_from(sorted(FLAGS)), st.integers(0, 3)),
        st.tuples(st.sampled_from(["close", "read", "write", "again"]), st.just(""), st.integers(0, 20)),
    ),
    min_size=3,
    max_size=25,
)


@contextlib.contextmanager
def _mount(area: Path, session: str, files: int, content: bytes = CONTENT) -> Iterator[Mount]:
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    for number in range(files):
        (area / f"lower/f{number}").write_bytes(content)
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        yield mount


def _nothing_left(mount: Mount, before: int, *, slack: int = 3) -> None:
    """No backing file registered, no open file counted, no fd open except the few kept on purpose."""
    if not mount.is_ours:
        return
    assert dc.wait_for(lambda: mount.figure("open_files") == 0), mount.inspect()
    if mount.session.startswith("direct"):
        assert mount.figure("backing_files") == 0
        slack += mount.figure("backing_files_kept")  # of programs, for their next open
    assert dc.wait_for(lambda: dc.descriptors(mount) <= before + slack), (before, dc.descriptors(mount))


def _run(path: Path, model: bytearray, plan: list[tuple[str, str, int]]) -> None:
    """Run the plan on the file; ``model`` is the content it would have on any filesystem."""
    fds: list[int] = []
    try:
        for what, how, number in plan:
            if what == "open":
                fds.append(os.open(path, FLAGS[how], 0o644))
                if how == "truncate":
                    model.clear()
                continue
            if not fds:
                continue
            fd = fds[number % len(fds)]
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if what == "close":
                fds.remove(fd)
                os.close(fd)
            elif what == "again":
                fds.append(os.open(f"/proc/self/fd/{fd}", os.O_RDWR if number % 2 else os.O_RDONLY))
            elif flags & os.O_PATH:
                assert os.fstat(fd).st_size == len(model)
            elif what == "read" and flags & os.O_ACCMODE != os.O_WRONLY:
                assert os.pread(fd, 10_000, 0) == model
            elif what == "write" and flags & os.O_ACCMODE != os.O_RDONLY:
                data = b"w%d" % number
                at = len(model) if flags & os.O_APPEND else number * 7
                os.pwrite(fd, data, at)
                model.extend(bytes(max(0, at + len(data) - len(model))))
                model[at : at + len(data)] = data
            assert os.fstat(fds[-1]).st_size == len(model) if fds else True
    finally:
        for fd in fds:
            os.close(fd)
    assert path.read_bytes() == model


def test_any_order_of_opens(root: None, area: Path, session: str) -> None:
    """Random plans of opens, reads, writes and closes of one lower file; in the second half, of its copy.

    With passthrough a reader of a lower keeps its file: there the file is copied up first.
    """
    with _mount(area, session, 80) as mount:
        before = dc.descriptors(mount) if mount.is_ours else 0
        used = iter(range(80))

        @settings(
            max_examples=60,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(plan=STEPS, second=STEPS)
        def check(plan: list[tuple[str, str, int]], second: list[tuple[str, str, int]]) -> None:
            number = next(used, None)
            path = mount.mountpoint / ("again" if number is None else f"f{number}")
            if number is None:
                path.write_bytes(CONTENT)
            model = bytearray(CONTENT)
            if session == "direct-passthrough":
                path.open("r+b").close()  # lower readers are test_passthrough_keeps_what_a_reader_opened's
            _run(path, model, plan)
            _run(path, model, second)

        check()
        _nothing_left(mount, before, slack=3 if session != "direct-cached" else 90)
        for number in range(80):
            assert (area / f"lower/f{number}").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT, PROGRAM], ids=["data", "program"])
@pytest.mark.parametrize("seed", range(3))
def test_readers_and_writers_of_a_lower_file(
    root: None, area: Path, session: str, seed: int, content: bytes
) -> None:
    """Readers before a writer, writers before readers, closed in any order: never EIO.

    A reader from before the first writer may see old data with --io passthrough and, if it is a program, with
    hybrid, and only there.
    """
    order = random.Random(seed)
    keeps_old = dc.passes_through(session, lower=content == CONTENT)
    with _mount(area, session, 40, content) as mount:
        before = dc.descriptors(mount) if mount.is_ours else 0
        for number in range(40):
            path = mount.mountpoint / f"f{number}"
            early = [os.open(path, os.O_RDONLY) for _ in range(order.randrange(3))]
            fds = []
            written = content
            for _ in range(order.randrange(1, 8)):
                if order.random() < 0.5:
                    fds.append(os.open(path, os.O_RDWR))
                    written = b"W%03d" % len(fds) + written[4:]
                    assert os.pwrite(fds[-1], written[:4], 0) == 4
                else:
                    fds.append(os.open(path, os.O_RDONLY))
                    assert os.pread(fds[-1], 100_000, 0) == written
                if fds and order.random() < 0.2:
                    os.close(fds.pop(order.randrange(len(fds))))
            for fd in early:
                seen = os.pread(fd, 100_000, 0)
                assert seen == written or (keeps_old and seen == content)
            mixed = early + fds
            order.shuffle(mixed)
            for fd in mixed:
                os.pread(fd, 10, 0)
                os.close(fd)
            assert path.read_bytes() == written
        _nothing_left(mount, before, slack=3 if session != "direct-cached" else 45)
        for number in range(40):
            assert (area / f"lower/f{number}").read_bytes() == content


def test_nothing_leaks_after_many_opens(root: None, area: Path, session: str) -> None:
    """20,000 opens and closes, by two threads, of a lower and an upper file in every way."""
    count = 10_000 if session.startswith("direct") else 2_000
    with _mount(area, session, 2) as mount:
        (mount.mountpoint / "own").write_bytes(CONTENT)
        (mount.mountpoint / "f0").open("r+b").close()
        before = dc.descriptors(mount) if mount.is_ours else 0
        failures: list[OSError] = []

        def work(names: list[str]) -> None:
            try:
                for number in range(count):
                    writes = number % 3 == 0 and names[0] != "f1"
                    fd = os.open(mount.mountpoint / names[number % 2], os.O_RDWR if writes else os.O_RDONLY)
                    if number % 50 == 0:
                        assert os.pread(fd, 10, 0) == CONTENT[:10]
                    os.close(fd)
            except OSError as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(names,)) for names in (["own", "f0"], ["f1", "f1"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        _nothing_left(mount, before)
        assert not (area / "upper/f1").exists()


def test_a_crowd_of_open_files(root: None, area: Path, session: str) -> None:
    """500 files open at once, each read-only and read-write, share one backing file each."""
    with _mount(area, session, 250) as mount, dc.many_open_files(2000), contextlib.ExitStack() as stack:
        before = dc.descriptors(mount) if mount.is_ours else 0
        paths = [mount.mountpoint / f"f{number}" for number in range(250)]
        for number in range(250):
            paths.append(mount.mountpoint / f"own{number}")
            paths[-1].write_bytes(CONTENT)
        fds = [
            stack.enter_context(dc.opened(path, flags))
            for path in paths
            for flags in (os.O_RDWR, os.O_RDONLY, os.O_RDONLY)
        ]
        if dc.passes_through(session) and mount.is_ours:
            assert mount.figure("backing_files") == 500
        for fd in fds[::3]:
            os.pwrite(fd, b"crowd", 3)
        assert all(os.pread(fd, 8, 0) == b"012crowd" for fd in fds)
        stack.close()
        _nothing_left(mount, before, slack=3 if session != "direct-cached" else 515)


def test_passthrough_keeps_what_a_reader_opened(root: None, area: Path, session: str) -> None:
    """With --io passthrough: an old reader keeps the lower's data, others see the writer's."""
    if session != "direct-passthrough":
        pytest.skip("the other ways of I/O show an old reader the new data")
    with _mount(area, session, 3) as mount:
        before = dc.descriptors(mount)
        path = mount.mountpoint / "f0"
        with dc.opened(path) as old, dc.opened(path, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEW", 0)
            with dc.opened(path) as later, dc.opened(f"/proc/self/fd/{writer}") as reopened:
                assert os.pread(later, 5, 0) == os.pread(writer, 5, 0) == os.pread(reopened, 5, 0) == b"NEW34"
            assert os.pread(old, 5, 0) == b"01234"
            assert os.fstat(old).st_ino == os.fstat(writer).st_ino == path.stat().st_ino
            with dc.opened(path, os.O_RDWR | os.O_TRUNC) as more:
                os.write(more, b"short")
            assert os.pread(writer, 100, 0) == path.read_bytes() == b"short"
            assert os.pread(old, 10, len(CONTENT) - 10) == CONTENT[-10:]
        assert path.read_bytes() == b"short"
        _nothing_left(mount, before)
    assert (area / "lower/f0").read_bytes() == CONTENT
