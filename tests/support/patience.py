"""How long a test waits: longer on a slow machine, such as an emulated one.

``UNIONFS_TEST_SLOWNESS`` is the factor (default 1); scripts/vm-test sets it. It applies to deadlines, which
bound how long a failure takes; nothing waits longer than it must.
"""

from __future__ import annotations

import os

SLOWNESS = float(os.environ.get("UNIONFS_TEST_SLOWNESS") or 1)


def patient(seconds: float) -> float:
    """Seconds on this machine for seconds on an ordinary one."""
    return seconds * SLOWNESS
