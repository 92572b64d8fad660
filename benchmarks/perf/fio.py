"""The throughput jobs, run by fio.

Files are used as by ordinary programs: no fadvise or madvise, and fio does not drop their pages first
(`invalidate=0`), which would make every read a cold one. Writes end with fsync, which counts: else a write
that only reached the page cache would look as good as one that reached the layer. Buffers are aligned to
pages, as those of cat, cp and dd are: copying from the page cache into others was four times slower. Several
jobs are threads, each with its own part of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from benchmarks.perf.processes import CommandFailed, run

_GLOBAL = [
    "--output-format=json", "--thread", "--invalidate=0", "--fadvise_hint=0", "--gtod_reduce=1",
    "--fallocate=none", "--iomem_align=4096", "--random_generator=tausworthe64", "--group_reporting",
    # else fio first calibrates the CPU's clock
    "--clocksource=clock_gettime", "--eta=never", "--disk_util=0",
]  # fmt: skip
#: An engine's name here, and its fio options. One request at once, except io_uring.
_ENGINES = {
    "psync": ["--ioengine=psync"],
    "uring": ["--ioengine=io_uring", "--iodepth=8"],
    "mmap": ["--ioengine=mmap"],
    "direct": ["--ioengine=psync", "--direct=1"],
}
_PATTERNS = {"seqread": "read", "randread": "randread", "seqwrite": "write", "randwrite": "randwrite"}
_BLOCKS = ("4k", "128k", "1m")
_JOBS = (1, 4)
#: lower: only read; upper: existed before the mount; copied-up: a lower's, changed once; new: created in it
LAYERS = ("lower", "upper", "copied-up", "new")


@dataclass(frozen=True)
class Kind:
    """One pattern of access, to one kind of file."""

    layer: str
    pattern: str
    block: str
    engine: str = "psync"
    jobs: int = 1
    fsync: bool = False
    """After each write."""

    @property
    def name(self) -> str:
        """LAYER-PATTERN-BLOCK, and what differs from one job with psync."""
        words = [self.layer, self.pattern, self.block]
        words += [self.engine] if self.engine != "psync" else []
        words += [f"{self.jobs}jobs"] if self.jobs > 1 else []
        return "-".join(words + (["fsync"] if self.fsync else []))

    @property
    def is_write(self) -> bool:
        """Whether it changes the file."""
        return self.pattern.endswith("write")

    @property
    def is_random(self) -> bool:
        """Whether its figure is operations per second; else bytes per second."""
        return self.pattern.startswith("rand") or self.fsync

    @property
    def exists(self) -> bool:
        """Whether the combination is possible."""
        # A written lower file is a copied-up one. A mapping needs a file of full size.
        return not (self.is_write and (self.layer == "lower" or (self.layer, self.engine) == ("new", "mmap")))


def _default() -> tuple[Kind, ...]:
    """One axis at a time, from sequential access by 1 MiB and random access by 4 KiB."""
    read, write = Kind("lower", "seqread", "1m"), Kind("copied-up", "seqwrite", "1m")
    random_read, random_write = Kind("lower", "randread", "4k"), Kind("copied-up", "randwrite", "4k")
    new = Kind("new", "seqwrite", "1m")
    return (
        read, replace(read, engine="mmap"), replace(read, jobs=4),
        random_read, replace(random_read, block="128k"), replace(random_read, engine="uring"),
        replace(random_read, engine="mmap"), replace(random_read, engine="direct"),
        replace(random_read, jobs=4),
        replace(read, layer="upper"), replace(random_read, layer="upper"),
        write, random_write, replace(random_write, engine="mmap"), replace(random_write, engine="direct"),
        replace(random_write, jobs=4), replace(random_write, fsync=True),
        new, replace(new, block="4k"), replace(new, block="4k", fsync=True),
    )  # fmt: skip


def _matrix() -> Iterator[Kind]:
    for layer, pattern, block, engine, jobs in product(LAYERS, _PATTERNS, _BLOCKS, _ENGINES, _JOBS):
        yield Kind(layer, pattern, block, engine, jobs)
    for layer, pattern in product(("copied-up", "new"), ("seqwrite", "randwrite")):
        yield Kind(layer, pattern, "4k", jobs=4, fsync=True)


KINDS = _default()
#: Everything else that can be asked for.
MATRIX = tuple(kind for kind in _matrix() if kind.exists and kind not in KINDS)


@dataclass(frozen=True)
class Measured:
    """MiB/s, or thousands of operations per second, by figure."""

    values: dict[str, float]
    operations: int
    """Requested reads and writes, including the warm-up."""


def measure(file: Path, size: int, kind: Kind, seconds: float) -> Measured:
    """Run the jobs of a kind. `size` of the file is in bytes. Raises CommandFailed.

    Reads: "cold" is one pass over the file, for at most `seconds`; "warm" runs for `seconds` after the whole
    file was read. A new file is written first, so it is never cold. Writes: "write" runs for `seconds`, but
    over a new file only once.
    """
    again = ["--time_based=1"]
    if kind.is_write:
        return _run(file, size, kind, seconds, {"write": [] if kind.layer == "new" else again})
    if kind.layer == "new":
        run(["dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={size >> 20}", "status=none"])
        return _run(file, size, kind, seconds, {"warm": again})
    return _run(file, size, kind, seconds, {"cold": [], _WHOLE: [], "warm": again})


#: The job between cold and warm, which yields no figure.
_WHOLE = "whole"


def _run(file: Path, size: int, kind: Kind, seconds: float, jobs: Mapping[str, list[str]]) -> Measured:
    """All jobs in sequence by one fio, which takes longer to start than the shortest of them."""
    part = size // kind.jobs
    wanted = [
        f"--size={part}", f"--numjobs={kind.jobs}", f"--offset_increment={part}",
        f"--rw={_PATTERNS[kind.pattern]}", f"--bs={kind.block}", *_ENGINES[kind.engine],
        f"--runtime={int(seconds * 1000)}ms", *(["--fsync=1"] if kind.fsync else []),
    ]  # fmt: skip
    whole = [f"--size={size}", "--rw=read", "--bs=1m", "--ioengine=psync"]
    command = ["fio", *_GLOBAL, f"--filename={file}", "--end_fsync=1" if kind.is_write else "--readonly"]
    for name, words in jobs.items():
        command += [f"--name={name}", "--stonewall", *(whole if name == _WHOLE else wanted), *words]
    done = run(command)
    # messages may precede the report
    values, operations = {}, 0
    for job in json.loads(done.output[done.output.index("{") :])["jobs"]:
        if job["error"]:
            raise CommandFailed(f"fio: error {job['error']}")
        told = job["write" if kind.is_write else "read"]
        operations += int(told["total_ios"])
        values[job["jobname"]] = (
            float(told["iops"]) / 1e3 if kind.is_random else float(told["bw_bytes"]) / (1 << 20)
        )
    values.pop(_WHOLE, None)
    return Measured(values, operations)
