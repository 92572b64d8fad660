"""`unionfs stats` of real mounts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.mount import cli_calls
from tests.mount.cli_calls import (
    REPOSITORY,
    UNIONFS,
    Place,
    gone,
    listed,
    refused,
    session_words,
    succeed,
    unionfs,
    wait_for,
)  # fmt: skip
from tests.mount.user_calls import Host
from tests.support.patience import patient
from unionfs.sys.fds import Owned


def _started(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*UNIONFS, *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
def test_stats(place: Place, session: str) -> None:
    """Totals since the mount; latencies only during measurement."""
    data = os.urandom(300_000)
    (place.lower / "large").write_bytes(data)
    pid = place.mount(*session_words(session))
    assert (place.merged / "large").read_bytes() == data
    with (place.merged / "base").open("a") as base:
        base.write("more")
        os.fsync(base.fileno())
    # The kernel may forget other nodes at any time.
    with Owned(os.open(place.merged / "large", os.O_PATH)), Owned(os.open(place.merged / "base", os.O_PATH)):
        found = listed(unionfs("stats", "--json", "--seconds", "0", place.merged))
    assert (found["mountpoint"], found["pid"], found["seconds"]) == (str(place.merged), pid, 0)
    assert found["session"] == session.partition("-")[0]
    assert all(kind["latency"] is None for kind in found["requests"].values())
    assert found["all_requests"]["total"] == sum(kind["total"] for kind in found["requests"].values())
    counters = {name: counter["total"] for name, counter in found["counters"].items()}
    assert counters["copy_ups"] == 1
    assert counters["copied_bytes"] == len("base\n")
    assert 0 < counters["copy_up_seconds"] < 10
    through = session in ("direct-hybrid", "direct-passthrough")
    if session != "direct-passthrough":
        assert counters["read_bytes"] >= len(data)
    assert counters["written_bytes"] >= (0 if through else len("more"))
    assert found["state"]["passthrough"]["upper"] is through
    assert found["state"]["cache"]["writeback"] is (session == "direct-cached")
    assert found["state"]["nodes"] >= 3
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    assert resident / 2 < found["state"]["resident_bytes"] < resident * 2
    requests = listed(unionfs("inspect", "--json", place.merged))["figures"]["requests"]
    assert {kind: figures for kind, figures in found["requests"].items() if "forget" not in kind} == {
        kind: {"total": count, "per_second": None, "latency": None}
        for kind, count in requests.items()
        if "forget" not in kind
    }


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
def test_latency_of_a_span(place: Place, session: str) -> None:
    place.mount(*session_words(session))
    os.statvfs(place.merged)
    process = _started("stats", "--json", "--seconds", "1.5", place.merged)
    while process.poll() is None:
        os.statvfs(place.merged)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    found = json.loads(output)
    statfs = found["requests"]["statfs"]
    assert 1.5 <= found["seconds"] < 10
    # only requests both read and answered in the interval are measured
    assert abs(statfs["latency"]["count"] - statfs["per_second"] * found["seconds"]) <= 2
    assert 0 < statfs["latency"]["p50_seconds"] <= statfs["latency"]["p99_seconds"] < 10
    mean = statfs["latency"]["mean_seconds"]
    assert mean * 0.9 * statfs["latency"]["count"] < found["seconds"]


def test_latency_has_the_wait_in_a_thread(place: Place) -> None:
    """An fsync that waits for a disk takes as long in the daemon as for its caller, except a little."""
    place.mount("--session", "direct", "--io", "cached")
    with _started("stats", "--json", "--seconds", "2", place.merged) as process:
        slowest = 0.0
        with (place.merged / "new").open("wb") as file:
            while process.poll() is None:
                file.write(os.urandom(1 << 20))
                file.flush()
                began = time.perf_counter()
                os.fsync(file.fileno())
                slowest = max(slowest, time.perf_counter() - began)
        assert process.stdout is not None
        found = json.loads(process.stdout.read())
    assert 0 < found["requests"]["fsync"]["latency"]["p99_seconds"] <= slowest * 1.1


def test_tables(place: Place) -> None:
    place.mount()
    os.statvfs(place.merged)
    text = succeed(unionfs("stats", "--seconds", "0.2", place.merged))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["REQUEST", "REQUESTS", "PER", "SECOND", "P50", "P99"]
    assert ["statfs", "1", "0.0", "-", "-"] in lines
    assert ["mountpoint", str(place.merged)] in lines


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
def test_prometheus(place: Place, session: str) -> None:
    """The second scrape contains the latency of requests after the first, and no counter decreases."""
    place.mount(*session_words(session))
    os.statvfs(place.merged)

    def scrape() -> dict[tuple[str, str, str], float]:
        text = succeed(unionfs("stats", "--prometheus", place.merged))
        return {
            (sample.name, sample.labels.get("kind", ""), sample.labels.get("le", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels["mountpoint"] == str(place.merged)
        }

    first = scrape()
    assert first["unionfs_requests_total", "statfs", ""] == 1
    assert ("unionfs_request_duration_seconds_count", "statfs", "") not in first
    for _ in range(5):
        os.statvfs(place.merged)
    second = scrape()
    assert second["unionfs_requests_total", "statfs", ""] == 6
    assert second["unionfs_request_duration_seconds_count", "statfs", ""] == 5
    assert second["unionfs_request_duration_seconds_bucket", "statfs", "+Inf"] == 5
    assert second["unionfs_request_duration_seconds_sum", "statfs", ""] > 0
    assert all(second[key] >= value for key, value in first.items() if key[0].endswith("_total"))


def test_prometheus_of_an_odd_mountpoint(place: Place) -> None:
    merged = place.root / os.fsdecode(b'm "\\\n\xff')
    merged.mkdir()
    succeed(unionfs("mount", *place.layers, merged))
    try:
        text = succeed(unionfs("stats", "--prometheus", merged))
    finally:
        succeed(unionfs("umount", merged))
    labels = {
        sample.labels["mountpoint"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert labels == {str(place.root) + '/m "\\\n\\xff'}


def test_watch_until_ctrl_c(place: Place) -> None:
    """With --json one line per interval, each separate; Ctrl-C is the normal end."""
    place.mount()
    with _started("stats", "--watch", "--json", "--seconds", "0.2", place.merged) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    assert all(0.15 < line["seconds"] < 5 for line in lines)
    assert lines[0]["time"] < lines[1]["time"] < lines[2]["time"]


def test_watch_ends_with_the_mount(place: Place) -> None:
    place.mount()
    with _started("stats", "--watch", "--seconds", "0.2", place.merged) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("REQUEST")
        succeed(unionfs("umount", place.merged))
        process.stdout.read()
        assert process.wait(10) == 0
        assert process.stderr.read() == f"unionfs: {place.merged} is not mounted any more.\n"


def test_watch_of_a_daemon_that_dies(place: Place) -> None:
    pid = place.mount()
    with _started("stats", "--watch", "--seconds", "0.2", place.merged) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        os.kill(pid, signal.SIGKILL)
        process.stdout.read()
        assert process.wait(10) == 1
        assert f"(pid {pid}) has died; run `unionfs cleanup" in process.stderr.read()


def test_watch_on_a_terminal(place: Place) -> None:
    place.mount()
    terminal, other = os.openpty()
    process = subprocess.Popen(
        [*UNIONFS, "stats", "--watch", "--seconds", "0.2", str(place.merged)],
        stdin=other, stdout=other, stderr=other, cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "100", "LINES": "60"},
    )  # fmt: skip
    os.close(other)
    shown = b""
    try:
        while shown.count(b"PER SECOND") < 4:  # two tables, each shown twice
            shown += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert b"Traceback" not in shown


def test_a_reader_that_has_enough(place: Place) -> None:
    place.mount()
    words = " ".join(UNIONFS)
    done = cli_calls.call(("sh", "-c", f"{words} stats --watch --seconds 0.1 {place.merged} | head -1"))
    assert (done.stdout.split()[:1], done.stderr) == (["REQUEST"], "")


def test_a_daemon_that_does_not_answer(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        refused(unionfs("stats", place.merged), str(place.merged), f"pid {pid}", "does not answer")
        refused(unionfs("stats", "--prometheus", place.merged), "does not answer")
        watching = _started("stats", "--watch", "--json", "--seconds", "0.2", place.merged)
        assert watching.stderr is not None
        assert watching.stdout is not None
        assert "does not answer" in watching.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        assert json.loads(watching.stdout.readline())["pid"] == pid  # it continued
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=patient(10))
        assert watching.returncode == 0
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_is_no_mount(place: Place) -> None:
    refused(unionfs("stats", place.merged), f"{place.merged} is not an active unionfs mount")
    refused(unionfs("stats", place.root / "nowhere"), "is not an active unionfs mount")


def test_a_dead_mount(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    refused(unionfs("stats", place.merged), f"(pid {pid}) has died", f"unionfs cleanup {place.merged}")


def test_anothers_mount(place: Place, host: Host) -> None:
    host.root(*UNIONFS, "mount", *place.layers, place.merged)
    done = host.unionfs("stats", place.merged)
    refused(done, f"{place.merged} is not an active unionfs mount of this user, but one of uid 0", "as root")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--prometheus", "--watch"), "--prometheus"),
        (("--prometheus", "--json"), "--prometheus"),
        (("--watch", "--seconds", "0"), "at least 0.1"),
        (("--seconds", "-1"), "--seconds"),
        (("--seconds", "soon"), "--seconds"),
    ],
)
def test_options_that_cannot_be(place: Place, arguments: tuple[str, ...], part: str) -> None:
    refused(unionfs("stats", *arguments, place.merged), part, "unionfs stats --help")


def test_starts_without_what_only_a_daemon_needs() -> None:
    script = "import unionfs.cli.stats, unionfs.daemon.stats, sys; print({'trio', 'rich'} & set(sys.modules))"
    done = cli_calls.call((sys.executable, "-c", script))
    assert succeed(done) == "set()\n"
