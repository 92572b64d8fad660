"""The service manager that started this process."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


class Manager:
    """systemd, if it waits for the state of this process; sd_notify(3)."""

    def __init__(self) -> None:
        # Processes that are started here are no part of the service.
        self._address = os.environ.pop("NOTIFY_SOCKET", "")

    def tell(self, state: str) -> None:
        """Tell a state, such as `READY=1`."""
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notice:
            notice.sendto(state.encode(), address)
