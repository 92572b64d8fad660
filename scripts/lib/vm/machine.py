"""A virtual machine in QEMU: its disks, its two serial ports, and its end."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.vm import core, image, initrd
from scripts.lib.vm.errors import VmError
from scripts.lib.vm.image import REPOSITORY, Kernel

_EXIT = re.compile(rb"VM-EXIT (\d+)\s*$")
_EXIT_WORD = b"VM-EXIT "
_QEMU = "qemu-system-x86_64"


def acceleration() -> str:
    """``kvm`` if it works, else ``tcg``; ``$UNIONFS_VM_ACCEL`` overrides. Raises VmError."""
    chosen = os.environ.get("UNIONFS_VM_ACCEL", "")
    if chosen:
        if chosen not in ("kvm", "tcg"):
            raise VmError(f"invalid UNIONFS_VM_ACCEL {chosen!r}: choose kvm or tcg.")
        return chosen
    # /dev/kvm may exist and open in a machine whose processor cannot run guests.
    flags = set(re.findall(r"\b(?:vmx|svm)\b", Path("/proc/cpuinfo").read_text()))
    return "kvm" if flags and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def slowness() -> float:
    """The factor for timeouts in the machine; ``$UNIONFS_TEST_SLOWNESS`` overrides."""
    return float(os.environ.get("UNIONFS_TEST_SLOWNESS") or (12 if acceleration() == "tcg" else 2))


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory for one run, removed afterwards, as are those of killed runs."""
    home = image.cache()
    home.mkdir(parents=True, exist_ok=True)
    for path in home.glob("run-*"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
    path = Path(tempfile.mkdtemp(prefix="run-", dir=home))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def pack_source(target: Path) -> None:
    """The repository as a tar: what git tracks or would track; the whole directory without git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
        capture_output=True,
    )  # fmt: skip
    command = ["tar", "-c", "--owner=0", "--group=0", "-f", str(target)]
    if listed.returncode == 0:
        # git also lists tracked files that were removed.
        root = os.fsencode(REPOSITORY)
        names = [n for n in listed.stdout.split(b"\0") if n and os.path.lexists(os.path.join(root, n))]
        command += ["--null", "--no-recursion", "-T", "-"]
        subprocess.run(command, cwd=REPOSITORY, input=b"\0".join(names), check=True)
    else:
        command += ["--exclude=./.venv", "--exclude=__pycache__", "."]
        subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, check=True)


@dataclass
class Disk:
    """A raw disk beside the root and the source: the third is /dev/vdc, and so on."""

    path: Path
    options: str = ""


class Machine:
    """A running machine. ``lines`` yields its command's output; ``code`` is set when the command ends."""

    def __init__(self, process: subprocess.Popen[bytes], console: Path) -> None:
        self.process = process
        self.console = console
        self.code: int | None = None

    def lines(self) -> Iterator[bytes]:
        """Yield each line as it arrives, until the machine is off."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not self._is_exit(line):
                yield line

    def pieces(self) -> Iterator[bytes]:
        """Yield the output as it arrives, including incomplete lines."""
        assert self.process.stdout is not None
        output = self.process.stdout.fileno()
        held, fresh = b"", True  # At the start of a line: possibly the one with the exit code.
        while piece := os.read(output, 1 << 16):
            for line in (held + piece).splitlines(keepends=True):
                held = b""
                if fresh and not line.endswith(b"\n") and _EXIT_WORD.startswith(line[: len(_EXIT_WORD)]):
                    held = line
                    break
                if not (fresh and self._is_exit(line)):
                    yield line
                fresh = line.endswith(b"\n")
        if held:
            yield held

    def _is_exit(self, line: bytes) -> bool:
        if found := _EXIT.match(line):
            self.code = int(found[1])
        return found is not None

    def cut(self) -> None:
        """Kill it without warning, as when the power fails."""
        self.process.kill()
        self.process.wait()

    def console_text(self) -> str:
        """The end of the output of the kernel and the first process."""
        return self.console.read_text(errors="replace")[-4000:] if self.console.exists() else ""


@contextmanager
def running(
    kernel: Kernel,
    command: str,
    environment: Mapping[str, str],
    work: Path,
    *disks: Disk,
    name: str = "vm",
    files: Mapping[str, str] | None = None,
) -> Iterator[Machine]:
    """Boot a machine that runs a shell script in the repository's directory; killed at the end of the block.

    ``files``: the content of its /run/guest, name to text.
    """
    if shutil.which(_QEMU) is None:
        raise VmError(f"{_QEMU} is not installed: apt-get install qemu-system-x86.")
    home = work / name
    home.mkdir()
    source = work / "source.tar"
    if not source.exists():
        pack_source(source)
        subprocess.run(["tar", "-A", "-f", source, core.compiled(kernel)], check=True)
    settings = "".join(f"{key}={_quoted(value)}\n" for key, value in environment.items())
    given = {"command": command, "environment": settings, **(files or {})}
    ram_disk = initrd.make(kernel.modules, home, given)
    arguments = [
        _QEMU, "-M", "q35", "-smp", os.environ.get("UNIONFS_VM_CPUS") or "2",
        "-m", os.environ.get("UNIONFS_VM_MEMORY") or "2G",
        *(["-accel", "kvm", "-cpu", "host"] if acceleration() == "kvm" else
          ["-accel", "tcg,thread=multi", "-cpu", "max"]),
        "-nodefaults", "-display", "none", "-no-reboot", "-nic", "none",
        "-serial", f"file:{home / 'console'}",
        "-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out",
        "-kernel", str(kernel.image), "-initrd", str(ram_disk), "-append", "console=ttyS0 quiet panic=1",
        "-drive", f"file={kernel.root},if=virtio,format=raw,snapshot=on,cache=unsafe",
        "-drive", f"file={source},if=virtio,format=raw,readonly=on",
    ]  # fmt: skip
    for disk in disks:
        arguments += ["-drive", f"file={disk.path},if=virtio,format=raw{disk.options}"]
    # The terminal's signals are for the script, which then ends QEMU, as does the script's own death.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=(home / "qemu").open("wb"), start_new_session=True, env={**os.environ, "TMPDIR": str(home)},
    )  # fmt: skip
    machine = Machine(process, home / "console")
    try:
        yield machine
    finally:
        machine.cut()


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def failure(work: Path, machine: Machine, name: str = "vm") -> str:
    """Why a machine ended without an exit code; prints the output of its console and QEMU."""
    said = (work / name / "qemu").read_text(errors="replace").strip()
    for title, text in (("console", machine.console_text()), ("QEMU", said)):
        if text:
            print(f"--- {title}:\n{text}")
    return "The virtual machine ended without its command's exit code; its console output is above."
