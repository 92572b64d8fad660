"""Images outside the store, under the names of containers/image (containers-transports(5)):

    oci-archive:FILE[:TAG]       a tar of an OCI layout
    oci:DIR[:TAG]                an OCI layout (OCI image-spec, image-layout.md)
    docker-archive:FILE[:NAME]   what `docker save` and `podman save` write

An image is read in place. What names its content is checked when that is read: documents here, layers when
they are unpacked (`blobs`). Pulling from registries is skopeo's work.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.images import documents
from unionfs.images.blobs import Blob, explained
from unionfs.images.documents import Descriptor, Index, Manifest, SavedImage
from unionfs.images.rules import Refused, Rules
from unionfs.images.tarfiles import TarFiles
from unionfs.storage.archive.headers import Malformed
from unionfs.sys.fds import close_quietly
from unionfs.sys.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

TRANSPORTS: Final = ("oci-archive", "docker-archive", "oci")
_REMOTE: Final = ("docker", "docker-daemon", "containers-storage", "dir")
_DEEPEST_INDEX: Final = 3
_FILE: Final = os.O_RDONLY | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image that can be read, until its source is closed."""

    where: str
    """Its reference, with an absolute path."""
    names: tuple[str, ...]
    id: str
    """The hexadecimal digest of the configuration."""
    config: bytes
    layers: tuple[Blob, ...]
    """The lowest first; all have diff ids."""


def is_reference(text: str) -> bool:
    """Whether it names a source, rather than an image of the store."""
    return text.partition(":")[0] in (*TRANSPORTS, *_REMOTE) and ":" in text


def split(reference: str) -> tuple[str, str, str]:
    """The transport, absolute path and tag of a reference. Raises UserError."""
    transport, colon, rest = reference.partition(":")
    if transport in _REMOTE and colon:
        raise UserError(
            f"{quoted(reference)} is not on this host's disk; fetch it with "
            f"`skopeo copy {quoted(reference)} oci-archive:FILE`, and name that file."
        )
    if transport not in TRANSPORTS or not rest:
        raise UserError(
            f"{quoted(reference)} names no image; write oci-archive:FILE, docker-archive:FILE or oci:DIR."
        )
    path, colon, tag = rest.partition(":")
    if not path:
        raise UserError(f"{quoted(reference)} names no file; write {transport}:PATH.")
    return transport, os.path.abspath(path), tag if colon else ""


@contextmanager
def opened(reference: str, rules: Rules) -> Iterator[ImageSource]:
    """Open an image. Raises UserError."""
    transport, path, tag = split(reference)
    where = f"{transport}:{path}"
    with ExitStack() as stack:
        with on_failure(f"the image {quoted(where)} cannot be read", "check the path"):
            flags = os.O_DIRECTORY if transport == "oci" else os.O_NONBLOCK
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
            stack.callback(close_quietly, fd)
            with explained(f"the image {quoted(where)}"):
                files: _Files = _Directory(fd, stack) if transport == "oci" else _Archive(fd)
                image = (_saved if transport == "docker-archive" else _layout)(files, where, tag)
                _check_platform(image, rules)
        yield image


def _check_platform(image: ImageSource, rules: Rules) -> None:
    config = documents.decode_config(image.config)
    if not rules.any_platform and not documents.runs_here(config.architecture, config.os):
        raise Refused(
            f"it is for {config.os[:40]}/{config.architecture[:40]}, and this is linux/{documents.machine()}",
            "name one for this machine, or accept it by --any-platform of `image import`",
        )


class _Files(ABC):
    """The files of an image's archive or directory."""

    @abstractmethod
    def find(self, name: str) -> tuple[int, int, int]:
        """The fd, offset and size of a file. Raises Malformed and OSError."""

    @abstractmethod
    def has(self, name: str) -> bool: ...

    def document(self, name: str) -> bytes:
        """The content of a JSON file. Raises Malformed."""
        fd, offset, size = self.find(name)
        if size > documents.MOST_JSON:
            raise Malformed(f"its {name} is larger than {documents.MOST_JSON >> 20} MiB")
        return os.pread(fd, size, offset)

    def blob(self, descriptor: Descriptor) -> tuple[int, int]:
        """The fd and offset of a blob, whose size is checked. Raises Malformed."""
        digits = documents.check_digest(descriptor.digest)
        fd, offset, size = self.find(f"blobs/sha256/{digits}")
        if size != descriptor.size:
            raise Malformed(f"its blob {descriptor.digest} has {size} bytes, and not {descriptor.size}")
        return fd, offset

    def checked(self, descriptor: Descriptor, what: str) -> bytes:
        """The content of a blob that is a document. Raises Malformed."""
        fd, offset = self.blob(descriptor)
        if descriptor.size > documents.MOST_JSON:
            raise Malformed(f"its {what} is larger than {documents.MOST_JSON >> 20} MiB")
        data = os.pread(fd, descriptor.size, offset)
        if hashlib.sha256(data).hexdigest() != documents.check_digest(descriptor.digest):
            raise Malformed(f"its {what} does not have the digest {descriptor.digest}")
        return data


class _Archive(_Files):
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._tar = TarFiles(fd)

    def find(self, name: str) -> tuple[int, int, int]:
        return (self._fd, *self._tar.find(name))

    def has(self, name: str) -> bool:
        return self._tar.has(name)


class _Directory(_Files):
    def __init__(self, fd: int, stack: ExitStack) -> None:
        self._root = fd
        self._stack = stack

    def find(self, name: str) -> tuple[int, int, int]:
        try:
            fd = openat2(self._root, os.fsencode(name), _FILE, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
        except OSError as error:
            raise Malformed(f"its file {quoted(name)} cannot be read ({reason(error)})") from error
        self._stack.callback(close_quietly, fd)
        return fd, 0, os.fstat(fd).st_size

    def has(self, name: str) -> bool:
        with suppress(OSError):
            os.stat(name, dir_fd=self._root, follow_symlinks=False)
            return True
        return False


def _layout(files: _Files, where: str, tag: str) -> ImageSource:
    if not files.has("oci-layout"):
        raise Malformed("it has no file oci-layout, so it is not in the OCI format")
    version = documents.decode(files.document("oci-layout"), documents.Layout, "oci-layout").version
    if version.partition(".")[0] != "1":
        raise Malformed(f"it has the layout {version[:40]!r}, which is not known")
    index = documents.decode(files.document("index.json"), Index, "index")
    chosen = _choose(index, tag)
    name = (chosen.annotations or {}).get(documents.REF_NAME, "")
    for _ in range(_DEEPEST_INDEX):
        if not documents.is_index(chosen):
            break
        chosen = _for_here(documents.decode(files.checked(chosen, "index"), Index, "index"))
    if not documents.is_manifest(chosen):
        raise Malformed(f"it leads to {chosen.media_type[:80]!r}, which is not an image")
    manifest = documents.decode(files.checked(chosen, "manifest"), Manifest, "manifest")
    config = files.checked(manifest.config, "configuration")
    diff_ids = documents.decode_config(config).rootfs.diff_ids
    _check_count(len(manifest.layers), len(diff_ids))
    layers = []
    for descriptor, diff_id in zip(manifest.layers, diff_ids, strict=True):
        documents.check_layer(descriptor)
        fd, offset = files.blob(descriptor)
        shown = f"the layer {descriptor.digest} of {quoted(where)}"
        layers.append(Blob(shown, fd, offset, descriptor.size, diff_id, descriptor.digest))
    names = (_checked_name(name),) if name else ()
    return ImageSource(where, names, documents.check_digest(manifest.config.digest), config, tuple(layers))


def _choose(index: Index, tag: str) -> Descriptor:
    """The image of an index that has the tag, or the only one. Raises Malformed."""
    names = [(one.annotations or {}).get(documents.REF_NAME, "") for one in index.manifests]
    if tag:
        found = [one for one, name in zip(index.manifests, names, strict=True) if name == tag]
        if len(found) != 1:
            raise Malformed(f"it has {len(found) or 'no'} images {quoted(tag)}, {_shown_names(names)}")
        return found[0]
    if len(index.manifests) != 1:
        raise Refused(f"it has {len(names)} images, {_shown_names(names)}", "append :TAG to choose one")
    return index.manifests[0]


def _for_here(index: Index) -> Descriptor:
    """The image of an index for this machine. Raises Malformed."""
    for one in index.manifests:
        if one.platform is not None and (one.platform.os, one.platform.architecture) == (
            "linux", documents.machine(),
        ):  # fmt: skip
            return one
    if len(index.manifests) == 1:
        return index.manifests[0]
    raise Malformed(f"none of its images is for linux/{documents.machine()}")


def _saved(files: _Files, where: str, name: str) -> ImageSource:
    if not files.has("manifest.json"):
        raise Malformed("it has no file manifest.json, so `docker save` did not write it")
    images = documents.decode(files.document("manifest.json"), list[SavedImage], "manifest.json")
    if name:
        wanted = name if ":" in name else f"{name}:latest"
        found = [one for one in images if wanted in (one.repo_tags or ())]
    else:
        found = images
    if len(found) != 1:
        names = [tag for one in images for tag in one.repo_tags or ("",)]
        raise Refused(f"it has {len(found)} such images, {_shown_names(names)}", "append :NAME to choose one")
    image = found[0]
    config = files.document(image.config)
    diff_ids = documents.decode_config(config).rootfs.diff_ids
    _check_count(len(image.layers), len(diff_ids))
    layers = []
    for file, diff_id in zip(image.layers, diff_ids, strict=True):
        fd, offset, size = files.find(file)
        layers.append(Blob(f"the layer {diff_id} of {quoted(where)}", fd, offset, size, diff_id))
    tags = tuple(_checked_name(tag) for tag in image.repo_tags or ())
    return ImageSource(where, tags, hashlib.sha256(config).hexdigest(), config, tuple(layers))


def _check_count(layers: int, diff_ids: int) -> None:
    if layers != diff_ids:
        raise Malformed(f"it has {layers} layers, and its configuration names {diff_ids}")


def _checked_name(name: str) -> str:
    if not name.isprintable() or len(name) > 255:
        raise Malformed(f"its name {name[:80]!r} is not a valid image name")
    return name


def _shown_names(names: list[str]) -> str:
    shown = ", ".join(quoted(name) for name in names[:10] if name)
    return f"named {shown}" if shown else "without names"
