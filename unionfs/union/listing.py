"""Names in real directories."""

from __future__ import annotations

import os
import re
import sys
from typing import Final

from unionfs.core import layercalls

#: An NFS client's name for a removed file with an open fd: its number in 16 digits and a count in 8
#: (fs/nfs/unlink.c, nfs_sillyrename).
NFS_REMOVED: Final = re.compile(r"\.nfs[0-9a-f]{24}")
#: Like `os.fsencode`, which checks each name's type first.
_ENCODING: Final = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


def real_names(fd: int) -> list[bytes]:
    """All names in a real directory."""
    return [name.encode(*_ENCODING) for name in layercalls.call(os.listdir, fd)]
