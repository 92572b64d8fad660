from collections.abc import Callable
from typing import TYPE_CHECKING

from unionfs.core.files import Handle, OpenFile, Use
from unionfs.core.node import Node
from unionfs.core.nodes import NodeTable
from unionfs.core.places import Gate

if TYPE_CHECKING:
    from unionfs.union.setids import Who

class Handles:
    bytes_read: int
    def __init__(self, nodes: NodeTable) -> None: ...
    def __len__(self) -> int: ...
    def get(self, number: int) -> Handle | None: ...
    @property
    def next(self) -> int: ...
    def register(
        self, node: Node, file: OpenFile, who: Who | None, *, writes: bool, maps: bool = ...
    ) -> int: ...
    def release(self, number: int) -> Handle: ...

def take_back(node: Node, file: OpenFile) -> None: ...

class Opener:
    def __init__(
        self,
        gate: Gate,
        metacopy: bytes,
        open: Callable[[Node], OpenFile],
        *,
        remembers: bool,
        unread: bool,
    ) -> None: ...
    def lend_unread(self, node: Node, use: Use) -> OpenFile | None: ...
    def open_plain(self, node: Node) -> OpenFile | None: ...
