"""The store of images: layers, each unpacked once and shared between mounts, and the images made of them.

    ROOT/images/records/ID.json                one image: its configuration, names and layers
    ROOT/images/layers/KIND/DIFFID/root        a layer, in the kernel's format
    ROOT/images/layers/KIND/DIFFID/layer.json  what it has, and where it came from
    ROOT/images/layers/KIND/.new-DIFFID        being unpacked, or left by a process that was killed
    ROOT/images/locks/KIND-DIFFID              held shared by users, exclusively for unpacking and removal

A layer exists once its directory has its name, which it gets by one rename when all of it is on disk. KIND
says who can read its markers and owners: `trusted` (trusted.overlay.*, root), `user` (user.overlay.*), and
`mapped` (user.overlay.*, with the owners of a user namespace, which an ordinary user cannot store).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.images import documents
from unionfs.images.blobs import Blob, unpack_blob
from unionfs.images.locks import hold, try_alone
from unionfs.images.rules import Rules
from unionfs.images.sources import ImageSource
from unionfs.storage import jsonfiles
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.root import make_directory, open_root
from unionfs.sys.calls import syncfs
from unionfs.sys.capabilities import is_host_root
from unionfs.sys.fds import directory, is_directory
from unionfs.sys.trees import remove_path
from unionfs.union.markers import Markers
from unionfs.union.resting import TRUSTED, USER

TRUSTED_KIND: Final = "trusted"
_NEW: Final = ".new-"
_SHORTEST_ID: Final = 4


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the store."""

    id: str
    """The hexadecimal digest of its configuration."""
    names: tuple[str, ...]
    config: bytes
    layers: tuple[str, ...]
    """Hexadecimal diff ids, the lowest first."""
    source: str
    """The reference that it was unpacked from."""
    added: float
    """Seconds since the epoch."""


def kind_of(userxattr: bool) -> str:
    """The kind of layers that this process unpacks and reads."""
    if not userxattr:
        return TRUSTED_KIND
    return "mapped" if os.geteuid() == 0 and not is_host_root() else "user"


def markers_of(kind: str) -> Markers:
    return Markers(TRUSTED if kind == TRUSTED_KIND else USER)


class Store:
    """The images below one storage root. Nothing is made before it is needed."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.path = f"{root}/images"

    def _prepare(self, *names: str) -> None:
        open_root(self._root)
        for name in ("", *names):
            make_directory(f"{self.path}/{name}".rstrip("/"))

    # -- layers -------------------------------------------------------------------------------------------

    def layer(self, kind: str, diff_id: str) -> str:
        """The directory of a layer's files."""
        return f"{self.path}/layers/{kind}/{diff_id}/root"

    def has_layer(self, kind: str, diff_id: str) -> bool:
        """Raises UserError if that is not known."""
        with on_failure(f"the layer {diff_id} cannot be used", "check the store"):
            return is_directory(self.layer(kind, diff_id))

    def facts(self, kind: str, diff_id: str) -> dict[str, Any]:
        """What is known about a layer. Raises UserError."""
        path = f"{self.path}/layers/{kind}/{diff_id}/layer.json"
        with on_failure(f"the layer {diff_id} has no readable record", f"remove {path}", OSError, ValueError):
            found: dict[str, Any] = jsonfiles.read(path)
        return found

    def all_layers(self) -> Iterator[tuple[str, str]]:
        """The kind and diff id of every layer, also of those that are being unpacked."""
        for kind in _names(f"{self.path}/layers"):
            for name in _names(f"{self.path}/layers/{kind}"):
                yield kind, name

    def lock_path(self, kind: str, diff_id: str) -> str:
        return f"{self.path}/locks/{kind}-{diff_id}"

    def _use_layer(
        self, kind: str, diff_id: str, blob: Blob, rules: Rules, held: ExitStack, progress: Progress,
        new: dict[str, list[str]],
    ) -> None:  # fmt: skip
        """Hold a layer, which is unpacked first if it is missing; then its notes are in `new`, also if it
        cannot be held afterwards. Raises UserError.
        """
        lock = self.lock_path(kind, diff_id)
        while True:
            shared = hold(lock, alone=False)
            if self.has_layer(kind, diff_id):
                held.enter_context(shared)
                return
            shared.close()
            with hold(lock, alone=True):
                if not self.has_layer(kind, diff_id):
                    new[diff_id] = self._unpack(kind, diff_id, blob, rules, progress)

    def _unpack(
        self, kind: str, diff_id: str, blob: Blob, rules: Rules, progress: Progress
    ) -> list[str]:
        above = make_directory(f"{self.path}/layers/{kind}")
        new = f"{above}/{_NEW}{diff_id}"
        complaint = f"{blob.name} cannot be unpacked below {quoted(above)}"
        with on_failure(complaint, "free space, or name another --root"):
            remove_path(new, unlock=True)
            os.mkdir(new, 0o700)
            place = new
            try:
                os.mkdir(f"{new}/root", 0o700)
                contents, _ = unpack_blob(blob, f"{new}/root", markers_of(kind), rules, progress)
                facts = {**asdict(contents), "digest": blob.digest, "blob_size": blob.size}
                jsonfiles.write(f"{new}/layer.json", facts, sync=False)
                with directory(new) as fd:
                    syncfs(fd)
                os.rename(new, f"{above}/{diff_id}")
                place = f"{above}/{diff_id}"
                with directory(above) as fd:
                    os.fsync(fd)
            except BaseException:
                with suppress(OSError):
                    if place != new:
                        os.rename(place, new)
                    remove_path(new, unlock=True)
                raise
        return contents.notes

    @contextmanager
    def workspace(self, kind: str) -> Iterator[str]:
        """A directory for layers that are unpacked for a moment. Raises UserError."""
        self._prepare("layers", "locks", "records")
        name = f"work-{secrets.token_hex(8)}"
        with hold(self.lock_path(kind, name), alone=True):
            path = f"{make_directory(f'{self.path}/layers/{kind}')}/{_NEW}{name}"
            try:
                os.mkdir(path, 0o700)
                yield path
            finally:
                with suppress(UserError):  # what was made of the layers is there; `prune` finds the rest
                    self._remove_layer(kind, f"{_NEW}{name}")

    # -- images -------------------------------------------------------------------------------------------

    @contextmanager
    def added(
        self,
        source: ImageSource,
        kind: str,
        rules: Rules,
        notes: list[str],
        progress: Progress = UNSEEN,
    ) -> Iterator[tuple[Image, list[str]]]:
        """An image from a source, and its `paths`; nobody removes its layers meanwhile. Raises UserError."""
        self._prepare("layers", "locks", "records")
        layers = tuple(documents.check_digest(blob.diff_id or "") for blob in source.layers)
        missing = {diff_id: blob.size for diff_id, blob in zip(layers, source.layers, strict=True)
                   if not self.has_layer(kind, diff_id)}  # fmt: skip
        progress.expects(sum(missing.values()))
        new: dict[str, list[str]] = {}
        with ExitStack() as held:
            try:
                for diff_id, blob in zip(layers, source.layers, strict=True):
                    self._use_layer(kind, diff_id, blob, rules, held, progress, new)
                image = Image(source.id, source.names, source.config, layers, source.where, time.time())
                lowers = self.paths(image, kind)
                image = self._save(image)
            except BaseException:
                held.close()
                with suppress(UserError, OSError), self._records():
                    self._remove_unused([(kind, diff_id) for diff_id in new], {})
                raise
            notes += [note for said in new.values() for note in said]
            yield image, lowers

    @contextmanager
    def used(self, image: Image, kind: str) -> Iterator[list[str]]:
        """The `paths` of an image of the store, whose layers nobody removes meanwhile. Raises UserError."""
        self._prepare("layers", "locks", "records")
        with ExitStack() as held:
            for diff_id in image.layers:
                held.enter_context(hold(self.lock_path(kind, diff_id), alone=False))
                if not self.has_layer(kind, diff_id):
                    raise UserError(
                        f"the layer {diff_id[:12]} of image {shown(image)} is not unpacked for such a mount; "
                        f"name the archive instead, as {quoted(image.source)}."
                    )
            yield self.paths(image, kind)

    def paths(self, image: Image, kind: str) -> list[str]:
        """The layers of an image as lowers, topmost first. Those below an opaque root are left out. Raises
        UserError, also if it has none.
        """
        if not image.layers:
            raise UserError(
                f"image {shown(image)} has no layers, so there is nothing to mount; choose another."
            )
        found = []
        # The lower one of two equal layers is hidden by the other.
        for diff_id in dict.fromkeys(reversed(image.layers)):
            found.append(self.layer(kind, diff_id))
            if self.facts(kind, diff_id)["root_opaque"]:
                break
        return found

    def _save(self, image: Image) -> Image:
        with self._records():
            for other in self.images():
                if other.id == image.id:
                    image = _merged(other, image)
                elif taken := set(other.names) & set(image.names):
                    left = tuple(name for name in other.names if name not in taken)
                    self._write(_renamed(other, left))
            self._write(image)
        return image

    def _write(self, image: Image) -> None:
        values = {**asdict(image), "config": image.config.decode()}
        jsonfiles.write(f"{self.path}/records/{image.id}.json", values)

    @contextmanager
    def _records(self) -> Iterator[None]:
        complaint = f"the images in {quoted(self.path)} cannot be recorded"
        with hold(f"{self.path}/locks/records", alone=True), on_failure(complaint, "free space"):
            yield

    def images(self) -> list[Image]:
        """All images, oldest first. Raises UserError."""
        found = []
        for name in _names(f"{self.path}/records"):
            path = f"{self.path}/records/{name}"
            if name.endswith(".json"):
                try:
                    found.append(_from_json(jsonfiles.read(path)))
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise UserError(
                        f"the image record {quoted(path)} cannot be read: {reason(error)}; try again."
                    ) from error
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"the image record {quoted(path)} is damaged ({error}); remove it."
                    ) from error
        return sorted(found, key=lambda image: (image.added, image.id))

    def find(self, text: str) -> Image:
        """An image by its name, or its id or the beginning of that. Raises UserError."""
        known = self.images()
        wanted = text.removeprefix("sha256:")
        named = [image for image in known if any(_is_named(name, text) for name in image.names)]
        if not named and len(wanted) >= _SHORTEST_ID:
            named = [image for image in known if image.id.startswith(wanted)]
        if len(named) == 1:
            return named[0]
        if named:
            raise UserError(f"{quoted(text)} matches several images; give more of the name or id.")
        raise UserError(
            f"there is no image {quoted(text)} in {quoted(self.path)}; `unionfs image ls` lists them, and "
            "oci-archive:FILE, docker-archive:FILE or oci:DIR names one outside."
        )

    # -- removing -----------------------------------------------------------------------------------------

    def remove(self, images: Sequence[Image], users: Mapping[str, str]) -> list[str]:
        """Remove images, and the layers that no other image has. Returns the directories of these layers.

        `users`: the user of each layer, by its directory. Raises UserError for an image in use, and removes
        nothing of it.
        """
        self._prepare("locks", "records")
        gone = []
        for image in images:
            with self._records():
                others = {diff_id for one in self.images() if one.id != image.id for diff_id in one.layers}
                alone = set(image.layers) - others
                with ExitStack() as held:
                    doomed = [
                        (kind, diff_id) for kind, diff_id in self.all_layers() if diff_id in set(image.layers)
                    ]
                    for kind, diff_id in doomed:
                        self._refuse_used(image, kind, diff_id, users, held)
                    with suppress(FileNotFoundError):
                        os.unlink(f"{self.path}/records/{image.id}.json")
                    gone += [self._remove_layer(*one) for one in doomed if one[1] in alone]
        return gone

    def _refuse_used(
        self, image: Image, kind: str, diff_id: str, users: Mapping[str, str], held: ExitStack
    ) -> None:
        user = users.get(self.layer(kind, diff_id))
        lock = None if user else try_alone(self.lock_path(kind, diff_id))
        if lock is None:
            raise UserError(
                f"image {shown(image)} cannot be removed: {user or 'another process'} uses it; end that "
                "first."
            )
        held.enter_context(lock)

    def prune(self, users: Mapping[str, str]) -> list[str]:
        """Remove layers that no image has and nobody uses, and what killed processes left.

        Returns the removed directories.
        """
        self._prepare("locks", "records")
        with self._records():
            gone = self._remove_unused(list(self.all_layers()), users)
            self._remove_locks()
        return gone

    def _remove_locks(self) -> None:
        """Remove the locks of layers that are gone."""
        layers = {f"{kind}-{name.removeprefix(_NEW)}" for kind, name in self.all_layers()}
        for name in {*_names(f"{self.path}/locks")} - {*layers, "records"}:
            if (lock := try_alone(f"{self.path}/locks/{name}")) is not None:
                with lock, suppress(OSError):
                    os.unlink(f"{self.path}/locks/{name}")

    def _remove_unused(self, layers: Sequence[tuple[str, str]], users: Mapping[str, str]) -> list[str]:
        """Remove those of the layers that no image has and nobody uses. Returns their directories."""
        gone = []
        known = {diff_id for image in self.images() for diff_id in image.layers}
        for kind, name in layers:
            diff_id = name.removeprefix(_NEW)
            if name in known or self.layer(kind, name) in users:
                continue
            if (lock := try_alone(self.lock_path(kind, diff_id))) is not None:
                with lock:
                    gone.append(self._remove_layer(kind, name))
        return gone

    def _remove_layer(self, kind: str, name: str) -> str:
        """Remove a layer, whose lock is held exclusively. It loses its name first."""
        path = f"{self.path}/layers/{kind}/{name}"
        doomed = f"{self.path}/layers/{kind}/{_NEW}{name.removeprefix(_NEW)}"
        with on_failure(f"the layer {quoted(path)} cannot be removed", "check its permissions"):
            if doomed != path:
                remove_path(doomed, unlock=True)
                os.rename(path, doomed)
            remove_path(doomed, unlock=True)
            if name.removeprefix(_NEW) == name or not self.has_layer(kind, name.removeprefix(_NEW)):
                with suppress(FileNotFoundError):
                    os.unlink(self.lock_path(kind, name.removeprefix(_NEW)))
        return path


def shown(image: Image) -> str:
    """An image's name, or the beginning of its id."""
    return quoted(image.names[0]) if image.names else image.id[:12]


def _is_named(name: str, text: str) -> bool:
    """Whether a text means this name; it may omit the registry and the tag `latest`."""
    return any(name == word or name.endswith(f"/{word}") for word in (text, f"{text}:latest"))


def _merged(old: Image, new: Image) -> Image:
    names = tuple(dict.fromkeys((*old.names, *new.names)))
    return Image(new.id, names, new.config, new.layers, new.source, old.added)


def _renamed(image: Image, names: tuple[str, ...]) -> Image:
    return Image(image.id, names, image.config, image.layers, image.source, image.added)


def _from_json(values: Any) -> Image:
    return Image(
        str(values["id"]), tuple(map(str, values["names"])), str(values["config"]).encode(),
        tuple(map(str, values["layers"])), str(values["source"]), float(values["added"]),
    )  # fmt: skip


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []
