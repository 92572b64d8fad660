"""Mounts storage into a mounted union: kernel mounts on top of it, made in order and undone in reverse.

The sources are detached mounts, moved onto the fds of their targets: no path is looked up twice. These calls
block, so they run in a thread while the daemon serves requests.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage.archive.progress import Shown
from unionfs.storage.populate import Layered, populate
from unionfs.storage.sources import Source, Sources
from unionfs.storage.targets import MountedTree, Names, Tree, find, prepare, same_place
from unionfs.sys import detached
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import MountEntry, mount_id_of_fd
from unionfs.sys.unmount import MNT_DETACH, open_mount, unmount_id


def attach(mount: MountEntry, sources: Sources, stack: Layered) -> tuple[Spec, ...]:
    """Mount all sources in the union `mount`. Returns the specs with their resolved targets.

    Raises UserError if a mount fails, after undoing the earlier ones.
    """
    try:
        opened = Owned(open_mount(mount))
    except OSError as error:
        raise UserError(
            f"{quoted(mount.mountpoint)} was unmounted before its storage was there ({reason(error)}); mount "
            "again."
        ) from error
    with opened as root:
        return attach_below(root, mount.mountpoint, sources, stack)


def attach_below(root: int, mountpoint: str, sources: Sources, stack: Layered) -> tuple[Spec, ...]:
    """The same for a mounted tree by an O_PATH fd of its root. Raises UserError."""
    done: list[Spec] = []
    taken: dict[Names, str] = {}
    with ExitStack() as undo:
        for source in sources.opened:
            fill(source, MountedTree(root), stack, sources.shown)
            done.append(_one(source, mountpoint, MountedTree(root), taken, undo))
        undo.pop_all()
    return tuple(done)


def _one(
    source: Source,
    mountpoint: str,
    tree: MountedTree,
    taken: dict[Names, str],
    undo: ExitStack,
) -> Spec:
    spec = source.spec
    target = prepare(tree, spec.target, spec.source, directory=source.directory)
    undo.callback(target.undo)
    same_place(taken, target, spec.target)
    failure = on_failure(f"{spec.source} cannot be mounted at {quoted(spec.target)}", "check the target")
    with failure, Owned(tree.open(target.names)) as fd:
        detached.attach(source.mount, fd)
    undo.callback(_unmount, mountpoint + target.path, source.mount)
    return replace(spec, target=target.path)


def fill(source: Source, tree: Tree, stack: Layered, shown: Shown) -> None:
    """Populate an empty volume on first use; `shown` shows how far it is. Raises UserError."""
    spec = source.spec
    if source.volume is None or not isinstance(spec, VolumeSpec) or spec.subpath or not spec.copy:
        return
    try:
        names, missing = find(tree, spec.target)
    except OSError:
        return  # `prepare` reports what is wrong with the target
    if names and not missing:
        populate(stack, names, source.fd, source.volume, shown)


def _unmount(path: str, root: int) -> None:
    """Detach a new mount by the fd of its root; its peers on the host stay mounted."""
    with suppress(OSError):
        detached.change(root, propagation=detached.PROPAGATION["private"], recursive=True)
        unmount_id(path, mount_id_of_fd(root), MNT_DETACH)
