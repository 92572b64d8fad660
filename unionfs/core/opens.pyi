from typing import Any

from unionfs.core.flags import NodeFlags
from unionfs.core.iomodes import IoModes
from unionfs.core.node import Node
from unionfs.core.nodes import NodeTable
from unionfs.core.opening import Handles, Opener

class Opens:
    def __init__(
        self,
        fd: int,
        nodes: NodeTable,
        handles: Handles,
        opener: Opener,
        modes: IoModes,
        protected: NodeFlags,
        running: dict[Node, Any],
        *,
        flags: int,
        small: int,
    ) -> None: ...
