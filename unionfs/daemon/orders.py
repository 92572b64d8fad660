"""Orders to the daemon of a mount, given by a command over the control socket (see `control`).

An order is a question with the key `order`. The daemon answers when it is carried out, with `done`, or with
`failed` and the reason.
"""

from __future__ import annotations

import time
from typing import Any, Final

from unionfs.daemon.live import LiveMount, live_mounts
from unionfs.errors import UserError, on_failure, quoted, with_cure

END: Final = "end"
"""The order to end, and to cut off who uses the mount."""

_ORDER: Final = "order"
_EXCHANGE_SECONDS: Final = 30.0
_SECONDS: Final = 1_000_000.0  # poll(2) takes milliseconds in 31 bits


def order_in(question: dict[str, Any]) -> str | None:
    """Return the order in a client's question, if it contains one."""
    order = question.get(_ORDER)
    return order if isinstance(order, str) else None


def done() -> dict[str, Any]:
    """Return the answer to an order that is carried out."""
    return {"done": True}


def failed(why: str) -> dict[str, Any]:
    """Return the answer to an order that cannot be carried out; `why` is part of a sentence."""
    return {"failed": why}


def give(mount: LiveMount, order: str, what: str, cure: str) -> None:
    """Give the daemon an order, and wait until it is carried out.

    Raises UserError: "MOUNTPOINT cannot be `what`: the reason; `cure`."
    """
    place = quoted(mount.settings.mountpoint)
    with on_failure(f"{place} cannot be {what}", "try again"):
        answer = mount.asked({_ORDER: order}, timeout=_SECONDS)
    if answer is None:
        raise UserError(
            f"{place} cannot be {what}: its daemon (pid {mount.pid}) ended or does not answer; `unionfs ls` "
            "lists active mounts."
        )
    if answer.get("done") is True:
        return
    why = answer.get("failed")
    if isinstance(why, str):
        raise UserError(f"{place} cannot be {what}: {with_cure(why, cure)}.")
    raise UserError(
        f"{place} cannot be {what}: its daemon (pid {mount.pid}) is of an earlier version; mount it again."
    )


def ask_for(mount: LiveMount, question: dict[str, Any]) -> dict[str, Any]:
    """Give the daemon an order with more keys; returns its answer. Raises UserError, with the daemon's
    sentence."""
    place = quoted(mount.settings.mountpoint)
    with on_failure(f"{place} cannot be asked", "try again"):
        answer = mount.asked(question, timeout=_SECONDS)
    if answer is None:
        raise UserError(
            f"{place}: its daemon (pid {mount.pid}) ended or does not answer; `unionfs ls` lists active "
            "mounts."
        )
    why = answer.get("failed")
    if isinstance(why, str):
        raise UserError(f"{why}." if ";" in why else f"{place} cannot change its layers: {why}; try again.")
    return answer


def exchange(mount: LiveMount) -> int:
    """Let the installed version take a mount over; returns the pid of the new daemon. Raises UserError."""
    place = quoted(mount.settings.mountpoint)
    give(mount, "exchange", "upgraded", "unmount it and mount it again")
    deadline = time.monotonic() + _EXCHANGE_SECONDS
    while time.monotonic() < deadline:
        found = [one for one in live_mounts() if one.device == mount.device and one.pid != mount.pid]
        if found:
            return found[0].pid
        time.sleep(_EXCHANGE_SECONDS / 600)
    raise UserError(f"{place} has no new daemon after {_EXCHANGE_SECONDS:.0f} seconds; see the log.")
