"""Tars of layers, and archives of images, for tests: well-formed ones, and damaged or hostile ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.support import snapshot
from unionfs.images import documents

Member = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]
JSON = dict[str, Any]


def file(name: str, content: bytes = b"", **extra: Any) -> Member:
    """A regular file; `extra` are attributes of TarInfo."""
    return _member(name, tarfile.REGTYPE, size=len(content), **extra), content


def directory(name: str, **extra: Any) -> Member:
    return _member(name, tarfile.DIRTYPE, mode=0o755, **extra)


def symlink(name: str, target: str, **extra: Any) -> Member:
    return _member(name, tarfile.SYMTYPE, linkname=target, **extra)


def hard_link(name: str, target: str, **extra: Any) -> Member:
    return _member(name, tarfile.LNKTYPE, linkname=target, **extra)


def device(name: str, major: int, minor: int, **extra: Any) -> Member:
    return _member(name, tarfile.CHRTYPE, devmajor=major, devminor=minor, **extra)


def whiteout(name: str) -> Member:
    above, _, last = name.rpartition("/")
    return file(f"{above}/.wh.{last}" if above else f".wh.{last}")


def opaque(name: str) -> Member:
    return file(f"{name}/.wh..wh..opq")


def _member(name: str, kind: bytes, **extra: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mtime = kind, 1_600_000_000
    for key, value in extra.items():
        setattr(member, key, value)
    return member


def tar(members: Iterable[Member], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The tar of members, as Python writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as made:
        for member in members:
            if isinstance(member, tuple):
                made.addfile(member[0], io.BytesIO(member[1]))
            else:
                made.addfile(member)
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An image in the OCI format, of which a test may change everything before it is written."""

    def __init__(self, *layers: bytes, compress: bool = True, config: Mapping[str, Any] = {}) -> None:
        self.layers = [gzip.compress(layer, mtime=0) if compress else layer for layer in layers]
        self.config: JSON = {
            "architecture": documents.machine(),
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
            "config": dict(config),
        }
        kind = documents.LAYER_TYPES["gzip" if compress else "none"]
        self.manifest: JSON = {
            "schemaVersion": 2,
            "layers": [
                {"mediaType": kind, "digest": digest(blob), "size": len(blob)} for blob in self.layers
            ],
        }
        self.annotations: dict[str, str] = {}
        self.index: JSON | None = None
        self.more: dict[str, bytes] = {}

    def files(self) -> dict[str, bytes]:
        """The files of the layout."""
        config = json.dumps(self.config).encode()
        self.manifest.setdefault("config", self.described(documents.CONFIG, config))
        manifest = json.dumps(self.manifest).encode()
        entry = self.described(documents.MANIFEST, manifest)
        if self.annotations:
            entry["annotations"] = self.annotations
        index = self.index or {"schemaVersion": 2, "manifests": [entry]}
        blobs = {f"blobs/sha256/{digest(data)[7:]}": data for data in (config, manifest, *self.layers)}
        found = {
            "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
            "index.json": json.dumps(index).encode(),
            **blobs,
        }
        return {**found, **self.more}

    @staticmethod
    def described(kind: str, data: bytes) -> JSON:
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}

    def archive(self, path: Path) -> str:
        """Write it as a tar; returns its reference."""
        path.write_bytes(tar(file(name, data) for name, data in self.files().items()))
        return f"oci-archive:{path}"

    def tree(self, path: Path) -> str:
        """Write it as a directory; returns its reference."""
        for name, data in self.files().items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return f"oci:{path}"


def saved(path: Path, layers: Iterable[bytes], names: list[str], config: Mapping[str, Any] = {}) -> str:
    """Write an image as `docker save` does; returns its reference."""
    layers = list(layers)
    image = json.dumps(Layout(*layers, config=config).config).encode()
    files = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": f"{digest(image)[7:]}.json", "RepoTags": names, "Layers": files}]
    path.write_bytes(tar([
        *(file(name, layer) for name, layer in zip(files, layers, strict=True)),
        file(manifest[0]["Config"], image),  # type: ignore[arg-type]
        file("manifest.json", json.dumps(manifest).encode()),
    ]))  # fmt: skip
    return f"docker-archive:{path}"


Comparable = dict[bytes, tuple[object, ...]]


def shown(root: Path, *, times: bool = True, private: bool = False, names: bool = True) -> Comparable:
    """What users see of a tree: all but inode numbers and link counts of directories.

    With `names`, files with several names are the same as each other. Without `private` the overlay's own
    xattrs are left out.
    """
    first: dict[tuple[int, int], bytes] = {}
    found: Comparable = {}
    for path, entry in sorted(snapshot.take(root).items()):
        directory = stat.S_ISDIR(entry.mode)
        same = b"" if directory or not names else first.setdefault((entry.dev, entry.ino), path)
        xattrs = {
            name: value for name, value in entry.xattrs.items()
            if private or not name.startswith(("trusted.overlay.", "user.overlay."))
        }  # fmt: skip
        found[path] = (
            entry.mode, entry.uid, entry.gid, 0 if directory else entry.size, entry.rdev,
            entry.mtime if times else 0, entry.content, tuple(sorted(xattrs.items())), same,
            entry.names,
        )  # fmt: skip
    return found


def difference(first: Comparable, second: Comparable) -> dict[bytes, object]:
    """The entries that differ, with both."""
    return {
        path: (first.get(path), second.get(path))
        for path in sorted(first.keys() | second.keys())
        if first.get(path) != second.get(path)
    }


def nothing_left(root: Path) -> bool:
    """Whether a store has no layer, no image, and nothing half made."""
    found = [
        os.path.join(above, name)
        for above, directories, files in os.walk(root / "images")
        for name in (*directories, *files)
    ]
    keep = ("layers", "trusted", "user", "mapped", "records", "locks")
    return all(path.rsplit("/", 1)[1] in keep or "/locks/" in path for path in found)
