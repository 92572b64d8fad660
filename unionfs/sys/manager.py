"""The service manager that started this process."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Final

_SECONDS: Final = 1.0


class Manager:
    """systemd, if it waits for the state of this process; sd_notify(3), sd_watchdog_enabled(3)."""

    def __init__(self) -> None:
        # Processes that are started here are not part of the service.
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        self.watchdog_seconds = _watchdog_seconds()
        """It ends this process if it hears nothing of it for so long; None: it does not."""

    def tell(self, *states: str) -> None:
        """Tell states, such as `READY=1`, in one message."""
        if not self._address:
            return
        # For start-up time: few processes have a manager.
        import socket

        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        text = "\n".join(" ".join(state.split("\n")) for state in states)
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notice:
            # Of a manager that does not read; an event loop waits here.
            notice.settimeout(_SECONDS)
            notice.sendto(text.encode("utf-8", "backslashreplace"), address)


def _watchdog_seconds() -> float | None:
    microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if pid not in ("", str(os.getpid())):
        return None
    try:
        return int(microseconds) / 1e6 if int(microseconds) > 0 else None
    except ValueError:
        return None


def is_journal(stream: IO[str]) -> bool:
    """Whether a stream goes to the journal, which takes a priority at the start of a line; systemd.exec(5),
    JOURNAL_STREAM."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def journal_prefix(stream: IO[str]) -> str:
    """What a line with an error starts with: its priority if it goes to the journal; sd-daemon(3)."""
    return "<3>" if is_journal(stream) else ""
