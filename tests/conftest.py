"""Fixtures of all tests: ``session``, ``area``, ``union``, references, and a watchdog against hangs."""

from __future__ import annotations

import functools
import gc
import math
import os
import shlex
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing import util
from pathlib import Path
from typing import Any

import hypothesis
import pytest

pytest.register_assert_rewrite("tests.support")

from tests.support import areas, enclosure, mounting, turns  # noqa: E402
from tests.support import world as worlds  # noqa: E402
from tests.support.mounting import Mount  # noqa: E402
from tests.support.patience import SLOWNESS, patient  # noqa: E402
from tests.support.storage import Storage, storage  # noqa: E402
from tests.support.worker import Worker  # noqa: E402

WATCHDOG_SECONDS = 100.0
"""After this time the daemons of a test are killed, which wakes every request that waits for them."""

# The same examples in every run, so that an unrelated change does not fail; UNIONFS_RANDOM=1 draws others.
hypothesis.settings.register_profile("repeatable", derandomize=os.environ.get("UNIONFS_RANDOM", "0") == "0")
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers of this file, remove what killed runs left, and prepare a place for this run."""
    config.addinivalue_line(
        "markers", "watchdog(seconds): end the test's daemons after this time (default 100)"
    )
    config.addinivalue_line(
        "markers", "thorough: a long run of the oracle; selected by UNIONFS_ORACLE=thorough"
    )
    config.addinivalue_line(
        "markers", "slow_on(session, ...): the test is slow on these sessions"
    )
    config.addinivalue_line(
        "markers", "alone: changes or measures something of the whole machine: no other test runs beside it"
    )
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist shares the place of its run
        areas.sweep()
        # tmp_path stays where pytest keeps those of the last runs.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        stack = ExitStack()
        stack.enter_context(areas.run_directory())
        # After the removal of its directory in there, which has the priority -100.
        util.Finalize(None, stack.close, exitpriority=-200)
    # For uid 0 of a user namespace, which would else use /tmp/unionfs-0; and each worker has other processes.
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="runtime-")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Sequence[Any]) -> None:
    """Start the workers of pytest-xdist in enclosures."""
    for spec in specs:
        if spec.popen and spec.python is None:
            spec.python = shlex.join(enclosure.command())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Half as many again as there are CPUs for `-n auto`, since a third of the time the tests wait."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # pytest-xdist looks there
    return math.ceil(1.5 * len(os.sched_getaffinity(0)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Wait until the test may run; before its timeout starts."""
    with turns.machine(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that run alone come last, since the other workers wait meanwhile.

    On a slow machine every test has more time; pytest-timeout takes the first marker that it finds.
    """
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)
    if SLOWNESS == 1:
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0] if marker else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)


def pytest_collection_finish() -> None:
    """Leave the collected tests, thousands of objects each, out of later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes ``session`` once per session."""
    if "session" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("slow_on")
        slow = marker.args if marker else ()
        sessions = []
        for name in mounting.sessions():
            marks = [pytest.mark.slow] if name in slow else []
            if reason := mounting.session_reason(name):
                marks.append(pytest.mark.skip(reason=reason))
            sessions.append(pytest.param(name, marks=marks))
        metafunc.parametrize("session", sessions, scope="session")


@functools.cache
def _mount_reason() -> str | None:
    if os.geteuid() != 0:
        return "these mounts need root (layers with trusted.* xattrs, other users' files)"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing: run modprobe fuse, or give the container the device"
    return None


@functools.cache
def _overlay_reason() -> str | None:
    return mounting.overlay_reason()


@pytest.fixture
def root() -> None:
    """Skip, with the reason, if the host or the user cannot mount as these tests require."""
    if reason := _mount_reason():
        pytest.skip(reason)


@pytest.fixture
def kernel_overlay(root: None) -> None:
    """Skip, with the reason, if kernel overlayfs cannot be the oracle."""
    if reason := _overlay_reason():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill the daemons of a test that hangs: a wait for FUSE ends only with its process or its daemon."""
    marker = request.node.get_closest_marker("watchdog")
    seconds = patient(float(marker.args[0]) if marker else WATCHDOG_SECONDS)

    def bark() -> None:
        for mount in list(mounting.LIVE):
            mount.kill()

    timer = threading.Timer(seconds, bark)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """A test that leaves signals blocked changes what the later ones of its process see."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, before) - before
    assert not blocked, f"the test left signals blocked: {blocked}"


@pytest.fixture
def area() -> Iterator[Path]:
    """A directory for layers on a filesystem with all features, open to all users; removed after the test."""
    with areas.area() as path:
        yield path
        left = [where for _, where, _ in areas.mounts_below(path)]
    assert not left, f"the test left mounts: {left}"


@pytest.fixture
def filesystem() -> Iterator[Callable[..., Path]]:
    """``filesystem(kind, size)``: a new mounted filesystem (tmpfs, ext4, xfs, btrfs), or a skip."""
    with ExitStack() as stack:

        def make(kind: str, size: int = 256 << 20) -> Path:
            try:
                return stack.enter_context(areas.filesystem(kind, size))
            except areas.Unavailable as reason:
                pytest.skip(str(reason))

        yield make


@pytest.fixture
def union(root: None, area: Path, session: str) -> Iterator[Mount]:
    """A mount with one empty lower, an upper and a work directory."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    with mounting.mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        yield mount


@pytest.fixture
def user() -> Iterator[Worker]:
    """A worker process of uid 1000, gid 1000, with the supplementary group 1001."""
    if os.geteuid() != 0:
        pytest.skip("another identity needs root")
    with Worker(1000, 1000, [1001]) as worker:
        yield worker


@pytest.fixture
def world(kernel_overlay: None, area: Path, session: str) -> Iterator[Callable[..., worlds.World]]:
    """``world(build, ...)``: union, kernel overlayfs and a native directory with the same content."""
    with ExitStack() as stack:

        def make(*builds: worlds.Build, options: tuple[str, ...] = ()) -> worlds.World:
            return stack.enter_context(
                worlds.world(area, session, builds or [worlds.nothing], options=options)
            )

        yield make


@pytest.fixture
def storing(root: None, area: Path, session: str) -> Iterator[Storage]:
    """A storage root and layers, on every session."""
    with storage(area, session) as found:
        yield found


@pytest.fixture
def one(root: None, area: Path) -> Iterator[Storage]:
    """A storage root and layers, if the session makes no difference."""
    with storage(area) as found:
        yield found
