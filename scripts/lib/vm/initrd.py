"""The initial RAM disk of a machine: busybox, the modules for the root disk, and the guest's scripts."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path, PurePosixPath

from scripts.lib.vm.errors import VmError

_WANTED = ("virtio_pci", "virtio_blk", "ext4")
_GUEST = Path(__file__).parent / "guest"


def module_order(modules: Path, wanted: tuple[str, ...] = _WANTED) -> list[str]:
    """The files of these modules and their dependencies, in load order.

    Those built into the kernel are left out. From modules.dep and modules.builtin, depmod(8): a line of
    modules.dep lists a module's dependencies, each one after those that need it.
    """
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        needs[name] = rest.split()
    names = {_module(path): path for path in needs}
    builtin = {_module(path) for path in (modules / "modules.builtin").read_text().split()}
    order: list[str] = []
    for name in wanted:
        if name in builtin:
            continue
        if name not in names:
            raise VmError(f"The kernel of {modules} has no module {name}, which its root disk needs.")
        for path in [*reversed(needs[names[name]]), names[name]]:
            if path not in order:
                order.append(path)
    return order


def _module(path: str) -> str:
    return PurePosixPath(path).name.split(".")[0].replace("-", "_")


def make(modules: Path, work: Path, files: dict[str, str]) -> Path:
    """An initial RAM disk in ``work``, with ``files`` (name to text) in its directory /guest beside init."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise VmError("busybox is not installed: apt-get install busybox-static.")
    tree = work / "initrd"
    for name in ("bin", "modules", "guest", "dev", "proc", "sys", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copyfile(busybox, tree / "bin/busybox")
    shutil.copyfile(_GUEST / "initrd-init", tree / "init")
    shutil.copyfile(_GUEST / "init", tree / "guest/init")
    for path in (tree / "bin/busybox", tree / "init", tree / "guest/init"):
        path.chmod(0o755)
    for name, text in files.items():
        (tree / "guest" / name).write_text(text)
    for number, name in enumerate(module_order(modules)):
        (tree / "modules" / f"{number:03}.ko").write_bytes(_content(modules / name))
    made = work / "initrd.cpio"
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    with made.open("wb") as file:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc"], input="\n".join(names).encode(), stdout=file,
            cwd=tree, check=True,
        )  # fmt: skip
    return made


def _content(path: Path) -> bytes:
    """A module uncompressed, as busybox's insmod may not support its compression."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", path], check=True, capture_output=True).stdout
    if path.suffix == ".gz":
        return subprocess.run(["gzip", "-dc", path], check=True, capture_output=True).stdout
    return path.read_bytes()
