"""Discovery of Docker's volume plugins, as in docker, and the trust in their descriptions.

Sources: docs.docker.com/engine/extend/plugin_api (discovery); moby pkg/plugins/discovery.go and
plugin/v2/plugin.go (paths of managed plugins). Root mounts the directory that a plugin names. So a socket or
description must belong to root (or to the user of the command), and no other user may be able to replace it
(`trusted`). The same applies to a socket named by a description, which is checked at use.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage.drivers import trusted

ENVIRONMENT = "UNIONFS_PLUGIN_PATH"
"""Directories to search instead of docker's, separated by colons."""
_SOCKETS = ("/run/docker/plugins",)
_SPECS = ("/etc/docker/plugins", "/usr/lib/docker/plugins")
_MANAGED = "/var/lib/docker/plugins"
SOCKET = "socket of a plugin"
_DESCRIPTION = "plugin description"
_DEPTH = 4
"""The maximum depth of directories in a plugin's name."""
_PORTS = {"tcp": 80, "http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    name: str
    url: str
    """`unix://PATH`, `tcp://HOST:PORT`, `http://` or `https://`."""
    tls: Mapping[str, Any] | None = None
    base: str = ""
    """The directory that contains a managed plugin's paths."""
    propagated: str = ""
    """The prefix of the plugin's paths that maps to `../propagated-mount` of `base`."""

    @property
    def shown(self) -> str:
        return _shortened(self.url)

    @property
    def socket(self) -> str:
        """The path of its unix socket, empty if it has none."""
        return self.url.removeprefix("unix://") if self.url.startswith("unix://") else ""

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Host and port of a plugin without a unix socket."""
        parts = urlsplit(self.url)
        default = 443 if self.is_secure else _PORTS[parts.scheme]
        return parts.hostname or "", parts.port or default

    @property
    def is_secure(self) -> bool:
        return self.url.startswith("https://") or (self.tls is not None and self.url.startswith("tcp://"))

    def host_path(self, path: str) -> str:
        """Translate a path that the plugin names to a path on this host."""
        if not self.base:
            return path
        if self.propagated and (path + "/").startswith(self.propagated.rstrip("/") + "/"):
            rest = path[len(self.propagated.rstrip("/")) :]
            return f"{os.path.dirname(self.base)}/propagated-mount{rest}"
        return self.base + path

    def is_beyond(self, path: str) -> bool:
        """Whether a path on this host leaves a managed plugin's directories through a symlink."""
        if not self.base:
            return False
        homes = (self.base, f"{os.path.dirname(self.base)}/propagated-mount")
        real = os.path.realpath(path)
        return not any((real + "/").startswith(os.path.realpath(home) + "/") for home in homes)


def _shortened(url: str) -> str:
    return quoted(url if len(url) <= 200 else url[:200] + "...")


def _directories() -> tuple[tuple[str, ...], tuple[str, ...]]:
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        places = tuple(path for path in chosen.split(":") if path)
        return places, places
    return _SOCKETS, _SPECS


def searched() -> str:
    """The directories that are searched, as part of a sentence."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return " or ".join(quoted(path) for path in chosen.split(":") if path) + f" ({ENVIRONMENT})"
    return f"{_SOCKETS[0]} or {_SPECS[0]}"


def plugin_names() -> list[str]:
    """The names of plugins that are found without sending requests."""
    sockets, specs = _directories()
    names = set()
    for directories, endings in ((sockets, (".sock",)), (specs, (".spec", ".json"))):
        for directory in directories:
            for path in _files(directory):
                for ending in endings:
                    if path.endswith(ending):
                        names.add(_name_of(path, ending))
    return sorted(names)


def _files(directory: str) -> Iterator[str]:
    """Relative paths of files below a directory; symlinks to directories are not followed, as in docker."""
    for place, below, files in os.walk(directory):
        inner = os.path.relpath(place, directory)
        inner = "" if inner == "." else inner + "/"
        if inner.count("/") >= _DEPTH:
            below.clear()
        yield from (inner + name for name in files)


def _name_of(path: str, ending: str) -> str:
    path = path.removesuffix(ending)
    parent, _, name = path.rpartition("/")
    # A plugin may be in a directory of the same name.
    return parent if parent == name else path


def find_address(name: str) -> Address | None:
    """The address of the plugin of that name, or None.

    Raises UserError for an invalid or untrusted description.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable():
        return None
    last = name.rpartition("/")[2]
    sockets, specs = _directories()
    for directory in sockets:
        for path in (f"{directory}/{name}.sock", f"{directory}/{name}/{last}.sock"):
            if _kind(path) == stat.S_IFSOCK:
                _check_socket(path)
                return Address(name, f"unix://{path}")
    for directory in specs:
        for path in (f"{directory}/{name}.spec", f"{directory}/{name}/{last}.spec"):
            if _kind(path):
                return Address(name, _checked_url(trusted.read(path, _DESCRIPTION).strip(), path))
        for path in (f"{directory}/{name}.json", f"{directory}/{name}/{last}.json"):
            if _kind(path):
                return _from_json(name, path)
    return None if os.environ.get(ENVIRONMENT) else _find_managed(name)


def _kind(path: str) -> int:
    """The S_IFMT bits of a file; follows symlinks, as docker does; 0 if missing."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except OSError:
        return 0


def _check_socket(path: str) -> None:
    """Raise UserError for a socket that another user created or could replace."""
    failure = on_failure(f"the {SOCKET} {quoted(path)} cannot be used", "correct it")
    with failure, trusted.opened(path, SOCKET):
        pass


def _checked_url(url: str, path: str) -> str:
    shown = _shortened(url)
    with on_failure(
        f"the plugin description {quoted(path)} has the address {shown}", "correct it", ValueError
    ):
        parts = urlsplit(url)
        known = parts.scheme in ("unix", *_PORTS) and url.isprintable() and " " not in url
        complete = url.startswith("unix:///") if parts.scheme == "unix" else bool(parts.hostname)
        if parts.scheme != "unix":
            _ = parts.port  # raises ValueError if invalid
    if not known or not complete:
        raise UserError(
            f"the plugin description {quoted(path)} has the address {shown}; it must be unix:///PATH, "
            "tcp://HOST:PORT, http://HOST or https://HOST."
        )
    return url


def _from_json(name: str, path: str) -> Address:
    try:
        values = json.loads(trusted.read(path, _DESCRIPTION))
        url, tls = values["Addr"], values.get("TLSConfig")
        if not isinstance(url, str):
            raise TypeError("Addr is not a string")
        if tls is not None and not isinstance(tls, dict):
            raise TypeError("TLSConfig is not an object")
        for key, value in (tls or {}).items():
            wanted = bool if key == "InsecureSkipVerify" else str
            if value is not None and not isinstance(value, wanted):
                raise TypeError(f"{key} in TLSConfig is not a {'boolean' if wanted is bool else 'string'}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"the plugin description {quoted(path)} is malformed ({error}); correct it."
        ) from error
    return Address(name, _checked_url(url, path), tls)


def _find_managed(name: str) -> Address | None:
    wanted = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    try:
        found = sorted(os.listdir(_MANAGED))
    except OSError:
        return None
    for ident in found:
        path = f"{_MANAGED}/{ident}/config.json"
        if not _kind(path):
            continue
        try:
            # docker's directory may contain invalid files of plugins; they do not stop the search.
            plugin = json.loads(trusted.read(path, _DESCRIPTION))["plugin"]
            if plugin["Name"] != wanted:
                continue
            config = plugin["Config"]
            socket = f"{_SOCKETS[0]}/{plugin['Id']}/{config['Interface']['Socket']}"
            propagated = str(config.get("PropagatedMount") or "")
        except (UserError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if _kind(socket) != stat.S_IFSOCK:
            raise UserError(
                f"the plugin {quoted(name)} is installed but does not run; `docker plugin enable {name}`."
            )
        _check_socket(socket)
        return Address(name, f"unix://{socket}", None, f"{os.path.dirname(path)}/rootfs", propagated)
    return None
