"""The container runtimes, by name."""

from __future__ import annotations

from typing import Final

AUTO: Final = "auto"
"""The first of the others that can be used."""
RUNTIMES: Final = (AUTO, "bubblewrap", "crun")
