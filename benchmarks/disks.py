"""New filesystems in files, for benchmarks that must not depend on what was on the disk before."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

KINDS: Final = ("ext4", "xfs", "btrfs")
"""Of these xfs and btrfs have reflinks."""
_BYTES: Final = 4 << 30
_QUIET_AND_FORCED: Final = {"ext4": ("-q", "-F"), "xfs": ("-q", "-f"), "btrfs": ("-q", "-f")}


@contextmanager
def new_filesystem(area: Path, kind: str = "ext4") -> Iterator[Path]:
    """Mount a new filesystem of 4 GiB, in a sparse file in `area`; also `zfs`. Requires root."""
    with tempfile.NamedTemporaryFile(dir=area) as image, tempfile.TemporaryDirectory(dir=area) as place:
        image.truncate(_BYTES)
        if kind == "zfs":
            pool = f"unionfs-{Path(place).name}"
            _call("zpool", "create", "-o", "cachefile=none", "-m", place, pool, image.name)
            undo = ("zpool", "destroy", "-f", pool)
        else:
            _call(f"mkfs.{kind}", *_QUIET_AND_FORCED[kind], image.name)
            _call("mount", "-o", "loop", image.name, place)
            undo = ("umount", "-R", "-l", place)
        try:
            yield Path(place)
        finally:
            subprocess.run(undo, check=False)


def _call(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
