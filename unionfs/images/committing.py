"""A mount as an image: one layer for its upper, and those of its lowers.

If the lowers are the layers of an image of the store, the new image continues that: its layers come unchanged
from the archive that it was unpacked from, if that still has them. Otherwise every lower becomes a layer.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from unionfs.errors import UserError, on_failure, quoted
from unionfs.images import documents
from unionfs.images.blobs import Blob, opened_layers, write_layer
from unionfs.images.indexed import opened_index
from unionfs.images.layout import LayerFile, scratch, write_archive
from unionfs.images.rules import Rules
from unionfs.images.sources import ImageSource, opened, split
from unionfs.images.store import Image, Store, kind_of
from unionfs.union.markers import Markers

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers to commit."""

    upper: str | None
    index: str | None
    """The work directory, if it has an index that the mount uses."""
    lowers: Sequence[str]
    """Topmost first."""
    markers: Markers
    userxattr: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """How the image shall be."""

    reference: str
    """`oci-archive:FILE[:TAG]`."""
    compress: str = "zstd"
    author: str | None = None
    message: str | None = None


@dataclass(slots=True)
class Committed:
    """An image that was written."""

    id: str = ""
    layers: list[str] = field(default_factory=list)
    """The digests, the lowest first."""
    notes: list[str] = field(default_factory=list)


def commit(stack: Stack, root: str, wish: Wish) -> Committed:
    """Write the image. Raises UserError, and then leaves no file."""
    transport, path, tag = split(wish.reference)
    if transport != "oci-archive":
        raise UserError(
            f"{quoted(wish.reference)} cannot be written: images are written as oci-archive:FILE[:TAG]; "
            "convert that by `skopeo copy`."
        )
    done = Committed()
    complaint = f"{quoted(path)} cannot be written"
    with ExitStack() as resources, on_failure(complaint, "check the layers, and free space"):
        writer = _Writer(stack, path, wish, resources, done)
        image, above = _image_below(Store(root), kind_of(stack.userxattr), stack.lowers)
        kept = [] if image is None else writer.layers_of(image)
        if image is not None and not kept:
            above = len(stack.lowers)
        new = [writer.pack(index) for index in reversed(range(above))]
        history = [_step(wish, "") for _ in new]
        if stack.upper is not None:
            new.append(writer.pack(-1))
            history.append(_step(wish, wish.message or ""))
        config = _config(image, wish, history, keep=bool(kept))
        done.id = write_archive(path, [*kept, *new], config, name=tag)
        done.layers = [layer.digest for layer in (*kept, *new)]
    return done


def _image_below(store: Store, kind: str, lowers: Sequence[str]) -> tuple[Image | None, int]:
    """The image of the store whose layers are the lowest lowers, and how many lowers are above it."""
    for image in reversed(store.images()):
        with suppress(UserError):
            paths = store.paths(image, kind)
            if paths and list(lowers[-len(paths) :]) == paths:
                return image, len(lowers) - len(paths)
    return None, len(lowers)


class _Writer:
    def __init__(self, stack: Stack, path: str, wish: Wish, resources: ExitStack, done: Committed) -> None:
        self._stack = stack
        self._path = path
        self._wish = wish
        self._resources = resources
        self._done = done
        self._paths = [*([] if stack.upper is None else [stack.upper]), *stack.lowers]
        self._first = len(self._paths) - len(stack.lowers)

    def pack(self, index: int) -> LayerFile:
        """The lower `index`, or the upper for -1, as a new layer."""
        start = self._first + index
        out = self._resources.enter_context(scratch(self._path))
        with opened_layers(self._paths[start:], self._stack.markers) as merge:
            if index < 0 and self._stack.index is not None:
                with opened_index(self._stack.index, merge) as links:
                    written = write_layer(merge, 1, out, self._wish.compress, links)
            else:
                written = write_layer(merge, 1, out, self._wish.compress)
        self._done.notes += written.packed.notes
        media_type = documents.LAYER_TYPES[self._wish.compress]
        return LayerFile(out, 0, written.size, written.digest, written.diff_id, media_type)

    def layers_of(self, image: Image) -> list[LayerFile]:
        """The layers of an image from its archive, the lowest first; none if that has them no more."""
        source = self._source(image)
        if source is not None:
            return [self._copied(blob) for blob in source.layers]
        self._done.notes.append(
            f"{quoted(image.source)} does not have the image any more, so its layers are written anew, with "
            "other digests."
        )
        return []

    def _source(self, image: Image) -> ImageSource | None:
        with suppress(UserError):
            source = self._resources.enter_context(opened(image.source, Rules(any_platform=True)))
            if source.id == image.id:
                return source
        return None

    def _copied(self, blob: Blob) -> LayerFile:
        """A copy of a blob, with its digest: the archive may be the one that is replaced."""
        out = self._resources.enter_context(scratch(self._path))
        total, at, end = hashlib.sha256(), blob.offset, blob.offset + blob.size
        while at < end:
            data = os.pread(blob.fd, min(_CHUNK, end - at), at)
            if not data:
                raise OSError(f"{blob.name} is cut off")
            total.update(data)
            out.write(data)
            at += len(data)
        digest = f"sha256:{total.hexdigest()}"
        if blob.digest not in (None, digest):
            raise UserError(f"{blob.name} has changed: its digest is {digest}; get it again.")
        assert blob.diff_id is not None
        return LayerFile(out, 0, blob.size, digest, blob.diff_id, _media_type(out))


def _media_type(file: Any) -> str:
    start = os.pread(file.fileno(), 4, 0)
    kind = "zstd" if start == b"\x28\xb5\x2f\xfd" else "gzip" if start[:2] == b"\x1f\x8b" else "none"
    return documents.LAYER_TYPES[kind]


def _moment() -> str:
    """Now, or what SOURCE_DATE_EPOCH says (reproducible-builds.org), as RFC 3339."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(seconds) if seconds.isdigit() else None))


def _step(wish: Wish, message: str) -> dict[str, Any]:
    step: dict[str, Any] = {"created": _moment(), "created_by": "unionfs commit"}
    if wish.author:
        step["author"] = wish.author
    if message:
        step["comment"] = message
    return step


def _config(image: Image | None, wish: Wish, new: list[dict[str, Any]], *, keep: bool) -> dict[str, Any]:
    """The configuration; `keep` the history of the image below, whose layers it describes."""
    if image is None:
        base: dict[str, Any] = {"architecture": documents.machine(), "os": "linux", "config": {}}
    else:
        base = documents.plain(image.config)
    old = base.get("history") if keep else None
    config = {**base, "created": _moment(), "history": [*(old if isinstance(old, list) else []), *new]}
    if wish.author:
        config["author"] = wish.author
    return config
