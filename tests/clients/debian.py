"""A whole Debian (or Ubuntu) root tree, created once by debootstrap from the package source of this machine.

It is stored in ``$UNIONFS_CACHE`` (default ``~/.cache/unionfs``) as ``debian-SUITE``.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.clients.support import ENVIRONMENT, run
from tests.support import areas


class Unavailable(Exception):
    """No tree can be created here; the text is the reason for a skip."""


@dataclass(frozen=True)
class Source:
    """One package repository of apt on this machine."""

    uri: str
    suite: str
    keyring: str  # a file, or empty for apt's own default

    @classmethod
    def of_this_machine(cls) -> Source:
        """The repository of the running release. Raises Unavailable."""
        if shutil.which("apt-get") is None:
            raise Unavailable("apt-get is not installed: this is no Debian or Ubuntu")
        codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        shape = "$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(SIGNED_BY)"
        for line in run("apt-get", "indextargets", "--format", shape, "Created-By: Packages").splitlines():
            fields = line.split("|")
            if len(fields) != 5:
                continue
            uri, release, name, component, keyring = fields
            if component == "main" and codename in (release, name) and "-" not in release:
                return cls(uri, codename, keyring if keyring.startswith("/") else "")
        raise Unavailable(f"apt on this machine has no repository of {codename or 'its release'}")

    def line(self) -> str:
        """The line for sources.list."""
        signed = f"[signed-by={self.keyring}] " if self.keyring else ""
        return f"deb {signed}{self.uri} {self.suite} main\n"

    def files(self) -> list[Path]:
        """Files of this machine that apt needs in a chroot besides its settings, at the same paths."""
        names = ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt", self.keyring]
        return [path for path in map(Path, filter(None, names)) if path.is_file()]


def apt_settings() -> str:
    """This machine's settings of apt for its repositories (proxies, certificates, retries), for apt.conf."""
    kept = []
    for line in run("apt-config", "dump").splitlines():
        if re.match(r"Acquire::(https?|Retries|Check-|ForceIPv)", line, re.IGNORECASE):
            kept.append(line)
    return "\n".join(kept) + "\n"


def _proxies() -> dict[str, str]:
    """Apt's proxies as environment variables, for debootstrap's downloads."""
    found = {}
    for scheme in ("http", "https"):
        value = run("apt-config", "shell", "P", f"Acquire::{scheme}::Proxy")
        if match := re.match(r"P='(.*)'", value):
            found[f"{scheme}_proxy"] = match[1]
    return found


def tree() -> Path:
    """The root tree, created if missing, which takes a minute or two. Raises Unavailable."""
    source = Source.of_this_machine()
    path = f"{ENVIRONMENT['PATH']}:/usr/sbin:/sbin"
    if shutil.which("debootstrap", path=path) is None:
        raise Unavailable("debootstrap is not installed")
    cache = Path(os.environ.get("UNIONFS_CACHE") or Path.home() / ".cache/unionfs")
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"debian-{source.suite}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=cache))
            try:
                _bootstrap(source, partial, path)
                partial.chmod(0o755)
                partial.rename(target)
            except BaseException:
                areas.remove(partial)
                raise
    return target


def _bootstrap(source: Source, target: Path, path: str) -> None:
    arguments = ["debootstrap", "--variant=minbase"]
    if source.keyring:
        arguments.append(f"--keyring={source.keyring}")
    arguments += [source.suite, str(target), source.uri]
    done = subprocess.run(
        arguments, env={**ENVIRONMENT, **_proxies(), "PATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        log = target / "debootstrap/debootstrap.log"
        more = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        raise RuntimeError(f"debootstrap ended with {done.returncode}:\n{done.stdout[-3000:]}\n{more}")


def install_host_settings(root: Path) -> None:
    """Give apt and dpkg in the chroot ``root`` this machine's network access, and start no services."""
    source = Source.of_this_machine()
    (root / "etc/apt/sources.list").write_text(source.line())
    (root / "etc/apt/apt.conf.d/90machine").write_text(apt_settings())
    for file in source.files():
        there = root / file.relative_to("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, there)
    (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o755)


_ENTER = """
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
exec chroot "$0" /bin/sh -ec "$1"
"""


def chroot(root: Path, script: str, timeout: float = 600) -> str:
    """Run a shell script in ``root`` with /proc and /dev; in separate namespaces, so that nothing stays."""
    return run(
        "unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-ec", _ENTER, root, script,
        env={
            "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root", "LC_ALL": "C.UTF-8",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": "/tmp",
        },
        timeout=timeout,
    )  # fmt: skip
