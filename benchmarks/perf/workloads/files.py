"""The content of files: fio on one large file, and opening many small ones."""

from __future__ import annotations

from benchmarks.perf import fio
from benchmarks.perf.area import Area, filesystem_of
from benchmarks.perf.figures import Figure
from benchmarks.perf.processes import run
from benchmarks.perf.workloads.base import Measured, Turn, Workload, never, one_byte

_QUICK = {
    "lower-seqread-1m", "lower-randread-4k", "copied-up-seqwrite-1m", "copied-up-randwrite-4k",
    "new-seqwrite-4k-fsync",
}  # fmt: skip
_PASSES_MILLISECONDS = 300
_FILES = {"lower": "big", "upper": "upper-big", "copied-up": "big", "new": "new-file"}


def _no_direct(area: Area) -> str | None:
    kind = filesystem_of(area.root)
    if kind in ("tmpfs", "ramfs"):
        return f"there is no direct I/O on {kind}, whose files are the page cache: use --on DIR"
    return None


def _what(kind: fio.Kind) -> str:
    words = [f"fio: {kind.pattern} of {kind.block} by {kind.engine}"]
    words += [f"{kind.jobs} jobs"] if kind.jobs > 1 else []
    words += ["fsync after each"] if kind.fsync else []
    return ", ".join([*words, f"a {kind.layer} file" if kind.layer != "lower" else "a file of the lower"])


def _fio(kind: fio.Kind, group: str) -> Workload:
    unit = "k/s" if kind.is_random else "MiB/s"
    temperatures = ("write",) if kind.is_write else ("warm",) if kind.layer == "new" else ("cold", "warm")
    names = {each: kind.name if kind.is_write else f"{kind.name} {each}" for each in temperatures}

    def measure(turn: Turn) -> Measured:
        file = turn.mount.merged / _FILES[kind.layer]
        if kind.layer == "copied-up":
            run(one_byte(str(file)))
        done = fio.measure(file, turn.sizes.megabytes << 20, kind, turn.seconds)
        return Measured({names[job]: value for job, value in done.values.items()}, done.operations)

    return Workload(
        kind.name, group, _what(kind),
        tuple(Figure(group, each, unit, more_is_better=True) for each in names.values()), measure,
        operation="read or write",
        family=f"{kind.layer}-{kind.pattern}" + ("-fsync" if kind.fsync else ""),
        lower=("big",) if kind.layer in ("lower", "copied-up") else (),
        upper=("big",) if kind.layer == "upper" else (),
        writes=kind.is_write or kind.layer in ("copied-up", "new"), quick=kind.name in _QUICK,
        unless=_no_direct if kind.engine == "direct" else never,
    )  # fmt: skip


def _opens(layer: str) -> Workload:
    name = f"{layer}-open-read-close"

    def measure(turn: Turn) -> Measured:
        directory = turn.mount.merged / ("small" if layer == "lower" else "upper-small")
        count = turn.sizes.small_files
        done = run([str(turn.area.helper()), "read", str(directory), str(count), str(_PASSES_MILLISECONDS)])
        nanoseconds, passes = done.output.split()
        return Measured({name: float(nanoseconds) / 1e3}, (int(passes) + 1) * count)

    return Workload(
        name, "files", f"open, read and close each of many cached small files of the {layer}",
        (Figure("files", name, "µs each"),), measure, operation="open",
        lower=("small",) if layer == "lower" else (), upper=("small",) if layer == "upper" else (),
        writes=False, quick=layer == "lower",
    )  # fmt: skip


def throughput() -> tuple[Workload, ...]:
    """The group fio."""
    return tuple(_fio(kind, "fio") for kind in fio.KINDS)


def matrix() -> tuple[Workload, ...]:
    """All other combinations: the group fio-matrix."""
    return tuple(_fio(kind, "fio-matrix") for kind in fio.MATRIX)


def opens() -> tuple[Workload, ...]:
    """The group files."""
    return (_opens("lower"), _opens("upper"))
