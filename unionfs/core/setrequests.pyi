from typing import Any

from unionfs.core.copyup import SmallCopyUps
from unionfs.core.flags import NodeFlags
from unionfs.core.node import Node
from unionfs.core.nodes import NodeTable
from unionfs.core.places import Gate

def are_kept_times(valid: int) -> bool: ...
def error_to_answer(error: OSError, valid: int) -> OSError: ...

class SetRequests:
    def __init__(
        self,
        nodes: NodeTable,
        gate: Gate,
        flags: NodeFlags,
        copies: SmallCopyUps | None,
        running: dict[Node, Any],
    ) -> None: ...
