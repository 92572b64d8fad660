from collections.abc import Callable

from unionfs.core.changing import EntryChanges
from unionfs.core.files import Handle
from unionfs.core.nodes import NodeTable
from unionfs.core.opening import Handles

class NameRequests:
    def __init__(
        self,
        nodes: NodeTable,
        changes: EntryChanges,
        handles: Handles,
        opened: Callable[[Handle], tuple[int, int]] | None,
        *,
        masks: bool,
    ) -> None: ...
