"""This machine's settings for building an image: how apt and pip reach their packages.

An image stays in the user's cache, so nothing of it gets into the repository.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

DEBIAN = "http://deb.debian.org/debian"
_CARRIED = re.compile(r"Acquire::(https?|Retries|Check-|ForceIPv)", re.IGNORECASE)
_PIP_NETWORK = (
    "index-url", "extra-index-url", "trusted-host", "proxy", "cert", "client-cert", "retries",
    "default-timeout",
)  # fmt: skip
_LOCAL = re.compile(r"file:|\.{0,2}/(?!.*\.(pem|crt)$)")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def _output(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def debian_mirror() -> str:
    """This machine's apt source for Debian; deb.debian.org on another distribution."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return DEBIAN
    if release.get("ID") != "debian":
        return DEBIAN
    codename = release.get("VERSION_CODENAME", "")
    shape = "$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)"
    for line in _output("apt-get", "indextargets", "--format", shape, "Created-By: Packages").splitlines():
        fields = line.split("|")
        if len(fields) == 4 and fields[3] == "main" and codename in (fields[1], fields[2]):
            return fields[0]
    return DEBIAN


def apt_settings() -> str:
    """This machine's settings of apt (proxies, certificates, retries), as lines of apt.conf."""
    lines = _output("apt-config", "dump").splitlines()
    return "".join(line + "\n" for line in lines if _CARRIED.match(line))


def pip_settings() -> tuple[dict[str, str], list[Path]]:
    """This machine's settings of pip as environment variables, and the certificate files that they name.

    From ``pip config list``, which merges files and variables; see "pip config" in pip's documentation.
    Indexes and wheels in directories of this machine are left out: such an index may name files anywhere.
    """
    environment = {name: os.environ[name] for name in _PROXIES if name in os.environ}
    files = []
    for line in _output(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, quoted = line.partition("=")
        section, _, name = key.rpartition(".")
        if section.lower() not in ("global", "install", ":env:") or name not in _PIP_NETWORK:
            continue
        words = [word for text in shlex.split(quoted) for word in text.split() if not _LOCAL.match(word)]
        environment["PIP_" + name.upper().replace("-", "_")] = " ".join(words)
        if name.endswith("cert"):
            files += [path for path in map(Path, shlex.split(quoted)) if path.is_file()]
    return {name: value for name, value in environment.items() if value}, sorted(set(files))
