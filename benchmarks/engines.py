"""podman and docker on this mount program, fuse-overlayfs and kernel overlayfs, in turn; medians in seconds.

    python -m benchmarks.engines [--rounds N] [--steps N] [--only ACTION] [--programs PROGRAM ...]
    python -m benchmarks.engines --requests

As root, with podman, buildah, docker, fuse-overlayfs and debootstrap. The image is a small Debian; the
container that is compared, committed and exported has three changes. A build has a layer a step. Each result
is printed as soon as it is there: a round takes seconds for `run`, and a minute for `build`.

`--requests` counts instead what podman asks the two mounts of a container and of its image for, per action.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.clients import packages
from tests.clients.engines import KERNEL, OURS, THEIRS, Docker, Store, busybox_tar, mount_program
from tests.clients.rooms import Room, room
from tests.support import areas

# Kernel overlayfs where podman compares both trees file by file for each diff, as with every mount program:
# it trusts the upper directory only of an overlayfs that it mounts itself without redirect_dir
# (useNaiveDiff in containers/storage, drivers/overlay/overlay.go).
COMPARED = "overlay-compared"
PROGRAMS = (OURS, THEIRS, KERNEL, COMPARED)
CHANGES = "echo new > /new; rm /etc/issue; chmod 700 /srv"
COMMANDS = {
    "run": ("run", "--rm", "debian", "true"),
    "diff": ("diff", "changed"),
    "commit": ("commit", "-q", "changed", "committed"),
    "export": ("export", "-o", "/dev/null", "changed"),
}
DOCKER = "docker run"
Action = Callable[[], object]


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


def prepared(one: Room, root: Path, program: str) -> Store:
    """A store with the image and the changed container."""
    compared = program == COMPARED
    store = Store(
        one,
        root,
        KERNEL if compared else program,
        options=['mountopt = "redirect_dir=on"'] if compared else [],
    )
    packages.import_debian(store)
    store.podman("run", "--name", "changed", "debian", "sh", "-c", CHANGES)
    return store


def podman_action(name: str, steps: int, store: Store) -> tuple[Action, Action]:
    """An action, and what undoes it."""
    if name == "build":
        return partial(store.build, "built", containerfile(steps), "--no-cache"), partial(
            store.podman, "rmi", "-f", "built"
        )
    undo: Action = partial(store.podman, "rmi", "-f", "committed") if name == "commit" else lambda: None
    return partial(store.podman, *COMMANDS[name]), undo


@contextmanager
def dockers(one: Room, area: Path, programs: list[str]) -> Iterator[dict[str, Docker]]:
    """A docker daemon for each program, with busybox."""
    first = area / "path"
    first.mkdir()
    ours = mount_program(OURS)
    if ours is not None:
        (first / THEIRS).symlink_to(ours)
    with ExitStack() as stack:
        found = {}
        for program in programs:
            driver = "overlay2" if program in (KERNEL, COMPARED) else THEIRS
            docker = Docker(
                one, area / f"docker-{program}", driver, first_in_path=first if program == OURS else None
            )
            stack.callback(docker.close)
            docker.run("import", "-", "busybox", data=busybox_tar())
            found[program] = docker
        yield found


def measure(name: str, rounds: int, actions: dict[str, tuple[Action, Action]]) -> None:
    """Print the medians of an action, done for each program in turn."""
    taken: dict[str, list[float]] = {program: [] for program in actions}
    for turn in range(rounds + 1):
        for program, (act, undo) in actions.items():
            start = time.perf_counter()
            act()
            seconds = time.perf_counter() - start
            undo()
            if turn:  # the first one warms the caches
                taken[program].append(seconds)
    cells = [
        f"{statistics.median(found):.3f} ({min(found):.3f} - {max(found):.3f})" for found in taken.values()
    ]
    print(f"{name:12}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def requests_of(store: Store, mountpoint: str) -> dict[str, int]:
    """The requests to a mount so far, by kind."""
    program = mount_program(OURS)
    assert program is not None
    shown = store.run(program.with_name("unionfs"), "stats", "--json", "--seconds", "0", mountpoint)
    found: dict[str, dict[str, int]] = json.loads(shown)["requests"]
    return {kind: figures["total"] for kind, figures in found.items()}


def count_requests(store: Store) -> None:
    """Print how often the actions ask the container's and the image's mount for what."""
    mounts = {
        "container": store.podman("mount", "changed").strip(),
        "image": store.podman("image", "mount", "debian").strip(),
    }
    files = store.run("sh", "-c", f"find {mounts['container']} | wc -l").strip()
    print(f"{files} files")
    for name in ("diff", "commit", "export"):
        act, undo = podman_action(name, 0, store)
        before = {which: requests_of(store, path) for which, path in mounts.items()}
        act()
        for which, path in mounts.items():
            after = requests_of(store, path)
            more = {kind: count - before[which].get(kind, 0) for kind, count in after.items()}
            shown = sorted(((count, kind) for kind, count in more.items() if count), reverse=True)
            print(f"{name:8}{which:12}" + ", ".join(f"{kind} {count}" for count, kind in shown), flush=True)
        undo()


def main() -> None:
    """The command."""
    names = [*COMMANDS, "build", DOCKER]
    parser = argparse.ArgumentParser(description="podman's commands on these filesystems, in seconds.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", action="append", choices=names, help="an action; may be repeated")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--requests", action="store_true", help="count requests instead of seconds")
    arguments = parser.parse_args()
    chosen = arguments.only or names
    with areas.area() as area, room(Path(area) / "home") as one:
        if arguments.requests:
            count_requests(prepared(one, area / OURS, OURS))
            return
        print(f"{arguments.rounds} rounds; s, median (min - max)")
        print(f"{'':12}" + "".join(f"{program:>26}" for program in arguments.programs), flush=True)
        stores = {}
        if chosen != [DOCKER]:
            stores = {program: prepared(one, area / program, program) for program in arguments.programs}
        for name in chosen:
            if name != DOCKER:
                actions = {
                    program: podman_action(name, arguments.steps, store) for program, store in stores.items()
                }
                measure(name, arguments.rounds, actions)
                continue
            with dockers(one, area, arguments.programs) as engines:
                words = ("run", "--rm", "--net=host", "busybox", "/bin/true")
                runs: dict[str, tuple[Action, Action]] = {
                    program: (partial(docker.run, *words), lambda: None)
                    for program, docker in engines.items()
                }
                measure(name, arguments.rounds, runs)


if __name__ == "__main__":
    main()
