"""The power cut: kills QEMU under a load, and checks after the next boot that all durable data is there.

The disk is attached with ``cache=none``: what the guest's kernel has not written is lost, as with a real cut.
tests/vm/power_cut.py is the part in the machine.
"""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.lib.vm import machine
from scripts.lib.vm.errors import VmError
from scripts.lib.vm.image import Kernel
from scripts.lib.vm.machine import Disk, Machine

KINDS = ("ext4", "xfs")
_DISK_BYTES = 2 << 30
_SILENT_SECONDS = 120.0
_LONGEST_SECONDS = 25.0


def run(kernel: Kernel, environment: dict[str, str], work: Path, count: int) -> int:
    """Cut the power ``count`` times, at different moments; return the exit code. Raises VmError."""
    failed = 0
    for turn in range(count):
        kind = KINDS[turn % len(KINDS)]
        home = work / f"cut{turn}"
        home.mkdir()
        disk = home / "disk"
        _format(disk, kind)
        # After the first write; the same moments in every run on an equally fast machine.
        seconds = random.Random(turn).uniform(0, _LONGEST_SECONDS * (turn + 1) / count)
        head = f"cut {turn + 1} of {count}, on {kind}"
        print(f"{head}: after {seconds:.1f} s of writing", flush=True)
        claims = _load(kernel, environment, home, disk, kind, turn, seconds)
        removed = sum(1 for line in claims if json.loads(line)["digest"] is None)
        if _is_right(kernel, environment, home, disk, kind, turn, claims):
            print(f"{head}: {len(claims) - removed} files and {removed} removals were durable and are there")
        else:
            failed += 1
            print(f"{head}: FAILED; the errors are above")
        disk.unlink()
    print(f"{count} power cuts on Linux {kernel.release}: {count - failed} passed, {failed} failed")
    return 1 if failed else 0


def _format(disk: Path, kind: str) -> None:
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    options = ["-F", "-E", "lazy_itable_init=0"] if kind == "ext4" else ["-f"]
    done = subprocess.run(
        [f"/usr/sbin/mkfs.{kind}", "-q", *options, str(disk)], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise VmError(f"No {kind} could be created for the power cut: {done.stdout.strip()}.")


@contextmanager
def _alarm(running: Machine, seconds: float) -> Iterator[None]:
    """Kill the machine after ``seconds``."""
    timer = threading.Timer(seconds, running.process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _load(
    kernel: Kernel, environment: dict[str, str], home: Path, disk: Path, kind: str, turn: int, seconds: float
) -> list[str]:
    """Boot, write, cut; return what was reported as durable until then."""
    command = f"exec python -m tests.vm.power_cut load /dev/vdc {kind} {turn}"
    attached = Disk(disk, ",cache=none")
    claims: list[str] = []
    with machine.running(kernel, command, environment, home, attached, name="load") as running:
        lines = running.lines()
        with _alarm(running, _SILENT_SECONDS * machine.slowness()):
            for line in lines:
                if line.strip() == b"LOADING":
                    break
                print(line.decode(errors="replace"), end="")
            else:
                raise VmError(machine.failure(home, running, "load"))
        with _alarm(running, seconds):  # the cut
            for line in lines:
                text = line.decode(errors="replace").strip()
                with suppress(ValueError):  # The last line may be incomplete.
                    json.loads(text)
                    claims.append(text)
                    continue
                print(text)
        if running.code is not None:
            raise VmError("The load ended before the power was cut; its messages are above.")
    return claims


def _is_right(
    kernel: Kernel,
    environment: dict[str, str],
    home: Path,
    disk: Path,
    kind: str,
    turn: int,
    claims: list[str],
) -> bool:
    command = f"exec python -m tests.vm.power_cut check /dev/vdc {kind} {turn} /run/guest/claims"
    attached = Disk(disk, ",cache=none")
    files = {"claims": "".join(line + "\n" for line in claims)}
    with machine.running(
        kernel, command, environment, home, attached, name="check", files=files
    ) as running, _alarm(running, 10 * _SILENT_SECONDS * machine.slowness()):
        for line in running.lines():
            if line.strip():
                print(" ", line.decode(errors="replace").rstrip(), flush=True)
        if running.code is None:
            raise VmError(machine.failure(home, running, "check"))
        return running.code == 0
