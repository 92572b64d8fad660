"""Mounting storage into a union that is mounted: kernel mounts on top of it, in order, undone in reverse.

A bind mount or volume is a clone of its source (open_tree), set up while it is detached (mount_setattr) and
then moved onto the fd of the target: no path is looked up twice, and a read-only mount was never writable.
All of this blocks, and the daemon has to go on serving meanwhile, so it runs in a thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.storage.populate import populate
from unionfs.storage.sources import Source, open_source, within_volume
from unionfs.storage.specs import BindSpec, Spec, TmpfsSpec, VolumeSpec
from unionfs.storage.targets import MountedTree, Names, prepare
from unionfs.storage.volumes import Volumes
from unionfs.sys import detached
from unionfs.sys.mount import MNT_DETACH, umount2
from unionfs.union.layers import LayerStack


class Attachments:
    """What is mounted into one union. `user` is who uses its volumes, in the registry of those."""

    def __init__(self, mountpoint: str, volumes: Volumes, user: str) -> None:
        self.mountpoint = mountpoint
        self._volumes = volumes
        self._user = user

    def attach(self, specs: Sequence[Spec], stack: LayerStack) -> tuple[Spec, ...]:
        """Mount everything. Gives the specs with the targets and names that they were given in the end.

        Raises UserError when one cannot be mounted; then those before it are undone.
        """
        try:
            root = os.open(self.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(
                f"mountpoint {quoted(self.mountpoint)} has vanished: {reason(error)}; mount again."
            ) from error
        done: list[Spec] = []
        taken: dict[Names, str] = {}
        try:
            with ExitStack() as undo:
                for spec in specs:
                    done.append(self._one(spec, MountedTree(root), stack, taken, undo))
                undo.pop_all()
        finally:
            os.close(root)
        return tuple(done)

    def _one(
        self, spec: Spec, tree: MountedTree, stack: LayerStack, taken: dict[Names, str], undo: ExitStack
    ) -> Spec:
        with ExitStack() as closing:
            source = open_source(spec, self._volumes, self._user, undo)
            closing.callback(os.close, source.fd)
            spec, top = source.spec, source.fd
            subpath = isinstance(spec, VolumeSpec) and spec.subpath
            if isinstance(spec, VolumeSpec) and not subpath:
                self._fill(spec, tree, stack, source)
            if isinstance(spec, VolumeSpec) and subpath:
                top = within_volume(spec, source.fd)
                closing.callback(os.close, top)
            directory = os.path.isdir(f"/proc/self/fd/{top}")
            target = prepare(tree, spec.target, spec.source, directory=directory)
            undo.callback(target.undo)
            if target.names in taken:
                raise UserError(
                    f"targets {quoted(taken[target.names])} and {quoted(spec.target)} are the same place in "
                    f"the union, {quoted(target.path)}; mount one thing at each target."
                )
            taken[target.names] = spec.target
            try:
                self._mount(spec, top, tree, target.names)
            except OSError as error:
                raise UserError(
                    f"{_shown(spec)} cannot be mounted at {quoted(spec.target)}: {reason(error)}"
                    f"{_cure(spec, error)}."
                ) from error
            undo.callback(_unmount, self.mountpoint + target.path)
            return replace(spec, target=target.path)

    def _fill(self, spec: VolumeSpec, tree: MountedTree, stack: LayerStack, source: Source) -> None:
        from unionfs.storage.targets import find

        if not spec.copy:
            return
        try:
            names, missing = find(tree, spec.target)
        except OSError:
            return  # `prepare` says what is wrong with it
        if names and not missing:
            populate(stack, names, source.fd, spec.name or "")

    def _mount(self, spec: Spec, top: int, tree: MountedTree, names: Names) -> None:
        with ExitStack() as closing:
            if isinstance(spec, TmpfsSpec):
                clone = top
            else:
                recursive = spec.recursive if isinstance(spec, BindSpec) else True
                clone = detached.clone(top, recursive=recursive)
                closing.callback(os.close, clone)
                _set_up(spec, clone)
            target = tree.open(names)
            closing.callback(os.close, target)
            detached.attach(clone, target)


def _set_up(spec: VolumeSpec | BindSpec, clone: int) -> None:
    propagation = spec.propagation if isinstance(spec, BindSpec) else "rprivate"
    detached.change(
        clone,
        propagation=detached.PROPAGATION[propagation.removeprefix("r")],
        recursive=propagation.startswith("r"),
    )
    if spec.read_only:
        below = spec.read_only_below if isinstance(spec, BindSpec) else True
        detached.change(clone, add=detached.READ_ONLY, recursive=below)


def _shown(spec: Spec) -> str:
    match spec:
        case BindSpec():
            return f"bind source {quoted(spec.path)}"
        case VolumeSpec():
            return f"volume {quoted(spec.name or '')}"
        case TmpfsSpec():
            return "a tmpfs"


def _cure(spec: Spec, error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "; run as root"
    if error.errno == errno.EINVAL and isinstance(spec, BindSpec):
        return "; its mount cannot be bound (an unbindable one, or one of another namespace)"
    return "; check the source and the target"


def _unmount(path: str) -> None:
    try:
        umount2(path)
    except OSError:
        with suppress(OSError):
            umount2(path, MNT_DETACH)
