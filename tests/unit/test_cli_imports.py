"""What short commands import, which is most of their time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_RUN = """
import os, sys
os._exit = sys.exit
sys.argv[0] = "unionfs"
from unionfs.cli.main import main
try:
    main()
except SystemExit:
    pass
slow = {"asyncio", "importlib.metadata", "rich", "shutil", "subprocess", "tempfile", "trio", "xxhash"}
print("imported:", *sorted(slow & set(sys.modules)))
"""


@pytest.mark.parametrize("words", [["ls"], ["inspect", "/none"], ["umount", "/none"], ["ps"], ["rm", "none"]])
def test_nothing_slow(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *words], capture_output=True, text=True, check=True,
        env={**os.environ, "UNIONFS_ROOT": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "imported:", done
