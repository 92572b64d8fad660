"""The throughput jobs, run by fio.

Files are as ordinary programs have them: no fadvise or madvise, and fio does not drop their pages first
(`invalidate=0`), which would make every read a cold one. Writes end with fsync, whose time counts: else a
write that only reached the page cache would look as good as one that reached the layer. Buffers are aligned
to pages, as those of cat, cp and dd are: copying from the page cache into others was four times slower.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.perf.processes import CommandFailed, run

_GLOBAL = [
    "--output-format=json", "--thread", "--numjobs=1", "--invalidate=0", "--fadvise_hint=0",
    "--gtod_reduce=1", "--fallocate=none", "--iomem_align=4096", "--random_generator=tausworthe64",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One pattern of access."""

    name: str
    pattern: str
    block: str
    engine: str = "psync"

    @property
    def is_write(self) -> bool:
        """Whether it changes the file."""
        return "write" in self.pattern

    @property
    def is_random(self) -> bool:
        """Whether its figure is operations a second; else it is bytes a second."""
        return self.pattern.startswith("rand")


KINDS = (
    Kind("seqread", "read", "1M"),
    Kind("randread", "randread", "4k"),
    Kind("mmap-seqread", "read", "1M", "mmap"),
    Kind("mmap-randread", "randread", "4k", "mmap"),
    Kind("seqwrite", "write", "1M"),
    Kind("randwrite", "randwrite", "4k"),
)


def measure(file: Path, size: int, kind: Kind, seconds: float) -> dict[str, float]:
    """MiB/s, or thousands of operations a second for a random pattern, by what was measured.

    `size` of the file is in bytes.

    Reads: "cold" is one pass over the file, or as much of it as `seconds` suffice for; "warm" goes on for
    `seconds` after the whole file was read. Writes: "write" goes on for `seconds`. Raises CommandFailed.
    """
    if kind.is_write:
        return {"write": _job(file, size, kind, seconds, "--time_based=1", "--end_fsync=1")}
    cold = _job(file, size, kind, seconds, "--readonly")
    run(["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"])
    return {"cold": cold, "warm": _job(file, size, kind, seconds, "--readonly", "--time_based=1")}


def _job(file: Path, size: int, kind: Kind, seconds: float, *words: str) -> float:
    command = [
        "fio", *_GLOBAL, f"--filename={file}", f"--size={size}", "--name=job",
        f"--rw={kind.pattern}", f"--bs={kind.block}", f"--ioengine={kind.engine}",
        f"--runtime={int(seconds * 1000)}ms", *words,
    ]  # fmt: skip
    done = run(command)
    # messages may come before the report
    job = json.loads(done.output[done.output.index("{") :])["jobs"][0]
    if job["error"]:
        raise CommandFailed(f"fio: error {job['error']}")
    part = job["write" if kind.is_write else "read"]
    return float(part["iops"]) / 1e3 if kind.is_random else float(part["bw_bytes"]) / (1 << 20)
