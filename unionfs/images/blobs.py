"""Layers as blobs: tars, compressed or not, with the digests by which images name them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, cast

from unionfs.core.places import Layer
from unionfs.errors import UserError, on_failure, quoted
from unionfs.images.indexed import Index
from unionfs.images.measured import HashedFile, HashedSink, Unpacked, Window
from unionfs.images.pack import Packed, Packer
from unionfs.images.rules import Refused, Rules
from unionfs.images.unpack import Contents, unpack
from unionfs.storage.archive.compress import ReadAhead, WriteBehind, compressor, decompressor
from unionfs.storage.archive.foreign import ForeignReader
from unionfs.storage.archive.headers import Malformed
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.archive.tar import Tar
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import Owned, close_quietly
from unionfs.union import opening
from unionfs.union.markers import Markers
from unionfs.union.merge import Merge

AGAIN = "get it again from where it was made"


@dataclass(frozen=True, slots=True)
class Blob:
    """A layer's file, or a part of an archive. The fd belongs to its source."""

    name: str
    """For messages: the layer, and where it is."""
    fd: int
    offset: int
    size: int
    diff_id: str | None
    """The digest of the uncompressed tar; None: not known before."""
    digest: str | None = None
    """The digest of the bytes; None if only the diff id is known."""


@dataclass(frozen=True, slots=True)
class Written:
    """A layer that was written."""

    diff_id: str
    digest: str
    size: int
    """Bytes of the blob."""
    packed: Packed


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the errors of reading an archive into a UserError that begins with its name."""
    try:
        yield
    except Refused as error:
        raise UserError(f"{name} is refused: {error}; {error.cure}.") from error
    except Malformed as error:
        raise UserError(f"{name} is refused: {error}; {AGAIN}.") from error
    except UserError as error:
        raise UserError(f"{name} cannot be unpacked: {error}") from error


def unpack_blob(
    blob: Blob, target: str, markers: Markers, rules: Rules, progress: Progress = UNSEEN
) -> tuple[Contents, str]:
    """Unpack a layer into the empty directory `target`, and return its contents and diff id.

    Raises UserError, above all for a digest that differs, and OSError. `target` then holds no complete layer.
    """
    with explained(blob.name):
        window = Window(blob.fd, blob.offset, blob.size)
        progress.reads(blob.size, lambda: window.total)
        tar = Unpacked(decompressor(cast(IO[bytes], window)), window, rules)
        with ReadAhead(tar) as ahead:
            contents = unpack(ForeignReader(ahead), target, markers, rules, progress)
            ahead.drain()
        window.drain()
        if window.total != blob.size:
            raise Malformed("it is cut off")
        for what, wanted, found in (
            ("digest", blob.digest, window.digest()), ("diff id", blob.diff_id, tar.digest())
        ):  # fmt: skip
            if wanted is not None and wanted != found:
                raise Malformed(f"its {what} is {found}, and not {wanted} as the image says")
    return contents, tar.digest()


@contextmanager
def opened_layers(paths: Sequence[str], markers: Markers) -> Iterator[Merge]:
    """The merge of layers, topmost first, for reading. Raises LayerError and OSError."""
    privileged = has_capability(CAP_SYS_ADMIN)
    with ExitStack() as resources:
        layers = []
        for index, path in enumerate(paths):
            if path.startswith("/proc/"):  # an upper in memory, which has no other path
                fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                fd = opening.open_lower(os.path.realpath(path), privileged)
            resources.callback(close_quietly, fd)
            layers.append(Layer(index, path, fd, is_upper=index == 0))
        merge = Merge(layers, markers, directory_fds=256)
        resources.callback(merge.close)
        yield merge


def write_layer(
    merge: Merge,
    count: int,
    out: IO[bytes],
    kind: str,
    index: Index | None = None,
    *,
    may_have_index: bool = False,
) -> Written:
    """Write the topmost `count` layers as one blob, compressed as `kind`, into an unbuffered file.

    `index` and `may_have_index`: see Packer. Raises LayerError and OSError.
    """
    hashed = HashedFile(out)
    sink = HashedSink(compressor(cast(IO[bytes], hashed), kind))
    behind = WriteBehind(sink)
    try:
        tar = Tar(behind)
        packed = Packer(merge, count, tar, index, may_have_index=may_have_index).run()
        tar.finish()
        behind.close()
    finally:
        behind.stop()
    return Written(sink.digest(), hashed.digest(), hashed.total, packed)


@contextmanager
def file_blob(path: str) -> Iterator[Blob]:
    """A layer's file as a blob without known digests. Raises UserError."""
    name = f"the layer {quoted(path)}"
    with ExitStack() as resources:
        with on_failure(f"{name} cannot be read", "check the path"):
            fd = resources.enter_context(Owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
            st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise UserError(f"{name} is not a regular file; write it to one first.")
        yield Blob(name, fd, 0, st.st_size, None)
