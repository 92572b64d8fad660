"""What a refresh tells the kernel, and in which order, without a mount."""

from __future__ import annotations

from tests.unit.union_support import OpenUnion, open_union
from unionfs.fuse.operations import Operations
from unionfs.union.refreshing import Outdated

__all__ = ["open_union"]


class Kernel:
    """Knows some nodes."""

    keeps_sizes = False

    def __init__(self, *known: int) -> None:
        self.known = known
        self.told: list[object] = []

    def close_kept(self) -> None:
        self.told.append("close")

    def forget_name(self, parent: int, name: bytes) -> None:
        self.told.append((parent, name))

    def forget_node(self, id_: int) -> bool:
        self.told.append(id_)
        return id_ in self.known


async def test_what_the_kernel_has_to_forget(open_union: OpenUnion) -> None:
    """A node that it does not know may be in an answer on its way, for which a notice about a name of its
    directory waits; then it is named again."""
    operations = Operations(open_union())
    kernel = Kernel(5)
    outdated = Outdated(names=[(1, b"a"), (7, b"b")], nodes={5: 1, 6: 7})
    await operations.refreshing.tell(outdated)  # to no kernel
    operations.refreshing.serve(kernel)
    await operations.refreshing.tell(outdated)
    assert kernel.told == ["close", (1, b"a"), (7, b"b"), 5, 6, (7, b"/"), 6]
