"""Docker's volume plugins: found as docker finds them, spoken to by the published protocol.

Sources: docs.docker.com/engine/extend/plugin_api (discovery, handshake) and plugins_volume (the VolumeDriver
requests); moby pkg/plugins/discovery.go, plugin/v2/plugin.go (paths of managed plugins).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from unionfs.daemon.errors import UserError, quoted
from unionfs.storage.drivers import replacing
from unionfs.storage.drivers.base import Driver, Replacement
from unionfs.storage.model import Volume

if TYPE_CHECKING:
    import httpx

ENVIRONMENT = "UNIONFS_PLUGIN_PATH"
"""Directories, separated by colons, to look in instead of docker's."""
_SOCKETS = ("/run/docker/plugins",)
_SPECS = ("/etc/docker/plugins", "/usr/lib/docker/plugins")
_MANAGED = "/var/lib/docker/plugins"
_ACCEPT = "application/vnd.docker.plugins.v1.2+json"
_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a plugin listens."""

    name: str
    url: str
    """`unix://PATH`, `tcp://HOST:PORT`, `http://` or `https://`."""
    tls: Mapping[str, Any] | None = None
    base: str = ""
    """Of a managed plugin: the directory that its paths are below."""
    propagated: str = ""
    """The part of its paths that is at `../propagated-mount` of `base`."""

    def host_path(self, path: str) -> str:
        """A path that the plugin names, as this host sees it."""
        if not self.base:
            return path
        if self.propagated and path.startswith(self.propagated):
            return f"{os.path.dirname(self.base)}/propagated-mount{path[len(self.propagated) :]}"
        return self.base + path


def _directories() -> tuple[tuple[str, ...], tuple[str, ...]]:
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        places = tuple(path for path in chosen.split(":") if path)
        return places, places
    return _SOCKETS, _SPECS


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def plugin_names() -> list[str]:
    """The plugins that can be found without asking them anything."""
    sockets, specs = _directories()
    names = set()
    for directory in sockets:
        for path in glob.glob(f"{directory}/**/*.sock", recursive=True):
            names.add(_name_of(path[len(directory) + 1 :], ".sock"))
    for directory in specs:
        for ending in (".spec", ".json"):
            for path in glob.glob(f"{directory}/**/*{ending}", recursive=True):
                names.add(_name_of(path[len(directory) + 1 :], ending))
    return sorted(names)


def _name_of(path: str, ending: str) -> str:
    path = path.removesuffix(ending)
    parent, _, name = path.rpartition("/")
    # A plugin may have a directory of its own name.
    return parent if parent == name else path


def find_plugin(name: str) -> Plugin | None:
    """The plugin of that name, or None. Raises UserError for one whose description is misspelt."""
    address = _find(name)
    return None if address is None else Plugin(address)


def _find(name: str) -> Address | None:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        return None
    last = name.rpartition("/")[2]
    sockets, specs = _directories()
    for directory in sockets:
        for path in (f"{directory}/{name}.sock", f"{directory}/{name}/{last}.sock"):
            if _is_socket(path):
                return Address(name, f"unix://{path}")
    for directory in specs:
        for path in (f"{directory}/{name}.spec", f"{directory}/{name}/{last}.spec"):
            if os.path.isfile(path):
                return Address(name, _checked_url(_read(path).strip(), path))
        for path in (f"{directory}/{name}.json", f"{directory}/{name}/{last}.json"):
            if os.path.isfile(path):
                return _from_json(name, path)
    return None if os.environ.get(ENVIRONMENT) else _find_managed(name)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as source:
            return source.read(1 << 20)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the plugin description {quoted(path)} cannot be read: {error}; correct it."
        ) from error


def _checked_url(url: str, path: str) -> str:
    if urlsplit(url).scheme not in ("unix", "tcp", "http", "https"):
        raise UserError(
            f"the plugin description {quoted(path)} has the address {quoted(url)}; it must begin with "
            "unix://, tcp://, http:// or https://."
        )
    return url


def _from_json(name: str, path: str) -> Address:
    try:
        values = json.loads(_read(path))
        url, tls = str(values["Addr"]), values.get("TLSConfig")
        if tls is not None and not isinstance(tls, dict):
            raise TypeError("TLSConfig is no object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the plugin description {quoted(path)} is misspelt ({error}); correct it."
        ) from error
    return Address(name, _checked_url(url, path), tls)


def _find_managed(name: str) -> Address | None:
    """A plugin that `docker plugin install` has put there and that is enabled."""
    wanted = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    for path in glob.glob(f"{_MANAGED}/*/config.json"):
        try:
            with open(path, encoding="utf-8") as source:
                plugin = json.load(source)["plugin"]
            if plugin["Name"] != wanted:
                continue
            config = plugin["Config"]
            socket = f"{_SOCKETS[0]}/{plugin['Id']}/{config['Interface']['Socket']}"
            propagated = str(config.get("PropagatedMount") or "")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not _is_socket(socket):
            raise UserError(
                f"the plugin {quoted(name)} is installed but does not run; `docker plugin enable {name}`."
            )
        return Address(name, f"unix://{socket}", None, f"{os.path.dirname(path)}/rootfs", propagated)
    return None


class Plugin(Driver):
    """A volume plugin as a driver. The plugin keeps its volumes; here is only which ones are ours."""

    def __init__(self, address: Address) -> None:
        self.name = address.name
        self._address = address
        self._activated = False

    @property
    def scope(self) -> str:  # type: ignore[override]
        """What the plugin says of itself; an old one says nothing."""
        try:
            answer = self._call("VolumeDriver.Capabilities", {})
            found = answer.get("Capabilities", {}).get("Scope", "local")
        except (UserError, AttributeError):
            return "local"
        return "global" if found == "global" else "local"

    # -- the protocol -------------------------------------------------------------------------------------

    def _client(self) -> httpx.Client:
        import httpx

        url = self._address.url
        # A proxy in the environment is for the web.
        if url.startswith("unix://"):
            transport = httpx.HTTPTransport(uds=url.removeprefix("unix://"))
            return httpx.Client(
                transport=transport, base_url="http://plugin", timeout=_SECONDS, trust_env=False
            )
        if url.startswith("tcp://"):
            url = ("https://" if self._address.tls else "http://") + url.removeprefix("tcp://")
        return httpx.Client(base_url=url, timeout=_SECONDS, trust_env=False, verify=self._tls())

    def _tls(self) -> Any:
        tls = self._address.tls
        if not tls:
            return True
        import ssl

        try:
            context = ssl.create_default_context(cafile=tls.get("CAFile") or None)
            if tls.get("InsecureSkipVerify"):
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if tls.get("CertFile"):
                context.load_cert_chain(tls["CertFile"], tls.get("KeyFile") or None)
        except OSError as error:
            raise UserError(
                f"the certificates of the volume plugin {quoted(self.name)} cannot be read: {error}; check "
                "its TLSConfig."
            ) from error
        return context

    def _call(self, request: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
        """One request. Raises UserError with the plugin's own words."""
        import httpx

        body = b"" if values is None else json.dumps(values).encode()
        try:
            with self._client() as client:
                if not self._activated and request != "Plugin.Activate":
                    self._activate(client)
                answer = client.post(f"/{request}", content=body, headers={"Accept": _ACCEPT})
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise UserError(
                f"the volume plugin {quoted(self.name)} at {quoted(self._address.url)} does not answer: "
                f"{error}; start it, or remove what describes it."
            ) from error
        return self._answer(request, answer)

    def _activate(self, client: httpx.Client) -> None:
        found = self._answer("Plugin.Activate", client.post("/Plugin.Activate", headers={"Accept": _ACCEPT}))
        implements = found.get("Implements")
        if not isinstance(implements, list) or "VolumeDriver" not in implements:
            raise UserError(
                f"the plugin {quoted(self.name)} is no volume plugin (it implements {implements}); name "
                "another driver."
            )
        self._activated = True

    def _answer(self, request: str, answer: httpx.Response) -> dict[str, Any]:
        try:
            values = answer.json() if answer.content.strip() else {}
        except ValueError:
            values = None
        error = values.get("Err") if isinstance(values, dict) else None
        if error or answer.status_code != 200:
            text = str(error) if error else f"HTTP {answer.status_code} {answer.text.strip()[:200]}"
            raise UserError(
                f"the volume plugin {quoted(self.name)} refuses {request}: "
                f"{' '.join(text.split()).rstrip('.')}; see its own messages."
            )
        if not isinstance(values, dict):
            raise UserError(
                f"the volume plugin {quoted(self.name)} answers {request} with no JSON object; see its own "
                "messages."
            )
        return values

    # -- the driver ---------------------------------------------------------------------------------------

    def check(self, options: Mapping[str, str]) -> None:
        """The plugin knows its options itself; it says so in `create`."""

    def one_mount_each(self, volume: Volume) -> bool:
        """The plugin counts the users, by an ID each."""
        return True

    def create(self, volume: Volume) -> None:
        self._call("VolumeDriver.Create", {"Name": volume.name, "Opts": dict(volume.options)})

    def remove(self, volume: Volume) -> None:
        self._call("VolumeDriver.Remove", {"Name": volume.name})

    def mountpoint(self, volume: Volume) -> str:
        found = self._call("VolumeDriver.Get", {"Name": volume.name}).get("Volume")
        path = str(found.get("Mountpoint") or "") if isinstance(found, dict) else ""
        return self._address.host_path(path) if path else ""

    def _id(self, user: str) -> str:
        return hashlib.sha256(os.fsencode(user)).hexdigest()

    def mount(self, volume: Volume, user: str) -> str:
        request = {"Name": volume.name, "ID": self._id(user)}
        path = str(self._call("VolumeDriver.Mount", request).get("Mountpoint") or "")
        if not path:
            path = str(self._call("VolumeDriver.Path", {"Name": volume.name}).get("Mountpoint") or "")
        path = self._address.host_path(path) if path else ""
        if not path.startswith("/") or not os.path.isdir(path):
            with suppress(UserError):
                self._call("VolumeDriver.Unmount", request)
            raise UserError(
                f"the volume plugin {quoted(self.name)} says that volume {quoted(volume.name)} is at "
                f"{quoted(path)}, which is no directory here; see its own messages."
            )
        return path

    def unmount(self, volume: Volume, user: str) -> None:
        if user:
            self._call("VolumeDriver.Unmount", {"Name": volume.name, "ID": self._id(user)})

    def restores_mounted(self, volume: Volume) -> bool:
        return True

    @contextmanager
    def replacement(self, volume: Volume) -> Iterator[Replacement]:
        path = str(self._call("VolumeDriver.Path", {"Name": volume.name}).get("Mountpoint") or "")
        if not path:
            raise UserError(
                f"the volume plugin {quoted(self.name)} does not tell where {quoted(volume.name)} is mounted."
            )
        with replacing.in_place(volume, self._address.host_path(path)) as place:
            yield place

    def status(self, volume: Volume) -> Mapping[str, object]:
        try:
            found = self._call("VolumeDriver.Get", {"Name": volume.name}).get("Volume")
        except UserError as error:
            return {"error": str(error)}
        status = found.get("Status") if isinstance(found, dict) else None
        return status if isinstance(status, dict) else {}
