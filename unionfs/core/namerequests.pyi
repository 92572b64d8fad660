from unionfs.core.changing import EntryChanges
from unionfs.core.iomodes import IoModes
from unionfs.core.nodes import NodeTable
from unionfs.core.opening import Handles

class NameRequests:
    def __init__(
        self,
        nodes: NodeTable,
        changes: EntryChanges,
        handles: Handles,
        modes: IoModes | None,
        *,
        masks: bool,
    ) -> None: ...
