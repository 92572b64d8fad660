"""Mounting storage into a union that is mounted: kernel mounts on top of it, in order, undone in reverse.

The sources are detached mounts that only have to be moved onto the fds of their targets: no path is looked up
twice. All of this blocks, and the daemon has to go on serving meanwhile, so it runs in a thread.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import replace

from unionfs.errors import UserError, quoted, reason
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage.populate import populate
from unionfs.storage.sources import Source, Sources
from unionfs.storage.targets import MountedTree, Names, Tree, find, prepare, same_place
from unionfs.sys import detached
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import MountEntry, mount_id_of_fd
from unionfs.sys.unmount import MNT_DETACH, open_mount, unmount_id
from unionfs.union.layers import LayerStack


def attach(mount: MountEntry, sources: Sources, stack: LayerStack) -> tuple[Spec, ...]:
    """Mount everything in the union `mount`. Returns the specs with the targets that were found in the end.

    Raises UserError when one cannot be mounted; then those before it are undone.
    """
    try:
        root = open_mount(mount)
    except OSError as error:
        raise UserError(
            f"{quoted(mount.mountpoint)} was unmounted before its storage was there ({reason(error)}); mount "
            "again."
        ) from error
    done: list[Spec] = []
    taken: dict[Names, str] = {}
    try:
        with ExitStack() as undo:
            for source in sources.opened:
                done.append(_one(source, mount.mountpoint, MountedTree(root), stack, taken, undo))
            undo.pop_all()
    finally:
        os.close(root)
    return tuple(done)


def _one(
    source: Source,
    mountpoint: str,
    tree: MountedTree,
    stack: LayerStack,
    taken: dict[Names, str],
    undo: ExitStack,
) -> Spec:
    spec = source.spec
    fill(source, tree, stack)
    target = prepare(tree, spec.target, spec.source, directory=source.directory)
    undo.callback(target.undo)
    same_place(taken, target, spec.target)
    try:
        with Owned(tree.open(target.names)) as fd:
            detached.attach(source.mount, fd)
    except OSError as error:
        raise UserError(
            f"{spec.source} cannot be mounted at {quoted(spec.target)}: {reason(error)}; check the target."
        ) from error
    undo.callback(_unmount, mountpoint + target.path, source.mount)
    return replace(spec, target=target.path)


def fill(source: Source, tree: Tree, stack: LayerStack) -> None:
    """The first use of an empty volume. Raises UserError."""
    spec = source.spec
    if source.volume is None or not isinstance(spec, VolumeSpec) or spec.subpath or not spec.copy:
        return
    try:
        names, missing = find(tree, spec.target)
    except OSError:
        return  # `prepare` says what is wrong with the target
    if names and not missing:
        populate(stack, names, source.fd, source.volume)


def _unmount(path: str, root: int) -> None:
    """Detach what was just mounted, by the fd of its root; what it has for peers on the host stays."""
    with suppress(OSError):
        detached.change(root, propagation=detached.PROPAGATION["private"], recursive=True)
        unmount_id(path, mount_id_of_fd(root), MNT_DETACH)
