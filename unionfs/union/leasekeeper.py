"""Renews the lease of an upper, in a thread: a server that does not answer holds up nothing else."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Final

from unionfs.errors import LayerError, quoted, reason
from unionfs.union.leases import Lease, clock

_EVERY: Final = 1 / 6
"""Of the time that a lease runs it is renewed once, and tried again five times as often."""
_END_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 0.02

log = logging.getLogger(__name__)


class Keeper:
    """The lease of this process, until :meth:`end`."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._one = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._trouble = ""

    @property
    def passes(self) -> bool:
        """Whether the upper may be changed now: no other host can have taken the lease."""
        return clock() < self._lease.until and not self._lease.lost

    @property
    def lost(self) -> str:
        """Why the upper must not be changed any more, as a clause; empty while that may be."""
        return self._lease.lost

    def begin(self) -> None:
        """Renew it from now on. Raises LayerError if it was lost since it was claimed."""
        self._renew()
        if self.lost:
            raise LayerError(
                f"upper {quoted(self._lease.upper)} cannot be used: {self.lost} while it was being mounted; "
                "unmount it there, or try again."
            )
        self.go_on()

    def go_on(self) -> None:
        """Renew it from now on, also one that may be lost."""
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Renew it at once."""
        self._wake.set()

    def end(self) -> None:
        """Renew it no more, and remove it, unless the server does not answer: then it runs out."""
        self._ended = True
        self._lease.leave()
        self._wake.set()
        if self._one.acquire(timeout=_END_SECONDS):
            self._lease.end()
            self._one.release()

    def is_sure(self) -> bool:
        """The same as :attr:`passes`, but if it is in doubt, wait a while for the server to tell."""
        if self._thread is None:
            if not self.passes:
                self._renew()
            return self.passes
        deadline = clock() + _END_SECONDS
        if not self.passes:
            self.hurry()
        while not self.passes and not self.lost and clock() < deadline:
            time.sleep(_LOOK_SECONDS)
        return self.passes

    def is_renewed(self) -> bool:
        """Renew it now. Returns False if it is lost, or if the server does not answer within a while."""
        before, deadline = self._lease.until, clock() + _END_SECONDS
        if self._thread is None:
            self._renew()
        while self._lease.until <= before and not self.lost and clock() < deadline:
            self.hurry()
            time.sleep(_LOOK_SECONDS)
        return self._lease.until > before and not self.lost

    def wait(self) -> None:
        """Return when the upper may be changed, as long as the server takes. Raises LayerError if it may not
        be any more."""
        while not self.passes:
            if self.lost:
                raise LayerError(
                    f"upper {quoted(self._lease.upper)} was not changed any further: {self.lost}; run the "
                    "command again when nobody uses it."
                )
            self.hurry()
            time.sleep(_LOOK_SECONDS)

    def kept(self) -> dict[str, Any]:
        """What another process with the same open files needs to go on with it: JSON-able."""
        return {"parent": self._lease.parent, "fd": self._lease.fd, "token": self._lease.owner.token}

    def figures(self) -> dict[str, Any]:
        """JSON-able."""
        lease = self._lease
        renewed = max(0.0, clock() - (lease.until - lease.owner.seconds * 2 / 3)) if lease.until else None
        return {
            "renewed_seconds_ago": None if renewed is None else round(renewed, 1),
            "seconds": lease.owner.seconds,
            "waits": not self.passes and not lease.lost,
            "lost_because": lease.lost or None,
        }

    def _run(self) -> None:
        runs = self._lease.owner.seconds
        ok = self.passes or self._renew()
        while not self._ended and not self.lost:
            self._wake.wait(runs * _EVERY * (1 if ok else 0.2))
            self._wake.clear()
            ok = self._renew()

    def _renew(self) -> bool:
        """Returns False if the server could not tell."""
        lease = self._lease
        with self._one:
            if self._ended:
                return True
            try:
                lease.renew()
            except OSError as error:
                cause = reason(error)
                if self._trouble != cause:
                    self._trouble = cause
                    log.warning("the lease of upper %s cannot be renewed: %s", quoted(lease.upper), cause)
                return False
        if self._trouble:
            self._trouble = ""
            log.info("the lease of upper %s was renewed", quoted(lease.upper))
        if lease.lost:
            log.critical(
                "upper %s must not be changed any more: %s; all requests fail with EIO until the mount is "
                "unmounted", quoted(lease.upper), lease.lost,
            )  # fmt: skip
        return True
