"""The port that the pages are served at."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

from unionfs.errors import UserError, quoted, reason

_BACKLOG: Final = 64


def listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens at an IP address; port 0: any free one. Raises UserError."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    except ValueError:
        raise UserError(
            f"--address {quoted(address)} is not an IP address; write one such as 127.0.0.1 or ::1."
        ) from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at port {port} of {address}: {reason(error)}; choose another with --port (0: any "
            "free one) or --address."
        ) from error
    return listener


def is_local(address: str) -> bool:
    """Return whether only this host can connect to an IP address."""
    return ipaddress.ip_address(address).is_loopback


def url_of(listener: socket.socket) -> str:
    """Return the address of a listening socket for a browser of this host, without a path."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
