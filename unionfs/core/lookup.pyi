from typing import TYPE_CHECKING

from unionfs.core.node import Attributes, Node
from unionfs.core.nodes import NodeTable
from unionfs.core.objects import Objects
from unionfs.core.search import Search
from unionfs.core.territory import Territory

if TYPE_CHECKING:
    from unionfs.union.owners import Owners

class Names(Territory):
    @property
    def objects(self) -> Objects: ...
    @property
    def nodes(self) -> NodeTable: ...
    @property
    def merge(self) -> Search: ...
    def __init__(
        self,
        objects: Objects,
        nodes: NodeTable,
        merge: Search,
        lowest: int,
        *,
        read_only: bool,
        owners: Owners | None,
    ) -> None: ...
    def lookup(self, parent: Node, name: bytes, first: int = 0) -> tuple[Node, Attributes] | None: ...
    def has_again(self, parent: Node, name: bytes, kind: int, number: int, layers: int) -> bool: ...
    def find_data(self, node: Node) -> None: ...
