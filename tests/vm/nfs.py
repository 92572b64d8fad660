"""An NFS server in the kernel, and its client over the loopback interface. It changes /etc/exports."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import areas, syscalls
from tests.support.patience import patient

ADDRESS = "127.0.0.1"
_EXPORTED = "rw,no_root_squash,no_subtree_check,insecure,fsid=0"


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=patient(60),
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}"


@dataclass
class Export:
    """A directory seen from both sides."""

    there: Path  # on the server's filesystem
    here: Path  # through NFS


@dataclass
class Server:
    """``root`` is what clients mount as ``/``."""

    root: Path

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A new directory on the server."""
        path = Path(tempfile.mkdtemp(dir=self.root))
        path.chmod(0o755)
        try:
            yield path
        finally:
            areas.remove(path)

    def device(self, path: Path) -> str:
        """What a client mounts to get that directory, as in ``device=``."""
        return f":/{path.relative_to(self.root)}"

    @contextmanager
    def export(self, options: str = "vers=4.2") -> Iterator[Export]:
        """A new directory, mounted."""
        with self.directory() as there:
            here = Path(tempfile.mkdtemp(prefix=areas.PREFIX, dir="/var/tmp"))
            try:
                _run("mount", "-t", "nfs", "-o", options, f"{ADDRESS}{self.device(there)}", here)
                yield Export(there, here)
            finally:
                areas.detach(here)
                here.rmdir()

    def export_root(self, *, squash: bool = False) -> None:
        """Export the root anew; with ``squash``, root of a client is nobody (exports(5), root_squash)."""
        options = _EXPORTED.replace("no_root_squash", "root_squash") if squash else _EXPORTED
        _run("exportfs", "-o", options, f"*:{self.root}")
        _run("exportfs", "-f")

    @contextmanager
    def exporting(self, there: Path) -> Iterator[Path]:
        """A filesystem that is mounted below the root, mounted through NFS. FUSE has no device that would
        identify it, so it has an fsid (exports(5))."""
        client = f"*:{there}"
        _run("exportfs", "-o", _EXPORTED.replace("fsid=0", "fsid=7"), client)
        here = Path(tempfile.mkdtemp(prefix=areas.PREFIX, dir="/var/tmp"))
        try:
            _run("mount", "-t", "nfs", "-o", "vers=4.2", f"{ADDRESS}{self.device(there)}", here)
            yield here
        finally:
            areas.detach(here)
            here.rmdir()
            _run("exportfs", "-u", client)
            _run("exportfs", "-f")  # the server forgets the mount, so that it can be unmounted


@contextmanager
def server() -> Iterator[Server]:
    """Start the server, for NFS 4 alone: so it needs no statd. rpc.nfsd(8), exports(5)."""
    with areas.filesystem("ext4", 1 << 30) as root:
        for kind, where in (("nfsd", "/proc/fs/nfsd"), ("rpc_pipefs", "/var/lib/nfs/rpc_pipefs")):
            Path(where).mkdir(parents=True, exist_ok=True)
            if not any(path == where for _, path, _ in areas.mounts_below(Path(where))):
                syscalls.mount(kind, Path(where), kind, 0, "")
        Path("/etc/exports").write_text(f"{root} *({_EXPORTED})\n")
        _run("rpcbind", "-w")
        _run("rpc.mountd", "-N", "3")
        # Who asks in the time of grace after a start waits until it ends: 90 seconds by default.
        _run("rpc.nfsd", "-N", "3", "-L", "10", "-G", "10", "4")
        try:
            _run("exportfs", "-ra")
            Path("/proc/fs/nfsd/v4_end_grace").write_text("Y\n")
            yield Server(root)
        finally:
            _run("rpc.nfsd", "0")
            _run("exportfs", "-ua")
            shutil.rmtree(root, ignore_errors=True)
