"""What was agreed with the kernel, as plain values for another daemon of the mount.

The kernel asks once, so another daemon keeps to the answer, even if its version would agree on something
else.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from unionfs.fuse.protocol import Decision, Init, InitReply, IoMode, Opcode


def to_json(decision: Decision) -> dict[str, Any]:
    """JSON-able values for :func:`from_json`."""
    values = {one.name: getattr(decision, one.name) for one in fields(Decision)}
    values["reply"] = list(decision.reply)
    values["io"] = str(decision.io)
    values["why_not"] = {str(mode): why for mode, why in decision.why_not.items()}
    values["missing"] = {str(int(flag)): why for flag, why in decision.missing.items()}
    values["enosys"] = sorted(int(opcode) for opcode in decision.enosys)
    return values


def from_json(values: dict[str, Any]) -> Decision:
    """The decision. Raises KeyError, TypeError or ValueError for other values."""
    return Decision(**{
        **values,
        "reply": InitReply(*values["reply"]),
        "io": IoMode(values["io"]),
        "why_not": {IoMode(mode): why for mode, why in values["why_not"].items()},
        "missing": {Init(int(flag)): why for flag, why in values["missing"].items()},
        "enosys": frozenset(Opcode(opcode) for opcode in values["enosys"]),
    })
