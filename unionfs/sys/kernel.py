"""The version of the running kernel."""

from __future__ import annotations

import os
import re


def kernel_version() -> tuple[int, int]:
    """Return its first two numbers, from uname(2): (6, 8) of 6.8-rc1-amd64."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
