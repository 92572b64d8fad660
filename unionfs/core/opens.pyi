from collections.abc import Callable

from unionfs.core.files import Handle
from unionfs.core.nodes import NodeTable
from unionfs.core.opening import Handles, Opener

class Opens:
    def __init__(
        self,
        fd: int,
        nodes: NodeTable,
        handles: Handles,
        opener: Opener,
        released: Callable[[Handle], object],
        *,
        flags: int,
        small: int,
    ) -> None: ...
