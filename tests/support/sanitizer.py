"""Whether the tests run with AddressSanitizer (`scripts/test --asan`)."""

from __future__ import annotations

import os
from typing import Final

SANITIZED: Final = "libasan" in os.environ.get("LD_PRELOAD", "")
