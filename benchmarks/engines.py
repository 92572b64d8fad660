"""podman on this mount program, on fuse-overlayfs and on kernel overlayfs, in turn; medians in seconds.

    python -m benchmarks.engines [--rounds N] [--steps N]

As root, with podman, buildah, fuse-overlayfs and debootstrap. The image is a small Debian; the container that
is compared, committed and exported has three changes. A build has a layer a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from tests.clients import packages
from tests.clients.engines import KERNEL, OURS, THEIRS, Store
from tests.clients.rooms import room
from tests.support import areas

PROGRAMS = (OURS, THEIRS, KERNEL)
CHANGES = "echo new > /new; rm /etc/issue; chmod 700 /srv"
COMMANDS = {
    "run": ("run", "--rm", "debian", "true"),
    "diff": ("diff", "changed"),
    "commit": ("commit", "-q", "changed", "committed"),
    "export": ("export", "-o", "/dev/null", "changed"),
}


def containerfile(steps: int) -> str:
    """A build of this many steps; each makes, changes and removes files of steps before."""
    lines = ["FROM debian"]
    for step in range(steps):
        before = f"rm -rf /made/{step - 2}; cp -a /made/{step - 1} /made/{step}"
        if step == 0:
            before = "mkdir -p /made/0"
        change = f"cp -a /etc/pam.d /made/{step}/; chmod -R go-w /made/{step}; echo {step} >> /etc/issue"
        lines.append(f"RUN {before}; {change}")
    return "\n".join([*lines, ""])


def measured(store: Store, steps: int) -> dict[str, float]:
    """The seconds of each command, once."""
    took = {}
    for name, words in COMMANDS.items():
        start = time.perf_counter()
        store.podman(*words)
        took[name] = time.perf_counter() - start
    text = containerfile(steps)
    start = time.perf_counter()
    store.build("built", text, "--no-cache")
    took[f"build of {steps} steps"] = time.perf_counter() - start
    store.podman("rmi", "-f", "built", "committed")
    return took


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="podman's commands on three filesystems, in seconds.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with areas.area() as area, room(Path(area) / "home") as one:
        stores = {program: Store(one, area / program, program) for program in PROGRAMS}
        for store in stores.values():
            packages.import_debian(store)
            store.podman("run", "--name", "changed", "debian", "sh", "-c", CHANGES)
        results: dict[str, dict[str, list[float]]] = {}
        for turn in range(arguments.rounds + 1):
            for program, store in stores.items():
                for name, seconds in measured(store, arguments.steps).items():
                    if turn:  # the first one warms the caches
                        results.setdefault(name, {}).setdefault(program, []).append(seconds)
    print(f"{'':20}" + "".join(f"{program:>18}" for program in PROGRAMS))
    for name, found in results.items():
        print(f"{name:20}" + "".join(f"{statistics.median(found[program]):18.3f}" for program in PROGRAMS))


if __name__ == "__main__":
    main()
