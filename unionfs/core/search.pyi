import os
from typing import TYPE_CHECKING, Final

from unionfs.core.lowernames import LowerNames
from unionfs.core.places import Gate, Place

if TYPE_CHECKING:
    from unionfs.union.markers import Markers
    from unionfs.union.named import NamedWhiteouts
    from unionfs.union.redirects import PartSearch

PREFIX: Final[bytes]

class Search:
    @property
    def gate(self) -> Gate: ...
    @property
    def markers(self) -> Markers: ...
    @property
    def named(self) -> NamedWhiteouts: ...
    def __init__(
        self,
        gate: Gate,
        markers: Markers,
        named: NamedWhiteouts,
        lower_names: LowerNames,
        directories: PartSearch,
        *,
        lowest: int,
    ) -> None: ...
    def search(
        self, parts: list[Place], name: bytes, first: int = 0
    ) -> tuple[os.stat_result, list[Place]] | None: ...
    def is_visible_below(self, parts: list[Place], name: bytes) -> bool: ...
