"""The command line of scripts/vm-test, which passes its options on unchanged."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from scripts.lib.vm import image, machine, zfs
from scripts.lib.vm.errors import VmError
from scripts.lib.vm.image import Kernel
from scripts.lib.vm.machine import Disk

DEFAULT_TESTS = ["tests/mount", "tests/vm"]
_PASSED_ON = ("UNIONFS_TEST_SESSIONS", "UNIONFS_ORACLE", "UNIONFS_ORACLE_SEED")


def main() -> int:
    """Run the command; return the exit code."""
    usage = "scripts/vm-test [--kernel 6.1|6.12|host] [--zfs] [PYTEST ARGUMENT...]; see --help"
    parser = argparse.ArgumentParser(prog="vm-test", usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--kernel", choices=[*image.SUITES, "host"], default="6.12")
    parser.add_argument("--packages", required=True)
    parser.add_argument("--zfs", action="store_true")
    parser.add_argument("--shell", metavar="COMMAND")
    parser.add_argument("--power-cut", type=int, nargs="?", const=6, metavar="N")
    arguments, pytest = parser.parse_known_args()
    if arguments.zfs and (arguments.kernel == "host" or arguments.power_cut is not None):
        parser.error("--zfs needs --kernel 6.1 or 6.12, and does not go with --power-cut")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        packages = arguments.packages.split()
        with machine.workplace() as work, _kernel(arguments.kernel, packages, work) as kernel:
            if arguments.power_cut is not None:
                from scripts.lib.vm import power_cut

                return power_cut.run(kernel, environment(arguments.kernel), work, arguments.power_cut)
            words = [word for word in pytest if word != "--"] or DEFAULT_TESTS
            command = arguments.shell or f"exec python -m pytest {shlex.join(words)}"
            added = zfs.built(kernel) if arguments.zfs else None
            return _run(kernel, arguments.kernel, command, work, added)
    except VmError as error:
        print(f"vm-test: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _kernel(name: str, packages: list[str], work: Path) -> Iterator[Kernel]:
    if name != "host":
        with image.image(name, packages) as kernel:
            yield kernel
        return
    image.host_kernel(work)  # raises before anything is built
    with image.image("6.12", packages) as kernel:
        yield image.host_kernel(kernel.root)


def environment(kernel: str) -> dict[str, str]:
    """The environment variables for the tests in the machine."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        **passed,
        "UNIONFS_VM_KERNEL": kernel,
        "UNIONFS_TEST_SLOWNESS": f"{machine.slowness():g}",
        "PYTHONUNBUFFERED": "1",
        "PY_COLORS": "1" if sys.stdout.isatty() else "0",
        "COLUMNS": "110",
    }


def _run(kernel: Kernel, name: str, command: str, work: Path, added: Path | None) -> int:
    """Run a command in a machine; `added` is the tar of ZFS."""
    print(f"Booting Linux {kernel.release} in QEMU ({machine.acceleration()})", flush=True)
    variables = environment(name)
    disks: list[Disk] = []
    files: dict[str, str] = {}
    if added is not None:
        variables["UNIONFS_VM_ZFS"] = "1"
        disks.append(Disk(added, ",readonly=on"))
        files["zfs"] = "/dev/vdc\n"
    with machine.running(kernel, command, variables, work, *disks, files=files) as running:
        if sys.stdout.isatty():
            output = running.pieces()
        else:  # Skip what a terminal would have overwritten.
            output = (line.rstrip(b"\r\n").rpartition(b"\r")[2] + b"\n" for line in running.lines())
        for part in output:
            sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
        if running.code is None:
            raise VmError(machine.failure(work, running))
        return running.code


if __name__ == "__main__":
    sys.exit(main())
