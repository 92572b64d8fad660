"""Docker's volume plugins as drivers: the published protocol, with checks of every answer.

Sources: docs.docker.com/engine/extend/plugin_api (handshake) and plugins_volume (the VolumeDriver requests);
moby volume/drivers/proxy.go (timeouts). `plugin_search` finds plugins, `plugin_request` sends one request.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage.drivers import looking, replacing, trusted
from unionfs.storage.drivers.base import Driver, Replacement
from unionfs.storage.drivers.plugin_search import (
    ENVIRONMENT,
    Address,
    find_address,
    plugin_names,
)
from unionfs.storage.model import Volume

if TYPE_CHECKING:
    import ssl

    from unionfs.storage.drivers.plugin_request import Answer

__all__ = ["ENVIRONMENT", "Plugin", "find_plugin", "plugin_names"]

_LONG = ("VolumeDriver.Create", "VolumeDriver.Mount")
_LONG_SECONDS = 120.0
_SHORT_SECONDS = 60.0
"""Docker's timeouts; `_LONG` requests may create or attach a disk."""
_HANDSHAKE_SECONDS = 10.0
"""For Plugin.Activate, the first request, which needs no work by the plugin."""
_STATUS_SECONDS = 5.0
"""For the Status field of `inspect`, which is optional."""
_LOOK_SECONDS = 5.0
"""For access to a directory named by a plugin, whose filesystem may hang."""
_HURRIED_SECONDS = 10.0
_SILENT_SECONDS = 30.0
_DEEPEST = 32
"""The maximum nesting of objects and lists in an answer."""
_LONGEST_PATH = 4095
"""PATH_MAX without its NUL; linux/limits.h."""
_LONGEST_WORDS = 300
_PLAIN = (str, int, float, NoneType)

_silent_until: dict[str, float] = {}
"""By URL, the time (time.monotonic) until which a silent plugin receives no requests: removing a hundred
volumes waits only once for a plugin that hangs."""


def find_plugin(name: str) -> Plugin | None:
    """The plugin of that name, or None. Raises UserError if its description is invalid or not trusted."""
    address = find_address(name)
    return None if address is None else Plugin(address)


class Plugin(Driver):
    """A volume plugin as a driver. The plugin stores the volumes; local records list those created here.

    `until` (time.monotonic) is one deadline for all requests, for callers with shorter timeouts than docker.
    """

    keeps_names_apart = False

    def __init__(self, address: Address, until: float = math.inf) -> None:
        self.name = address.name
        self._address = address
        self._until = until
        self._activated = False

    def hurried(self) -> Plugin:
        return Plugin(self._address, time.monotonic() + _HURRIED_SECONDS)

    @property
    def scope(self) -> str:  # type: ignore[override]
        """The scope that the plugin reports; `local` if it reports none, as old ones do."""
        try:
            answer = self._call("VolumeDriver.Capabilities", {})
            found = self._object(answer, "Capabilities", "VolumeDriver.Capabilities").get("Scope")
        except UserError:
            return "local"
        return "global" if found == "global" else "local"

    # -- the protocol -------------------------------------------------------------------------------------

    def _tls(self) -> ssl.SSLContext | None:
        if not self._address.is_secure:
            return None
        # start-up time: importing it takes longer than a short command's own work
        import ssl

        tls = self._address.tls or {}
        for key in ("CAFile", "CertFile", "KeyFile"):
            if tls.get(key):
                # Checked before OpenSSL opens it, which might block. Afterwards no other user can replace it.
                trusted.read(tls[key], "file of certificates in a TLSConfig")
        with on_failure(
            f"the certificates of the volume plugin {quoted(self.name)} cannot be read",
            "check its TLSConfig",
            OSError, ValueError,
        ):
            context = ssl.create_default_context(cafile=tls.get("CAFile") or None)
            if tls.get("InsecureSkipVerify"):
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if tls.get("CertFile"):
                # Without a password OpenSSL prompts on the terminal for an encrypted key.
                context.load_cert_chain(tls["CertFile"], tls.get("KeyFile") or None, password="")
        return context

    def _call(self, request: str, values: Mapping[str, Any], until: float = math.inf) -> dict[str, Any]:
        """One request, answered before `until`. Raises UserError with the plugin's own message."""
        until = min(until, self._until)
        if not self._activated:
            self._activate(until)
        seconds = _LONG_SECONDS if request in _LONG else _SHORT_SECONDS
        return self._answer(request, self._post(request, json.dumps(values).encode(), seconds, until))

    def _post(self, request: str, content: bytes, seconds: float, until: float) -> Answer:
        # start-up time: other commands do not need its imports
        from unionfs.storage.drivers.plugin_request import RequestError, post

        now, url = time.monotonic(), self._address.url
        if now < _silent_until.get(url, 0):
            self._fail("it did not answer a moment ago; restart it, or remove what describes it")
        try:
            return post(self._address, self._tls(), request, content, min(seconds, until - now))
        except RequestError as error:
            if error.silent:
                _silent_until[url] = time.monotonic() + _SILENT_SECONDS
            self._fail(str(error), error)

    def _fail(self, why: str, error: Exception | None = None) -> NoReturn:
        raise self._error(f"at {self._address.shown} cannot be used: {why}.") from error

    def _error(self, sentence: str) -> UserError:
        return UserError(f"the volume plugin {quoted(self.name)} {sentence}")

    def _activate(self, until: float) -> None:
        request = "Plugin.Activate"
        found = self._answer(request, self._post(request, b"", _HANDSHAKE_SECONDS, until))
        implements = found.get("Implements")
        if not isinstance(implements, list) or "VolumeDriver" not in implements:
            raise UserError(
                f"the plugin {quoted(self.name)} is not a volume plugin (it implements "
                f"{_words(json.dumps(implements))}); name another driver."
            )
        self._activated = True

    def _answer(self, request: str, answer: Answer) -> dict[str, Any]:
        try:
            values = _parsed(answer.content) if answer.content.strip() else {}
        except (ValueError, RecursionError):
            values = None
        error = values.get("Err") if isinstance(values, dict) else None
        if error is not None and not isinstance(error, str):
            error = json.dumps(error)
        if error or answer.status != 200:
            text = error or f"HTTP {answer.status} {answer.content[:1000].decode(errors='replace')}"
            raise self._error(f"refuses {request}: {_words(text).rstrip('.')}; see its own messages.")
        if not isinstance(values, dict):
            self._odd(request, "no JSON object")
        return values

    def _odd(self, request: str, what: str) -> NoReturn:
        raise self._error(f"answers {request} with {what}; see its own messages.")

    def _object(self, values: Mapping[str, Any], key: str, request: str) -> dict[str, Any]:
        found = values.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict):
            self._odd(request, f"a {key} that is not an object")
        return found

    def _path(self, values: Mapping[str, Any], request: str) -> str:
        """The mountpoint in an answer as a path on this host, empty if missing."""
        path = values.get("Mountpoint")
        if path is None or path == "":
            return ""
        if not isinstance(path, str):
            self._odd(request, "a Mountpoint that is not a string")
        if len(path) > _LONGEST_PATH:
            self._odd(request, f"a Mountpoint of {len(path)} characters")
        try:
            plain = "\0" not in path and len(os.fsencode(path)) <= _LONGEST_PATH
        except UnicodeEncodeError:
            plain = False
        if not plain or not path.startswith("/") or ".." in path.split("/"):
            self._odd(
                request, f"the Mountpoint {_words(repr(path))}, which is not an absolute path without .."
            )
        found = self._address.host_path(path)
        if self._address.base and self._look(found, lambda: int(self._address.is_beyond(found))) == 1:
            self._odd(request, f"the Mountpoint {quoted(path)}, which leads out of the plugin by a symlink")
        return found

    # -- the driver ---------------------------------------------------------------------------------------

    def check(self, options: Mapping[str, str]) -> None:
        """No check here: the plugin checks its options in `create`."""

    def one_mount_each(self, volume: Volume) -> bool:
        """Always True: the plugin counts users by their IDs."""
        return True

    def create(self, volume: Volume) -> None:
        self._call("VolumeDriver.Create", {"Name": volume.name, "Opts": dict(volume.options)})

    def remove(self, volume: Volume) -> None:
        self._call("VolumeDriver.Remove", {"Name": volume.name})

    def mountpoint(self, volume: Volume) -> str:
        request = "VolumeDriver.Get"
        answer = self._call(request, {"Name": volume.name})
        return self._path(self._object(answer, "Volume", request), request)

    def _id(self, user: str) -> str:
        return hashlib.sha256(os.fsencode(user)).hexdigest()

    def mount(self, volume: Volume, user: str) -> str:
        request = {"Name": volume.name, "ID": self._id(user)}
        answer = self._call("VolumeDriver.Mount", request)
        try:
            path = self._path(answer, "VolumeDriver.Mount") or self._told_by_path(volume)
            self._check_directory(volume, path)
        except UserError:
            with suppress(UserError):
                self._call("VolumeDriver.Unmount", request)
            raise
        return path

    def _check_directory(self, volume: Volume, path: str) -> None:
        found = self._look(path, lambda: 0 if stat.S_ISDIR(os.stat(path).st_mode) else errno.ENOTDIR)
        if found:
            cause = "no directory here" if found == errno.ENOTDIR else "not to be used"
            raise self._error(
                f"says that volume {quoted(volume.name)} is at {quoted(path)}, which is {cause} "
                f"({os.strerror(found).lower()}); see its own messages."
            )

    def _look(self, path: str, action: Callable[[], int]) -> int:
        """The result of `look`. Raises UserError after the timeout."""
        with on_failure("no process can be started", "end some others"):
            found = looking.look(action, _LOOK_SECONDS)
        if found is None:
            raise self._error(
                f"names the directory {quoted(path)}, whose filesystem has not answered within "
                f"{_LOOK_SECONDS:.0f} s; restart what serves it."
            )
        return found

    def _told_by_path(self, volume: Volume) -> str:
        return self._path(self._call("VolumeDriver.Path", {"Name": volume.name}), "VolumeDriver.Path")

    def unmount(self, volume: Volume, user: str) -> None:
        if user:
            self._call("VolumeDriver.Unmount", {"Name": volume.name, "ID": self._id(user)})

    def restores_mounted(self, volume: Volume) -> bool:
        return True

    @contextmanager
    def replacement(self, volume: Volume) -> Iterator[Replacement]:
        path = self._told_by_path(volume)
        if not path:
            raise self._error(
                f"does not say where volume {quoted(volume.name)} is mounted; see its own messages."
            )
        self._check_directory(volume, path)
        with replacing.in_place(volume, path) as place:
            yield place

    def status(self, volume: Volume) -> Mapping[str, object]:
        request = "VolumeDriver.Get"
        until = time.monotonic() + _STATUS_SECONDS
        try:
            found = self._object(self._call(request, {"Name": volume.name}, until), "Volume", request)
            return self._object(found, "Status", request)
        except UserError as error:
            return {"error": str(error)}


def _words(text: str) -> str:
    """A plugin's text as a sentence fragment: one short line without control characters."""
    line = " ".join(text[: 4 * _LONGEST_WORDS].split())
    shown = "".join(char if char.isprintable() else "?" for char in line)
    return shown if len(shown) <= _LONGEST_WORDS else shown[:_LONGEST_WORDS] + "..."


def _parsed(content: bytes) -> Any:
    """Parse an answer's JSON (RFC 8259: neither NaN nor Infinity). Raises ValueError or RecursionError."""
    values = json.loads(content, parse_constant=_finite, parse_float=_finite)
    level = [values]
    for _ in range(_DEEPEST):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts if not isinstance(part, _PLAIN) for inner in part]
        if not level:
            return values
    raise ValueError("it is nested too deeply")


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text} is not a finite number")
    return found
