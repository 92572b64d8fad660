"""Writes an image as an OCI archive: a tar of an OCI layout (OCI image-spec, image-layout.md)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

from unionfs.errors import on_failure, quoted
from unionfs.images import documents
from unionfs.storage.archive.compress import compressor
from unionfs.storage.archive.entry import DIRECTORY, FILE, Entry
from unionfs.storage.archive.output import whole_file
from unionfs.storage.archive.tar import Tar

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A layer to write: `size` bytes of a file from `offset` on."""

    file: IO[bytes]
    offset: int
    size: int
    digest: str
    diff_id: str
    media_type: str


@contextmanager
def scratch(path: str) -> Iterator[IO[bytes]]:
    """A file without a name on the filesystem of the archive `path`, unbuffered. Raises UserError."""
    above = os.path.dirname(os.path.abspath(path))
    with on_failure(f"there is no space for layers in {quoted(above)}", "check that directory"):
        file = tempfile.TemporaryFile(dir=above, buffering=0)  # noqa: SIM115
    try:
        yield file
    finally:
        with suppress(OSError):  # its content has been read
            file.close()


def write_archive(path: str, layers: Sequence[LayerFile], config: dict[str, Any], *, name: str) -> str:
    """Write the archive, and return the image's id. `config` gets its diff ids here. Raises UserError."""
    config = {**config, "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}}
    image = documents.encode(config)
    manifest = documents.encode({
        "schemaVersion": 2,
        "mediaType": documents.MANIFEST,
        "config": _descriptor(documents.CONFIG, image),
        "layers": [
            {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers
        ],
    })
    entry = _descriptor(documents.MANIFEST, manifest)
    if name:
        entry["annotations"] = {documents.REF_NAME: name}
    index = documents.encode({"schemaVersion": 2, "mediaType": documents.INDEX, "manifests": [entry]})
    with on_failure(
        f"the image {quoted(path)} cannot be written", "free space, or write it elsewhere"
    ), whole_file(path, "image") as out:
        sink = compressor(out, "none")
        tar = Tar(sink)
        for directory in (b"blobs", b"blobs/sha256"):
            tar.add(Entry(directory, DIRECTORY, 0o755, 0, 0, 0, 0))
        for layer in {layer.digest: layer for layer in layers}.values():
            _copy(tar, layer)
        for data in (image, manifest):
            _add(tar, f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", data)
        _add(tar, "index.json", index)
        _add(tar, "oci-layout", documents.encode({"imageLayoutVersion": "1.0.0"}))
        tar.finish()
        sink.close()
    return hashlib.sha256(image).hexdigest()


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _add(tar: Tar, name: str, data: bytes) -> None:
    tar.add(Entry(name.encode(), FILE, 0o644, 0, 0, len(data), 0), data)


def _copy(tar: Tar, layer: LayerFile) -> None:
    digits = layer.digest.removeprefix("sha256:")
    entry = Entry(f"blobs/sha256/{digits}".encode(), FILE, 0o644, 0, 0, layer.size, 0)
    tar.begin(entry)
    at, end = layer.offset, layer.offset + layer.size
    while at < end:
        data = os.pread(layer.file.fileno(), min(_CHUNK, end - at), at)
        if not data:
            raise OSError("a layer was cut off while it was copied")
        tar.put(data)
        at += len(data)
    tar.end(entry)
