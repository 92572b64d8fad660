"""The requests of Docker's volume plugin protocol, and their answers. No network.

Sources: docs.docker.com/engine/extend/plugin_api (handshake, status codes) and plugins_volume (the
VolumeDriver requests). An error is HTTP 500 with a sentence in `Err`: podman ignores `Err` in a good answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from unionfs.errors import UserError, quoted, reason_at
from unionfs.settings.names import check_name
from unionfs.storage.drivers import find_driver
from unionfs.storage.holds import Engine
from unionfs.storage.model import Volume, VolumeUser
from unionfs.storage.volumes import NoVolumeError, Volumes
from unionfs.sys.mountspaces import is_seen_by

_DRIVER: Final = "driver"
"""The option that chooses a volume's driver; all others are the driver's own."""
_LONGEST_ID: Final = 1024
_log = logging.getLogger(__name__)

_Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer by HTTP: a status code and a JSON object."""

    status: int
    content: bytes
    undo: Callable[[], object] | None = None
    """What to do if the engine no longer waits for the answer."""


def failure(sentence: str, status: int = 500) -> Answer:
    """Returns the answer for an error."""
    return Answer(status, _encoded({"Err": sentence}))


def _encoded(values: _Values) -> bytes:
    return json.dumps(values).encode("ascii") + b"\n"


class Requests:
    """Answers requests for the volumes of a storage root. Threads may call it at the same time."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._known: dict[str, Callable[[_Values, int], _Values]] = {
            "Plugin.Activate": lambda values, caller: {"Implements": ["VolumeDriver"]},
            "VolumeDriver.Capabilities": lambda values, caller: {"Capabilities": {"Scope": "local"}},
            "VolumeDriver.Create": self._create,
            "VolumeDriver.Get": self._get,
            "VolumeDriver.List": self._list,
            "VolumeDriver.Mount": self._mount,
            "VolumeDriver.Unmount": self._unmount,
            "VolumeDriver.Path": self._path,
            "VolumeDriver.Remove": self._remove,
        }

    def answer(self, request: str, body: bytes, caller: int) -> Answer:
        """Answer a request, such as `VolumeDriver.Get`, of process `caller`. Raises nothing."""
        action = self._known.get(request)
        if action is None:
            return failure(f"the request {quoted(request)} is not known to a volume plugin.", 404)
        try:
            values = _decoded(body)
            answer = action(values, caller)
        except UserError as error:
            return failure(str(error))
        except OSError as error:
            return failure(f"{reason_at(error)}; check the path and the permissions.")
        except Exception:
            _log.exception("%s failed", request)
            return failure(f"{request} failed by an error in unionfs itself; its log has the details.")
        undo = partial(self._unmount, values, caller) if request == "VolumeDriver.Mount" else None
        return Answer(200, _encoded(answer), undo)

    def _volumes(self) -> Volumes:
        return Volumes(self._root, tell=_log.warning)

    def _create(self, values: _Values, caller: int) -> _Values:
        options = _options(values)
        driver = options.pop(_DRIVER, "") or None
        self._volumes().create(_name(values), driver=driver, options=options)
        return {"Err": ""}

    def _get(self, values: _Values, caller: int) -> _Values:
        """A volume that exists is always found: one error would hide all volumes from `podman volume ls`."""
        volumes, name = self._volumes(), _name(values)
        try:
            volume = volumes.get(name)
            users = volumes.users(name)
        except NoVolumeError:
            raise
        except UserError as error:
            return {"Volume": {"Name": name, "Mountpoint": "", "Status": {"error": str(error)}}, "Err": ""}
        status = {"driver": volume.driver, "users": [str(user) for user in users], **_status(volume)}
        return {"Volume": {**_described(volume, users), "Status": status}, "Err": ""}

    def _list(self, values: _Values, caller: int) -> _Values:
        volumes = self._volumes()
        users = volumes.all_users()
        found = [_described(volume, users.get(volume.name, [])) for volume in volumes.all()]
        return {"Volumes": found, "Err": ""}

    def _mount(self, values: _Values, caller: int) -> _Values:
        volumes, name, user = self._volumes(), _name(values), VolumeUser.of_engine(_mount_id(values))
        engine = Engine.of_process(caller)
        path = volumes.attach(name, user, engine=engine)
        if not is_seen_by(path, caller):
            # Its containers would write into the directory below the mount.
            volumes.detach(name, user)
            raise UserError(
                f"the mount of volume {quoted(name)} does not reach {quoted(engine.name)} (pid {caller}), "
                "which has a mount namespace of its own; run both in one, or make / shared (mount "
                "--make-rshared /) and restart it."
            )
        return {"Mountpoint": path, "Err": ""}

    def _unmount(self, values: _Values, caller: int) -> _Values:
        self._volumes().detach(_name(values), VolumeUser.of_engine(_mount_id(values)))
        return {"Err": ""}

    def _path(self, values: _Values, caller: int) -> _Values:
        volumes, name = self._volumes(), _name(values)
        return {"Mountpoint": _mountpoint(volumes.get(name), volumes.users(name)), "Err": ""}

    def _remove(self, values: _Values, caller: int) -> _Values:
        self._volumes().remove(_name(values), engine=Engine.of_process(caller))
        return {"Err": ""}


def _described(volume: Volume, users: list[VolumeUser]) -> _Values:
    created = datetime.fromtimestamp(volume.created, UTC).isoformat(timespec="seconds")
    return {
        "Name": volume.name,
        "Mountpoint": _mountpoint(volume, users),
        "CreatedAt": created.replace("+00:00", "Z"),
    }


def _mountpoint(volume: Volume, users: list[VolumeUser]) -> str:
    return volume.mountpoint or (users[0].path if users else "")


def _status(volume: Volume) -> Mapping[str, object]:
    try:
        return find_driver(volume.driver).status(volume)
    except (UserError, OSError) as error:
        return {"error": str(error)}


def _decoded(body: bytes) -> _Values:
    """The values of a request; an empty body has none. Raises UserError."""
    try:
        values = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError("the request is not a JSON object; send one, or an empty body.")
    return values


def _name(values: _Values) -> str:
    return check_name(_text(values, "Name"))


def _mount_id(values: _Values) -> str:
    text = _text(values, "ID")
    if len(text) > _LONGEST_ID:
        raise UserError(f"the ID of the mount has {len(text)} characters; at most {_LONGEST_ID} fit.")
    return text


def _text(values: _Values, key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str) or not text:
        raise UserError(f"the request has no {key}; send it as a string.")
    if not text.isprintable():  # nor halves of surrogate pairs, which are in no file name
        raise UserError(f"the {key} {quoted(text)} has characters that cannot be printed; leave them out.")
    return text


def _options(values: _Values) -> dict[str, str]:
    options = values.get("Opts") or {}
    if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
        raise UserError("the volume options (Opts) are not a JSON object of strings; send one, or none.")
    for text in (*options, *options.values()):
        if not _is_unicode(text) or "\0" in text:
            raise UserError(
                f"the volume option {quoted(text)} has bytes that no option can have; leave them out."
            )
    return dict(options)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
