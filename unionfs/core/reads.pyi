from typing import Final

from unionfs.core.nodes import NodeTable
from unionfs.core.opening import Handles, KeptFiles, Opener

SPLICED: Final[int]

class Reads:
    def __init__(self, nodes: NodeTable, handles: Handles, opener: Opener, kept: KeptFiles) -> None: ...
