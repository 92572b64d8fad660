"""Scale: a large file's copy-up, hundreds of lowers, huge directories, the memory of a huge tree."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.perf.figures import Figure
from benchmarks.perf.parts import NAMES_USED, SHARED_NAMES
from benchmarks.perf.processes import resident_bytes, run
from benchmarks.perf.workloads.base import Measured, Turn, Workload, one_byte, timed


def _mount_time(turn: Turn) -> Measured:
    return Measured({"mount": turn.mount.seconds * 1e3}, 1)


def _names(turn: Turn, what: str, directory: str, *more: int) -> float:
    """Microseconds per name."""
    command = [str(turn.area.helper()), what, str(turn.mount.merged / directory), *map(str, more)]
    return float(run(command).output) / 1e3


def _stack(turn: Turn) -> Measured:
    """Mounting many lowers, then names in each of them, then all of them."""
    count = turn.sizes.lowers
    values: Mapping[str, float] = {
        "stack-mount": turn.mount.seconds * 1e3,
        "stack-lookup": _names(turn, "lookup", ".", count),
        "stack-absent": _names(turn, "absent", ".", count),
    }
    found = run(["find", "."], cwd=turn.mount.merged)
    return Measured({**values, "stack-find": found.seconds * 1e3}, 3 * count + SHARED_NAMES + 2)


def _lookups(turn: Turn) -> Measured:
    step = max(turn.sizes.names // NAMES_USED, 1)
    count = min(turn.sizes.names, NAMES_USED)
    return Measured(
        {
            "names-lookup": _names(turn, "lookup", "names", count, step),
            "names-absent": _names(turn, "absent", "names", count),
        },
        2 * count,
    )


def _additions(turn: Turn) -> Measured:
    return Measured({"names-create": _names(turn, "add", "names", NAMES_USED)}, NAMES_USED)


def _nodes(entries: int) -> Workload:
    growth, duration = "memory an inode", f"find -size, {entries:,} entries"

    def measure(turn: Turn) -> Measured:
        pid = turn.mount.pid
        assert pid is not None
        run(["ls"], cwd=turn.mount.merged)
        before = resident_bytes(pid)
        # A test of the size makes find request every entry's attributes, so each gets a node.
        done = run(["find", "many", "-size", "+9"], cwd=turn.mount.merged)
        grown = resident_bytes(pid) - before
        figures = turn.mount.figures()
        known = entries if figures is None or not figures.nodes else figures.nodes
        return Measured({growth: grown / known, duration: done.seconds * 1e3}, entries)

    return Workload(
        "nodes", "nodes", f"memory of the node table, find over {entries:,} entries; one round",
        (Figure("nodes", growth, "bytes"), Figure("nodes", duration, "ms")), measure,
        lower=("many",), once=True, daemons_only=True, writes=False,
    )  # fmt: skip


def scale(entries: int) -> tuple[Workload, ...]:
    """The groups scale and nodes. `entries`: those of the large tree."""
    return (
        timed("copy-up", "scale", "the first byte written to a large file of the lower",
              lambda turn: one_byte("huge"),
              lambda sizes: 1, lower=("huge",), operation="copy-up", unions_only=True, quick=True),
        Workload("mount", "scale", "from the start of the command to a mount that answers",
                 (Figure("scale", "mount", "ms"),), _mount_time, operation="mount", unions_only=True,
                 quick=True, writes=False),
        Workload("stack", "scale", "500 lowers: mount, names in one and in none of them, find",
                 (Figure("scale", "stack-mount", "ms"), Figure("scale", "stack-lookup", "µs each"),
                  Figure("scale", "stack-absent", "µs each"), Figure("scale", "stack-find", "ms")),
                 _stack, operation="name", stacked=True, quick=True, writes=False),
        timed("names-list", "scale", "list one huge directory", lambda turn: ["ls", "-f", "names"],
              lambda sizes: sizes.names, lower=("names",), lines=lambda sizes: sizes.names + 2,
              operation="name", writes=False, quick=True),
        Workload("names-lookup", "scale", f"look up {NAMES_USED} names in it, and as many absent ones",
                 (Figure("scale", "names-lookup", "µs each"), Figure("scale", "names-absent", "µs each")),
                 _lookups, operation="name", lower=("names",), writes=False),
        Workload("names-create", "scale", f"create {NAMES_USED} files in it",
                 (Figure("scale", "names-create", "µs each"),), _additions, operation="file",
                 lower=("names",), quick=True),
        _nodes(entries),
    )  # fmt: skip
