from unionfs.core.creds import Creator
from unionfs.core.node import Attributes, Node
from unionfs.union.tree import Union

class EntryChanges:
    def __init__(self, union: Union, identity: Creator, *, remembers: bool) -> None: ...
    def make(
        self,
        parent: Node,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        umask: int,
        *,
        opens: bool = False,
        rdev: int = 0,
        target: bytes = b"",
    ) -> tuple[Node, Attributes, int] | None: ...
    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> bool: ...
    def rmdir(self, parent: Node, name: bytes) -> bool: ...
    def unlink(self, parent: Node, name: bytes) -> bool: ...
