from collections.abc import Callable, Iterable

from typing_extensions import Buffer

from unionfs.core.listings import ListingRequests
from unionfs.core.memo import Memo
from unionfs.core.namerequests import NameRequests
from unionfs.core.node import Node
from unionfs.core.nodes import NodeTable
from unionfs.core.objects import Objects
from unionfs.core.opens import Opens
from unionfs.core.reads import Reads
from unionfs.core.setrequests import SetRequests

def missing_xattr(node: Node, name: bytes, acl: bool) -> int: ...

class Answers:
    def __init__(
        self,
        fd: int,
        nodes: NodeTable,
        objects: Objects,
        opens: Opens,
        names: NameRequests,
        sets: SetRequests,
        listings: ListingRequests,
        reads: Reads,
        *,
        acl: bool,
        enosys: Iterable[int],
        refused: Callable[[bytes, int], object],
    ) -> None: ...
    def counts(self) -> dict[int, int]: ...
    def puts_aside(self) -> None: ...
    def memo_of_last(self) -> Memo | None: ...
    def renew_memo(self) -> None: ...
    def again(self, message: Buffer, memo: Memo) -> bool: ...
    def take(self, message: Buffer) -> bool: ...
