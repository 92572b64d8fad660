"""Published ports: `-p [IP:]HOST:CONTAINER[/tcp|/udp]`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from unionfs.errors import UserError, quoted

_ANY = "0.0.0.0"
_HIGHEST = 65535
_PROTOCOLS = ("tcp", "udp")


@dataclass(frozen=True, slots=True)
class Port:
    """A port of the host that leads to one of a container."""

    address: str
    host: int
    container: int
    protocol: str = "tcp"

    def __str__(self) -> str:
        """Docker's spelling."""
        return f"{self.address}:{self.host}->{self.container}/{self.protocol}"


def parse_ports(given: Iterable[str]) -> tuple[Port, ...]:
    """Raises UserError, also for a port that is published twice."""
    found = tuple(_parse(text) for text in given)
    seen: list[Port] = []
    for port in found:
        for other in seen:
            same = (port.host, port.protocol) == (other.host, other.protocol)
            if same and (port.address == other.address or _ANY in (port.address, other.address)):
                raise UserError(
                    f"-p: port {port.host}/{port.protocol} of the host is published twice; leave one out."
                )
        seen.append(port)
    return found


def _parse(text: str) -> Port:
    wanted, slash, protocol = text.partition("/")
    words = wanted.rsplit(":", 2)
    if slash and protocol not in _PROTOCOLS:
        raise UserError(f"-p {quoted(text)}: unknown protocol {quoted(protocol)}; it is tcp or udp.")
    if len(words) < 2:
        raise UserError(f"-p {quoted(text)}: the host's port is missing; write -p HOST:CONTAINER.")
    address = words[0] if len(words) == 3 else _ANY
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        raise UserError(
            f"-p {quoted(text)}: invalid IPv4 address {quoted(address)}; write -p [IP:]HOST:CONTAINER."
        ) from None
    return Port(address, _number(text, words[-2]), _number(text, words[-1]), protocol or "tcp")


def _number(text: str, word: str) -> int:
    if word.isascii() and word.isdecimal() and len(word) < 6 and 0 < int(word) <= _HIGHEST:
        return int(word)
    raise UserError(f"-p {quoted(text)}: invalid port {quoted(word)}; write a number from 1 to {_HIGHEST}.")
