"""Storage without root: the daemon may not make kernel mounts and serves storage as part of the union.

Sources, targets and errors are as in `attach`. Sources are bound before the union is mounted, when no target
has been looked up yet; see `union.bound`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace

from unionfs.core.node import Node
from unionfs.settings.specs import Spec
from unionfs.storage.attach import fill
from unionfs.storage.sources import Sources
from unionfs.storage.targets import Names, prepare, same_place
from unionfs.union.changes import Caller, Changes
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union


class UnionTree:
    """A union before its mount, as the tree that `targets` searches. Raises OSError."""

    def __init__(self, union: Union) -> None:
        self._union = union
        self._changes = Changes(union)
        self._caller = Caller(os.geteuid(), os.getegid())

    def node(self, names: Names) -> Node:
        return self._union.node_at(names)

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


def serve(sources: Sources, union: Union, stack: LayerStack) -> tuple[Spec, ...]:
    """Bind all sources in the union. Returns the specs with their resolved targets.

    Raises UserError if one fails, after undoing the earlier ones.
    """
    done: list[Spec] = []
    tree = UnionTree(union)
    taken: dict[Names, str] = {}
    with ExitStack() as undo:
        for source in sources.opened:
            spec = source.spec
            fill(source, tree, stack, sources.shown)
            target = prepare(tree, spec.target, spec.source, directory=source.directory)
            undo.callback(target.undo)
            same_place(taken, target, spec.target)
            layer = stack.bind(spec.target, os.dup(source.fd), read_only=spec.read_only)
            node = union.bind(tree.node(target.names[:-1]), target.names[-1], layer)
            undo.callback(union.nodes.forget, node, 1)
            done.append(replace(spec, target=target.path))
        undo.pop_all()
    return tuple(done)
