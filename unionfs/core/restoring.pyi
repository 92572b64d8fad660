from collections.abc import Callable

from unionfs.core.files import Handle, OpenFile
from unionfs.core.nodes import NodeTable
from unionfs.core.opening import Handles
from unionfs.core.places import Layer

class Restoring:
    def __init__(self, nodes: NodeTable, layers: list[Layer]) -> None: ...
    def nodes_of_former(self) -> None: ...
    def files_of_former(
        self, handles: Handles, open: Callable[..., OpenFile]
    ) -> tuple[dict[int, tuple[int, Handle]], set[int], set[int]]: ...
