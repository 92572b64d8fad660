"""Listings read in pieces: order, equal hashes, caching."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from random import Random

import pytest
import trio

from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.core.entries import Entries
from unionfs.fuse.directories import DOT_DOT, Directories
from unionfs.union import tickets

__all__ = ["open_union"]


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    for directory in ("a", "b", "c"):
        (tmp_path / "l0" / directory).mkdir(parents=True)
        for number in range(50):
            (tmp_path / "l0" / directory / f"n{number}").touch()
    return tmp_path / "l0"


def _read(entries: Entries) -> tuple[list[bytes], list[int]]:
    """The names and cookies."""
    return entries.names(), [entries.cookie(index) for index in range(len(entries))]


async def test_every_name_once_from_any_place(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    directories = Directories()
    node = get(union, "a")
    entries, first = await directories.entries(node, 0)
    names, cookies = _read(entries)
    assert first == 0
    assert sorted(names) == sorted(b"n%d" % number for number in range(50))
    assert cookies == sorted(set(cookies))
    assert cookies[0] > DOT_DOT
    for index in (0, 10, 48, 49):
        _, behind = await directories.entries(node, cookies[index])
        assert behind == index + 1
    # a position whose name is gone is still between its neighbours
    _, behind = await directories.entries(node, cookies[10] + 1)
    assert behind == 11


async def test_places_stay_when_the_listing_is_made_anew(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    directories = Directories()
    node = get(union, "a")
    names, cookies = _read((await directories.entries(node, 0))[0])
    place = dict(zip(names, cookies, strict=True))
    directories.end(node)
    assert len(directories) == 0
    for number in range(0, 50, 3):
        (lower / f"a/n{number}").unlink()
    (lower / "a/more").touch()
    entries, first = await directories.entries(node, place[b"n10"])
    names, cookies = _read(entries)
    assert all(place[name] == cookie for name, cookie in zip(names, cookies, strict=True) if name in place)
    assert cookies[first - 1] <= place[b"n10"] < cookies[first]


async def test_equal_hashes(lower: Path, open_union: OpenUnion) -> None:
    """Names with the same hash follow each other; also if the next hash is the next number."""
    hashes = {b"n%d" % number: 400 + number // 10 for number in range(50)}
    union = open_union()
    directories = Directories(hashes.__getitem__)
    node = get(union, "a")
    names, cookies = _read((await directories.entries(node, 0))[0])
    assert len(set(cookies)) == len(set(names)) == 50
    assert max(cookies) < 1 << 31
    for index, cookie in enumerate(cookies):
        assert (await directories.entries(node, cookie))[1] == index + 1
    assert names == sorted(names, key=lambda name: (hashes[name], name))


@pytest.mark.parametrize("different", [1, 2, 5])
async def test_readers_among_equal_hashes_while_names_come_and_go(
    lower: Path, open_union: OpenUnion, different: int
) -> None:
    """Whatever changes while they read: what is there all the time they see once, and in one piece."""
    random = Random(different)
    union = open_union()
    directories = Directories(lambda name: zlib.crc32(name) % different)
    node = get(union, "a")
    steady = {b"n%d" % number for number in range(0, 50, 2)}
    readers: list[tuple[int, list[bytes]]] = [(0, [])]
    finished = 0
    for turn in range(4000):
        if random.random() < 0.5:  # only names that are no reader's last stay
            path = lower / "a" / f"n{random.randrange(0, 50) | 1}"
            path.unlink() if path.exists() else path.touch()
            directories.end(node)
        which = random.randrange(len(readers))
        offset, seen = readers[which]
        entries, first = await directories.entries(node, offset)
        names, cookies = _read(entries)
        taken = slice(first, first + random.randrange(1, 5))
        seen += names[taken]
        if cookies[taken]:
            readers[which] = cookies[taken][-1], seen
            if turn % 7 == 0:  # seekdir: another one continues at the same place
                readers.append((cookies[taken][-1], seen.copy()))
            continue
        finished += 1
        assert sorted(name for name in seen if name in steady) == sorted(steady)
        readers[which] = 0, []
    assert finished > 20


async def test_hashes_of_dot_and_dot_dot_are_not_given(lower: Path, open_union: OpenUnion) -> None:
    node = get(open_union(), "a")
    names, cookies = _read((await Directories(lambda name: 0).entries(node, 0))[0])
    assert min(cookies) > DOT_DOT
    assert len(set(cookies)) == len(names) == 50


@pytest.mark.parametrize("hash_", [2**64 - 1, 2**63, 2**31 - 1, 2**31 - 2**24 - 3, 2**31 - 2**24 - 4])
async def test_no_cookie_needs_more_than_31_bits(
    lower: Path, open_union: OpenUnion, hash_: int
) -> None:
    hashes = iter(range(hash_ - 25, hash_ + 25))
    directories = Directories(lambda name: next(hashes))
    _, cookies = _read((await directories.entries(get(open_union(), "a"), 0))[0])
    assert DOT_DOT < min(cookies) <= max(cookies) < 2**31


async def test_unknown_tickets(lower: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset that no listing contained, and one that is too old, are errors and no endless listing."""
    monkeypatch.setattr(tickets, "_KEPT", 10)
    union = open_union()
    directories = Directories(lambda name: 0)
    node = get(union, "a")
    with pytest.raises(OSError, match="Invalid argument"):
        await directories.entries(node, tickets.FIRST_TICKET)
    _, cookies = _read((await directories.entries(node, 0))[0])
    with pytest.raises(OSError, match="Invalid argument"):
        await directories.entries(node, cookies[0])
    assert (await directories.entries(node, cookies[48]))[1] == 49


async def test_the_oldest_are_dropped(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    directories = Directories(names=120)
    nodes = [get(union, name) for name in ("a", "b", "c")]
    first = [await directories.entries(node, 0) for node in nodes]
    assert len(directories) == 2
    # the dropped listing is recreated to continue reading
    cookie = first[0][0].cookie(20)
    assert (await directories.entries(nodes[0], cookie))[1] == 21
    assert len(directories) == 2
    for node in nodes:
        directories.end(node)
        directories.end(node)
    assert len(directories) == 0
    for _ in range(10):
        await directories.entries(nodes[0], 0)
    assert len(directories) == 1


async def test_one_listing_is_kept_however_large(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    directories = Directories(names=10)
    await directories.entries(get(union, "a"), 0)
    assert len(directories) == 1


async def test_a_cancelled_listing_closes_its_fds(lower: Path, open_union: OpenUnion) -> None:
    """A request that was interrupted before its thread began: nothing else has the fds."""
    for number in range(4000):
        (lower / "a" / f"{number:040}").touch()
    union = open_union()
    node = get(union, "a")
    node.territory.listing(node).close()  # opens the directories
    fds = os.listdir("/proc/self/fd")
    with trio.CancelScope() as scope:
        scope.cancel()
        await Directories().entries(node, 0)
    assert scope.cancelled_caught
    assert os.listdir("/proc/self/fd") == fds
