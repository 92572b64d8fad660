"""The session that pyfuse3 and libfuse run: everywhere, with what that library can carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyfuse3

from unionfs.fuse.operations import UnionOperations


class SessionError(Exception):
    """The union could not be mounted; ``str()`` is one sentence."""


async def serve(
    operations: UnionOperations,
    mountpoint: str,
    mount_options: Sequence[str],
    on_ready: Callable[[], None],
) -> None:
    """Mount, serve until the mount is gone (whoever unmounts it), and clean up.

    ``mount_options`` are libfuse's (``fsname=...``, ``allow_other`` ...); ``on_ready`` is called when the
    kernel has begun to talk. Raises :class:`SessionError` when mounting fails.
    """
    operations.on_init = on_ready
    try:
        pyfuse3.init(operations, mountpoint, {"default_permissions", *mount_options})
    except RuntimeError as error:
        raise SessionError(f"mounting at {mountpoint} failed: {error}") from error
    try:
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=True)
