"""Storage without root: the daemon shows it in the union by itself, for it may not make kernel mounts.

The same sources, targets and errors as in `attach`; done before the union is mounted, so that nobody has
looked a target up yet. What the served storage is and how it behaves: `union.bound`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from unionfs.daemon.errors import UserError, quoted
from unionfs.storage.populate import populate
from unionfs.storage.sources import open_source, within_volume
from unionfs.storage.specs import Spec, VolumeSpec
from unionfs.storage.targets import Names, find, prepare
from unionfs.storage.volumes import Volumes
from unionfs.union import bound
from unionfs.union.changes import Caller, Changes
from unionfs.union.layers import LayerStack
from unionfs.union.nodes import Node
from unionfs.union.tree import Union


class UnionTree:
    """A union that is not mounted yet, for the search for targets. Raises OSError."""

    def __init__(self, union: Union) -> None:
        self._union = union
        self._changes = Changes(union)
        self._caller = Caller(os.geteuid(), os.getegid())

    def node(self, names: Names) -> Node:
        """The node with that path; ENOENT."""
        node = self._union.nodes.root
        for name in names:
            found = self._union.lookup(node, name)
            if found is None:
                raise FileNotFoundError(2, os.strerror(2))
            node = found[0]
        return node

    def kind(self, names: Names) -> int:
        return self.node(names).kind

    def readlink(self, names: Names) -> bytes:
        return self._union.readlink(self.node(names))

    def mkdir(self, names: Names) -> None:
        self._changes.mkdir(self.node(names[:-1]), names[-1], 0o755, self._caller)

    def create(self, names: Names) -> None:
        _, _, fd = self._changes.create(self.node(names[:-1]), names[-1], 0o644, self._caller)
        os.close(fd)

    def remove(self, names: Names, *, directory: bool) -> None:
        parent = self.node(names[:-1])
        if directory:
            self._changes.rmdir(parent, names[-1])
        else:
            self._changes.unlink(parent, names[-1])


def serve(
    specs: Sequence[Spec], union: Union, stack: LayerStack, volumes: Volumes, user: str
) -> tuple[Spec, ...]:
    """Show everything in the union. Gives the specs with the targets that they were given in the end.

    Raises UserError when one cannot be had; what was made for those before it is undone.
    """
    done: list[Spec] = []
    tree = UnionTree(union)
    taken: dict[Names, str] = {}
    with ExitStack() as undo:
        for spec in specs:
            done.append(_one(spec, tree, union, stack, volumes, user, taken, undo))
        undo.pop_all()
    return tuple(done)


def _one(
    spec: Spec,
    tree: UnionTree,
    union: Union,
    stack: LayerStack,
    volumes: Volumes,
    user: str,
    taken: dict[Names, str],
    undo: ExitStack,
) -> Spec:
    source = open_source(spec, volumes, user, undo)
    spec, top = source.spec, source.fd
    with ExitStack() as closing:
        closing.callback(lambda: os.close(top))
        if isinstance(spec, VolumeSpec):
            if spec.subpath:
                inner = within_volume(spec, top)
                os.close(top)
                top = inner
            elif spec.copy:
                _fill(spec, tree, stack, top)
        directory = stat.S_ISDIR(os.stat(top).st_mode)
        target = prepare(tree, spec.target, spec.source, directory=directory)
        undo.callback(target.undo)
        if target.names in taken:
            raise UserError(
                f"targets {quoted(taken[target.names])} and {quoted(spec.target)} are the same place in "
                f"the union, {quoted(target.path)}; mount one thing at each target."
            )
        taken[target.names] = spec.target
        closing.pop_all()
    layer = stack.bind(spec.target, top, read_only=spec.read_only)
    node = bound.bind(union, tree.node(target.names[:-1]), target.names[-1], layer)
    undo.callback(bound.unbind, union, node)
    return replace(spec, target=target.path)


def _fill(spec: VolumeSpec, tree: UnionTree, stack: LayerStack, data: int) -> None:
    try:
        names, missing = find(tree, spec.target)
    except OSError:
        return  # `prepare` says what is wrong with it
    if names and not missing:
        populate(stack, names, data, spec.name or "")
