"""The plugin's connections on streams in memory and with a clock that jumps: what arrives late or half."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from unionfs.plugin.requests import Answer
from unionfs.plugin.serving import converse
from unionfs.sys.peers import Peer

HEAD = b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


@dataclass
class Asked:
    """What was asked, and whether it was undone."""

    requests: list[tuple[str, bytes, int]] = field(default_factory=list)
    undone: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: str, body: bytes, caller: int) -> Answer:
        self.requests.append((request, body, caller))
        return Answer(200, b"{}", self.undone.set)


@pytest.fixture
def asked() -> Asked:
    return Asked()


async def _converse(server: trio.StapledStream, asked: Asked) -> None:  # type: ignore[type-arg]
    await converse(server, Peer(77, 0), asked, trio.CapacityLimiter(1))


async def _rest(client: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(part) async for part in client])


@pytest.mark.parametrize("sent", [b"", b"POST /Vol", HEAD, HEAD + b"{"])
async def test_a_half_written_request_is_dropped_after_its_time(
    asked: Asked, sent: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    client, server = trio.testing.memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_converse, server, asked)
        if sent:
            await client.send_all(sent)
        answer = await _rest(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert trio.current_time() - began >= 30
    assert asked.requests == []


async def test_drops_in_time_do_not_stretch_it(
    asked: Asked, autojump_clock: trio.testing.MockClock
) -> None:
    client, server = trio.testing.memory_stream_pair()
    sent = 0

    async def drip() -> None:
        nonlocal sent
        for byte in HEAD + b"{}":
            await client.send_all(bytes([byte]))
            sent += 1
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_converse, server, asked)
        nursery.start_soon(drip)
        assert (await client.receive_some()).startswith(b"HTTP/1.1 408 ")
        nursery.cancel_scope.cancel()
    assert sent <= 31


async def test_a_request_cut_off_asks_nothing(asked: Asked) -> None:
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(HEAD + b"{")
    await client.aclose()
    await _converse(server, asked)
    assert asked.requests == []


async def test_an_answer(asked: Asked) -> None:
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(HEAD + b"{}")
    await _converse(server, asked)
    assert (await _rest(client)).startswith(b"HTTP/1.1 200 ")
    assert asked.requests == [("VolumeDriver.Get", b"{}", 77)]
    assert not asked.undone.is_set()


async def test_an_answer_that_nobody_takes_is_undone(asked: Asked) -> None:
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(HEAD + b"{}")
    await client.aclose()
    await _converse(server, asked)
    assert len(asked.requests) == 1
    assert asked.undone.is_set()
