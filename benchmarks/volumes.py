"""The cost of volume commands on a storage root with many volumes.

    python benchmarks/volumes.py [--volumes N] [--repeat N] [--directory DIR]

Creates N volumes, a tenth of them in use, and prints milliseconds: listing all (in process, and as the
command), and creating, finding, using and removing one more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from unionfs.storage.model import VolumeUser
from unionfs.storage.volumes import Volumes


def _measured(what: str, repeat: int, *steps: tuple[str, Callable[[Volumes], object]], root: str) -> None:
    """Run the steps `repeat` times, each time as a new process would open the root, and print the medians."""
    times: dict[str, list[float]] = {name: [] for name, _ in steps}
    for _ in range(repeat):
        for name, step in steps:
            started = time.perf_counter()
            step(Volumes(root))
            times[name].append(1000 * (time.perf_counter() - started))
    for name, values in times.items():
        print(f"{what + name:32} {statistics.median(values):8.2f} ms  (worst {max(values):.2f})")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--volumes", type=int, default=1000, metavar="N")
    parser.add_argument("--repeat", type=int, default=20, metavar="N")
    parser.add_argument("--directory", help="the directory of the storage root")
    options = parser.parse_args()
    root = tempfile.mkdtemp(dir=options.directory)
    user = VolumeUser.of_this_process("benchmark")
    try:
        started = time.perf_counter()
        for number in range(options.volumes):
            Volumes(root).create(f"volume{number:05}", labels={"number": str(number)})
            if number % 10 == 0:
                Volumes(root).attach(f"volume{number:05}", user)
        print(f"{options.volumes} volumes created in {time.perf_counter() - started:.1f} s")
        one = f"volume{options.volumes // 2 + 1:05}"
        _measured(
            "", options.repeat,
            ("list with users", lambda volumes: (volumes.all(), volumes.all_users())),
            ("find one", lambda volumes: volumes.get(one)),
            ("create", lambda volumes: volumes.create("another")),
            ("attach", lambda volumes: volumes.attach("another", user)),
            ("detach", lambda volumes: volumes.detach("another", user)),
            ("remove", lambda volumes: volumes.remove("another")),
            root=root,
        )  # fmt: skip
        environment = {**os.environ, "UNIONFS_ROOT": root}
        for words in (("ls", "-q"), ("ls",), ("inspect", one)):
            command = (sys.executable, "-m", "unionfs", "volume", *words)
            run = partial(subprocess.run, command, env=environment, check=True, stdout=subprocess.DEVNULL)
            step = ("", lambda _, run=run: run())
            _measured(f"unionfs volume {' '.join(words)}"[:24], max(3, options.repeat // 4), step, root=root)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
