"""The images: a Debian root on an ext4, the kernel that belongs to it, and the tests' Python environment.

An image is a directory in the cache, named after a hash of its inputs, so another list of packages builds
another image. It is built under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.vm import host
from scripts.lib.vm.errors import VmError

REPOSITORY = Path(__file__).resolve().parents[3]
SUITES = {"6.1": "bookworm", "6.12": "trixie"}
"""Debian's releases by the kernels that they ship."""

SOURCE = "/src"
"""The repository's path in the machine; the image's environment has the project installed from there."""

_RECIPE = "1"
"""Change it together with the code below, if the image changes."""

_DISK_BYTES = 6 << 30
_KEPT_SECONDS = 7 * 24 * 3600.0
_KERNEL_PACKAGE = "linux-image-cloud-amd64"

_FETCH_KERNEL = f"""
cd /tmp
name=$(apt-cache depends {_KERNEL_PACKAGE} | sed -n 's/^ *Depends: \\(linux-image-[0-9].*\\)/\\1/p')
apt-get -q -o APT::Sandbox::User=root download "$name"
mv -- "$name"_*.deb kernel.deb
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
"""

# The project is installed editable, so the source that is later put into SOURCE is what runs.
_INSTALL_PYTHON = f"""
python3 -m venv /opt/venv
/opt/venv/bin/python -m pip install -q -e '{SOURCE}[test]'
"""

_ENTER = """
root=$1 script=$2
shift 2
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for path in "$@"; do
    if [ -d "$path" ]; then
        mkdir -p "$root$path"
    else
        mkdir -p "$root${path%/*}"
        [ -e "$root$path" ] || : >"$root$path"
    fi
    mount --rbind "$path" "$root$path"
done
exec chroot "$root" /bin/sh -euc "$script"
"""


# The image stays as it is: what a script changes is in an overlay, which ends with the namespace.
_OVERLAY = """
mkdir -p {work}/disk {work}/root {work}/upper {work}/work
mount -o loop,ro {disk} {work}/disk
mount -t overlay -o lowerdir={work}/disk,upperdir={work}/upper,workdir={work}/work overlay {work}/root
"""


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot: its image, its modules, and its root."""

    release: str  # as uname -r says
    image: Path
    modules: Path  # the directory with modules.dep
    root: Path  # an ext4


def cache() -> Path:
    """The directory of images: ``$XDG_CACHE_HOME/unionfs/vm``, or the same below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "unionfs/vm"


def _run(*command: str | Path, doing: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", env=env, cwd=cwd,
    )  # fmt: skip
    if done.returncode != 0:
        print(done.stdout[-6000:])
        raise VmError(f"{doing} failed: {command[0]} ended with {done.returncode}; its messages are above.")
    return done.stdout


def _project_files() -> list[Path]:
    """The files that determine how the project is installed: its requirements, entry points and version."""
    return [REPOSITORY / name for name in ("pyproject.toml", "README.md", "LICENSE", "unionfs/__init__.py")]


def _key(suite: str, packages: Sequence[str]) -> str:
    digest = hashlib.sha256()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    version = (REPOSITORY / "unionfs/__init__.py").read_text()
    recipe = [_RECIPE, _FETCH_KERNEL, _INSTALL_PYTHON, str(_DISK_BYTES)]
    for part in [suite, *packages, str(project["project"]), version, *recipe]:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def image(name: str, packages: Sequence[str]) -> Iterator[Kernel]:
    """The image of a kernel in SUITES, locked while in use; built if missing. Raises VmError."""
    suite = SUITES[name]
    home = cache()
    home.mkdir(parents=True, exist_ok=True)
    target = home / f"{suite}-{_key(suite, packages)}"
    with (home / f"{suite}.lock").open("w") as lock:
        if not target.is_dir():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _make(suite, packages, target)
        fcntl.flock(lock, fcntl.LOCK_UN)
    held = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
        os.utime(target)
        yield kernel_of(target)
    finally:
        os.close(held)


def kernel_of(directory: Path) -> Kernel:
    """The kernel of an image."""
    modules = next((directory / "modules").iterdir())
    return Kernel(modules.name, directory / "vmlinuz", modules, directory / "root.ext4")


def host_kernel(
    root: Path, release: str | None = None, boot: str = "/boot", lib: str = "/lib/modules"
) -> Kernel:
    """The running kernel (or ``release``), for a root built for another one. Raises VmError."""
    release = release or os.uname().release
    found = Kernel(release, Path(boot, f"vmlinuz-{release}"), Path(lib, release), root)
    missing = [str(path) for path in (found.image, found.modules / "modules.dep") if not path.is_file()]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise VmError(
            f"The host's kernel cannot be booted: {' and '.join(missing)} {verb} missing; install the "
            f"package of kernel {release}, or choose --kernel 6.1 or 6.12."
        )
    return found


def _make(suite: str, packages: Sequence[str], target: Path) -> None:
    if os.geteuid() != 0:
        raise VmError(f"No image of Debian {suite} exists yet, and only root can build one: run it as root.")
    if os.uname().machine != "x86_64":
        raise VmError(f"Images are built for x86_64 only, and this machine is {os.uname().machine}.")
    _remove_old(suite, target.parent)
    began = time.monotonic()
    print(f"Building an image of Debian {suite} in {target}; this takes a few minutes, once", flush=True)
    partial = Path(tempfile.mkdtemp(prefix=f"partial-{suite}-", dir=target.parent))
    try:
        _build(suite, packages, partial)
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        if partial.is_dir():
            _run("rm", "-rf", "--one-file-system", partial, doing="removing an incomplete image")
    print(f"Built in {time.monotonic() - began:.0f} s", flush=True)


def _remove_old(suite: str, home: Path) -> None:
    """Remove incomplete images of killed runs (the caller holds the lock), and images unused for a week."""
    old = list(home.glob(f"partial-{suite}-*"))
    for path in home.glob(f"{suite}-*"):
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                old.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(held)
    for path in old:
        _run("rm", "-rf", "--one-file-system", path, doing="removing an old image")


def _build(suite: str, packages: Sequence[str], home: Path) -> None:
    root = home / "root"
    settings = home / "apt.conf"
    settings.write_text(host.apt_settings())
    print("  the packages", flush=True)
    _run(
        "mmdebstrap", "--mode=root", "--variant=apt", "--quiet", "--skip=cleanup/apt",
        f"--aptopt={settings}", '--aptopt=Apt::Install-Recommends "false"',
        '--dpkgopt=path-exclude=/usr/share/man/*', '--dpkgopt=path-exclude=/usr/share/doc/*',
        f"--include={','.join(packages)}", suite, root, host.debian_mirror(),
        doing=f"building a root of Debian {suite}", cwd=home,
    )  # fmt: skip
    print("  the kernel", flush=True)
    chroot(root, _FETCH_KERNEL, doing="fetching the kernel")
    _take_kernel(root, home)
    print("  the Python environment", flush=True)
    for path in _project_files():
        there = root / SOURCE[1:] / path.relative_to(REPOSITORY)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there)
    environment, paths = host.pip_settings()
    chroot(root, _INSTALL_PYTHON, doing="installing the requirements", env=environment, paths=paths)
    shutil.rmtree(root / SOURCE[1:])
    print("  the disk", flush=True)
    disk = home / "root.ext4"
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    options = ("-q", "-t", "ext4", "-E", "lazy_itable_init=0")
    _run("/usr/sbin/mke2fs", *options, "-d", root, disk, doing="creating the disk")
    _run("rm", "-rf", "--one-file-system", root, settings, doing="removing the root's directory")


def chroot(
    root: Path, script: str, *, doing: str, env: dict[str, str] | None = None, paths: Sequence[Path] = (),
    before: str = "",
) -> None:  # fmt: skip
    """Run a shell script in ``root``, with ``paths`` bound from the host; nothing stays mounted.

    ``before``: a script that mounts ``root``.
    """
    _run(
        "unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-euc", before + _ENTER, "enter",
        root, script, "/etc/resolv.conf", *paths, doing=doing,
        env={
            "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root", "LC_ALL": "C.UTF-8",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **(env or {}),
        },
    )  # fmt: skip


def made_once(target: Path, what: str, make: Callable[[Path], Path], *, note: str = "") -> Path:
    """A file beside an image; if it is missing, root makes it: `make` gets an empty directory there, and
    returns a file in it, which becomes `target`. Raises VmError.
    """
    if target.exists():
        return target
    if os.geteuid() != 0:
        raise VmError(
            f"{what[0].upper()}{what[1:]} is not compiled for this image yet, which only root can do: run it "
            "as root."
        )
    print(f"Compiling {what} for it{note}", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.stem}-", dir=target.parent) as name:
        make(Path(name)).rename(target)
    return target


def chroot_over(
    kernel: Kernel, work: Path, script: str, *, doing: str, env: dict[str, str] | None = None,
    paths: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Run a shell script in an image's root, which stays as it is; return the directory with its changes.

    That is `upper` in the directory `work`. What it already holds, the root shows, too.
    """
    before = _OVERLAY.format(work=shlex.quote(str(work)), disk=shlex.quote(str(kernel.root)))
    chroot(work / "root", script, doing=doing, env=env, paths=paths, before=before)
    return work / "upper"


def _take_kernel(root: Path, home: Path) -> None:
    """Unpack the kernel's package: its image and modules to ``home``, its modules also into ``root``."""
    unpacked = home / "kernel"
    _run("dpkg-deb", "-x", root / "tmp/kernel.deb", unpacked, doing="unpacking the kernel")
    (root / "tmp/kernel.deb").unlink()
    (source,) = [*unpacked.glob("lib/modules/*"), *unpacked.glob("usr/lib/modules/*")]
    shutil.move(next(unpacked.glob("boot/vmlinuz-*")), home / "vmlinuz")
    there = root / "usr/lib/modules" / source.name
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, there)
    chroot(root, f"depmod {source.name}", doing="listing the kernel's modules")
    shutil.copytree(there, home / "modules" / source.name, symlinks=True)
    shutil.rmtree(unpacked)
