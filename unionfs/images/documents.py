"""The JSON of images: OCI image-spec 1.1 (index, manifest, config), and the manifest.json of `docker save`.

Only what is used has a type; a configuration is also kept as it is, for its digest and for images made from
it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct, field

from unionfs.storage.archive.headers import Malformed

MOST_JSON: Final = 4 << 20
"""Bytes of one document, as in containers/image (internal/iolimits, MaxManifestBodySize)."""
MOST_LAYERS: Final = 500

INDEX: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
LAYER_TYPES: Final = {"none": LAYER, "gzip": f"{LAYER}+gzip", "zstd": f"{LAYER}+zstd"}
"""By the names of compressions."""
REF_NAME: Final = "org.opencontainers.image.ref.name"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
_TARS: Final = re.compile(
    r"application/vnd\.(oci\.image\.layer(\.nondistributable)?\.v1\.tar(\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(diff|foreign\.diff)\.tar(\.gzip|\.zstd)?)"
)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
# Go's GOARCH, by uname(2)'s machine.
_MACHINES: Final = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386",
    "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64", "loongarch64": "loong64",
}  # fmt: skip
T = TypeVar("T")


class Platform(Struct):
    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(Struct):
    digest: str
    size: int
    media_type: str = field(default="", name="mediaType")
    annotations: dict[str, str] | None = None
    platform: Platform | None = None


class Manifest(Struct):
    """Of an image: its configuration and its layers, the lowest first."""

    config: Descriptor
    layers: list[Descriptor]


class Index(Struct):
    manifests: list[Descriptor]


class Layout(Struct):
    """The file oci-layout."""

    version: str = field(name="imageLayoutVersion")


class SavedImage(Struct, rename="pascal"):
    """One image in manifest.json."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class Runtime(Struct, rename="pascal"):
    """What a container of the image runs, and how."""

    user: str = ""
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str = ""
    labels: dict[str, str] | None = None


class RootFs(Struct):
    diff_ids: list[str]


class Config(Struct):
    rootfs: RootFs
    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str | None = None
    config: Runtime | None = None


def decode(data: bytes, kind: type[T], what: str) -> T:
    """A document of a kind. Raises Malformed."""
    if len(data) > MOST_JSON:
        raise Malformed(f"its {what} is larger than {MOST_JSON >> 20} MiB")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(f"its {what} is malformed ({error})") from None


def decode_config(data: bytes) -> Config:
    """A configuration with checked diff ids. Raises Malformed."""
    config = decode(data, Config, "configuration")
    if len(config.rootfs.diff_ids) > MOST_LAYERS:
        raise Malformed(f"it has more than {MOST_LAYERS} layers")
    for diff_id in config.rootfs.diff_ids:
        check_digest(diff_id)
    return config


def plain(data: bytes) -> dict[str, Any]:
    """A document as plain values. Raises Malformed."""
    return decode(data, dict[str, Any], "configuration")


def encode(values: Mapping[str, Any]) -> bytes:
    """JSON with the members in their order."""
    return msgspec.json.encode(values)


def check_digest(digest: str) -> str:
    """Return the hexadecimal digits of a digest. Raises Malformed for anything but sha256."""
    if not _DIGEST.fullmatch(digest):
        raise Malformed(f"{digest[:80]!r} is not a sha256 digest")
    return digest.removeprefix("sha256:")


def check_layer(descriptor: Descriptor) -> None:
    """Raise Malformed for a layer that is not a tar, such as an encrypted one."""
    check_digest(descriptor.digest)
    if not _TARS.fullmatch(descriptor.media_type):
        kind = descriptor.media_type[:80]
        raise Malformed(f"its layer {descriptor.digest} has the type {kind!r}, which is not a tar")


def is_index(descriptor: Descriptor) -> bool:
    return descriptor.media_type in (INDEX, DOCKER_INDEX)


def is_manifest(descriptor: Descriptor) -> bool:
    return descriptor.media_type in (MANIFEST, DOCKER_MANIFEST)


def machine() -> str:
    """This machine's name in images."""
    name = os.uname().machine
    return _MACHINES.get(name, name)


def runs_here(architecture: str, system: str) -> bool:
    """Whether programs of a platform can run here; unnamed ones may."""
    own = machine()
    also = {"amd64": "386", "arm64": "arm"}.get(own)
    return system in ("", "linux") and architecture in ("", own, also)
