"""How long a test waits: longer on a slow machine, such as one that is emulated.

``UNIONFS_TEST_SLOWNESS`` is the factor (default 1); scripts/vm-test sets it. Deadlines there bound how long a
failure takes to show; nothing waits longer than it must.
"""

from __future__ import annotations

import os

SLOWNESS = float(os.environ.get("UNIONFS_TEST_SLOWNESS") or 1)


def patient(seconds: float) -> float:
    """So many seconds on an ordinary machine, as seconds on this one."""
    return seconds * SLOWNESS
