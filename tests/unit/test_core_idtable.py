"""The hash table of nodes by id, compared with a dict."""

from __future__ import annotations

import gc
import os
import stat
import weakref
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unionfs.core.idtable import IdTable
from unionfs.core.node import Node
from unionfs.core.places import Layer
from unionfs.core.territory import Territory

# Whatever the hash, some of these share their first slot: more than a small table has slots.
# Filesystems count up, and some put the number of a device or an allocation group into the high bits.
IDS = st.one_of(
    st.integers(1, 40),
    st.integers(1, 2**64 - 1),
    st.builds(lambda high, low: high << 40 | low, st.integers(0, 200), st.integers(1, 3)),
)

#: Where all of them are.
ROOT = Layer(0, "/", os.open("/", os.O_PATH), is_upper=False).root


def make(id_: int) -> Node:
    territory = Territory(lasting=True, has_markers=False, read_only=False)
    return Node(id_, territory, None, b"n", stat.S_IFDIR, [ROOT])


class Compared(RuleBasedStateMachine):
    """Random calls of a table and of a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table = IdTable()
        self.known: dict[int, Node] = {}

    @rule(ids=st.lists(IDS, max_size=80))
    def insert(self, ids: list[int]) -> None:
        for id_ in ids:
            node = make(id_)
            if id_ in self.known:
                with pytest.raises(KeyError):
                    self.table.insert(node)
            else:
                self.table.insert(node)
                self.known[id_] = node

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        for id_ in data.draw(st.lists(st.sampled_from(list(self.known)), max_size=80, unique=True)):
            assert not self.table.discard(make(id_))  # another node of that id
            assert self.table.discard(self.known[id_])
            assert not self.table.discard(self.known.pop(id_))

    @rule(id_=IDS)
    def find(self, id_: int) -> None:
        assert self.table.find(id_) is self.known.get(id_)
        assert (id_ in self.table) == (id_ in self.known)

    @invariant()
    def has_the_same_nodes(self) -> None:
        assert len(self.table) == len(self.known)
        assert sorted(self.table, key=id) == sorted(self.known.values(), key=id)
        assert all(self.table.find(id_) is node for id_, node in self.known.items())


TestCompared = Compared.TestCase


@given(ids=st.lists(IDS, unique=True, max_size=200), order=st.randoms())
def test_grows_and_shrinks(ids: list[int], order: Random) -> None:
    table = IdTable()
    nodes = [make(id_) for id_ in ids]
    for node in nodes:
        table.insert(node)
    order.shuffle(nodes)
    while nodes:
        assert table.discard(nodes.pop())
        assert all(table.find(node.id) is node for node in nodes)
    assert len(table) == 0
    assert list(table) == []


def test_many_nodes() -> None:
    """Of consecutive ids: each is found, in a time that does not depend on their number."""
    table = IdTable()
    nodes = [make(id_) for id_ in range(2, 100_002)]
    for node in nodes:
        table.insert(node)
    assert all(table.find(node.id) is node for node in nodes)
    assert table.find(1) is None
    assert all(table.discard(node) for node in nodes[:-3])
    assert set(table) == set(nodes[-3:])


class Traced(Territory):
    """A territory that weak references can refer to."""

    def __init__(self) -> None:
        super().__init__(lasting=True, has_markers=False, read_only=False)


def test_keeps_its_nodes_alive() -> None:
    territory = Traced()
    seen = weakref.ref(territory)
    table = IdTable()
    table.insert(Node(5, territory, None, b"n", stat.S_IFDIR, [ROOT]))
    del territory
    gc.collect()
    assert seen() is not None
    found = table.find(5)
    assert found is not None
    assert found.name == b"n"
    del found
    del table
    gc.collect()
    assert seen() is None


def test_in_a_cycle_it_is_collected() -> None:
    """A table that only its own nodes refer to, as the territory of a union does."""
    territory = Traced()
    seen = weakref.ref(territory)
    table = IdTable()
    table.insert(Node(5, territory, None, b"n", stat.S_IFDIR, [ROOT]))
    territory.table = table  # type: ignore[attr-defined]
    assert len(gc.get_referents(table)) >= 1
    del territory, table
    gc.collect()
    assert seen() is None
