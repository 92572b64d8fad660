import os
from collections.abc import Callable

from unionfs.core.files import OpenFile
from unionfs.core.node import Attributes, Node
from unionfs.core.nodes import NodeTable
from unionfs.core.places import Place
from unionfs.core.setting import Change
from unionfs.core.steps import Workplace
from unionfs.union.tree import Union

def hand_over(node: Node, fd: int, st: os.stat_result | None, lend: bool) -> OpenFile | None: ...
def enters(nodes: NodeTable, directory: Node) -> Node | None: ...
def entered(nodes: NodeTable, directory: Node) -> None: ...

class SmallCopyUps:
    @property
    def count(self) -> int: ...
    @property
    def copied_bytes(self) -> int: ...
    @property
    def nanoseconds(self) -> int: ...
    def __init__(
        self,
        union: Union,
        work: Workplace,
        *,
        told: Callable[[Node | None, Node | None], object],
        directory: Callable[[Node], Place],
        clones_never: set[int],
        limit: int,
        remembers: bool,
    ) -> None: ...
    def copy(
        self, node: Node, change: Change | None = None, limit: int = -1, *, keep: bool = False
    ) -> Attributes | None: ...
