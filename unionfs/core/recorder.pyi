from unionfs.core.node import Node

class Recorder:
    def get(self, id_: int) -> Node | None: ...
    def named(self, id_: int) -> Node | None: ...
    def removing(self, parent: Node, name: bytes, node: Node, held: int) -> None: ...
    def renaming(
        self,
        parent: Node,
        name: bytes,
        new_parent: Node,
        new_name: bytes,
        node: Node,
        target: Node | None,
        held: int = ...,
        *,
        exchange: bool = ...,
    ) -> None: ...
    def has_exchanged(self) -> None: ...
    def changed(self) -> None: ...
