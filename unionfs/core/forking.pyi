from typing import Final

IDLE: Final[int]
REFUSED: Final[int]

class Forking:
    @property
    def forked(self) -> int: ...
    def __init__(self, listener: int, first: int, refusing: int) -> None: ...
    def next(self, timeout: int) -> int: ...
