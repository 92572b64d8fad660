"""What is known of the snapshots of an upper: names, times, and which layer lies on which."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from unionfs.errors import UserError, quoted

_MOST: Final = 450
"""Kernel overlayfs takes 500 lowers (fs/overlayfs/params.h, OVL_MAX_STACK)."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One layer."""

    id: str
    """The name of its directory."""
    name: str
    parent: str | None
    """The id of the layer below it; None: it lies on the lowers of the mount."""
    created: float
    """Seconds since the epoch."""
    removed: bool = False
    """Whether only others need it: it has no name any more."""
    files: tuple[Mapping[str, Any], ...] = ()
    """Files that were written while they were copied: `path`, `size`, `state`."""


@dataclass(frozen=True, slots=True)
class Record:
    """All snapshots of an upper."""

    head: str | None = None
    """The id of the layer that the upper lies on."""
    last: int = 0
    layers: Mapping[str, Snapshot] = field(default_factory=dict)

    def next_id(self) -> str:
        """The id of the next layer."""
        return f"{self.last + 1:04d}"

    def chain(self, id_: str | None) -> list[str]:
        """The ids of a layer and of all below it, topmost first. Raises ValueError for a broken record."""
        found: list[str] = []
        while id_ is not None:
            if id_ in found or id_ not in self.layers:
                raise ValueError("a layer is missing")
            found.append(id_)
            id_ = self.layers[id_].parent
        return found

    def named(self, name: str, upper: str) -> Snapshot:
        """The snapshot of that name. Raises UserError."""
        for one in self.layers.values():
            if one.name == name and not one.removed:
                return one
        raise UserError(
            f"upper {quoted(upper)} has no snapshot {quoted(name)}; `unionfs snapshot ls` lists them."
        )

    def shown(self) -> list[Snapshot]:
        """Those that have a name, the oldest first."""
        return sorted((one for one in self.layers.values() if not one.removed), key=lambda one: one.created)

    def children(self, id_: str) -> list[str]:
        """The ids of the layers that lie on one."""
        return [one.id for one in self.layers.values() if one.parent == id_]

    def with_layer(self, one: Snapshot) -> Record:
        """The same with a layer added or replaced."""
        return replace(self, layers={**self.layers, one.id: one})

    def without(self, id_: str) -> Record:
        """The same without a layer."""
        return replace(self, layers={key: one for key, one in self.layers.items() if key != id_})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        layers = [asdict(one) for one in self.layers.values()]
        return {"version": 1, "head": self.head, "last": self.last, "layers": layers}

    @classmethod
    def from_json(cls, values: Any) -> Record:
        """Read the values of `to_json`. Raises KeyError, TypeError or ValueError for others."""
        if values["version"] != 1:
            raise ValueError("another version of unionfs wrote it")
        layers = {}
        for one in values["layers"]:
            id_ = str(one["id"])
            if not id_.isdecimal():
                raise ValueError("a layer has no number")
            layers[id_] = Snapshot(
                id_, str(one["name"]), one["parent"], float(one["created"]), bool(one["removed"]),
                tuple(one["files"]),
            )  # fmt: skip
        record = cls(values["head"], int(values["last"]), layers)
        for top in (record.head, *layers):
            record.chain(top)
        return record


def joined(record: Record, below: str, above: str, id_: str) -> Record:
    """The record after two layers were joined to the layer `id_`."""
    layers = {}
    for one in record.layers.values():
        if one.id == above:
            layers[id_] = replace(one, id=id_, parent=record.layers[below].parent)
        elif one.id != below:
            layers[one.id] = replace(one, parent=id_) if one.parent == above else one
    return Record(id_ if record.head == above else record.head, int(id_), layers)


def added(record: Record, name: str | None) -> tuple[Record, str]:
    """The record with a new snapshot of the upper, and the id of its layer. Raises UserError if the name is
    taken."""
    taken = {one.name for one in record.shown()}
    if name in taken:
        raise UserError(
            f"snapshot {quoted(name or '')} already exists; choose another name, or remove it."
        )
    if len(record.chain(record.head)) >= _MOST:
        raise UserError(f"an upper lies on {_MOST} snapshots at most; remove some by `unionfs snapshot rm`.")
    if name is None:
        name = first = time.strftime("%Y%m%d-%H%M%S")
        number = 1
        while name in taken:
            number += 1
            name = f"{first}.{number}"
    one = Snapshot(record.next_id(), name, record.head, time.time())
    return replace(record.with_layer(one), head=one.id, last=int(one.id)), one.id
