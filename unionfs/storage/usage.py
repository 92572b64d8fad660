"""The size of a volume's content."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from unionfs.storage.drivers import image
from unionfs.storage.model import Volume


def size_of_tree(path: str) -> int:
    """The bytes of all files below a directory; counts each inode once, without directories and holes.

    Stays on the filesystem, follows no symlink, and ignores files that vanish during the walk. Raises OSError
    when a directory cannot be read.
    """
    total, device = 0, os.lstat(path).st_dev
    seen: set[tuple[int, int]] = set()
    waiting = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    names: list[list[str]] = [os.listdir(waiting[0])]
    try:
        while waiting:
            if not names[-1]:
                names.pop()
                os.close(waiting.pop())
                continue
            name = names[-1].pop()
            try:
                status = os.stat(name, dir_fd=waiting[-1], follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    if status.st_dev == device:
                        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                        fd = os.open(name, flags, dir_fd=waiting[-1])
                        waiting.append(fd)
                        names.append(os.listdir(fd))
                    continue
            except (FileNotFoundError, NotADirectoryError):
                continue
            if status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            held = status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else status.st_size
            total += min(status.st_size, held)
    finally:
        for fd in waiting:
            os.close(fd)
    return total


def reclaimable(volume: Volume) -> int:
    """The bytes that removing an unused volume frees on this host; 0 for storage elsewhere.

    `size_of_tree` of a volume's data is another size: that of its content, wherever it is, without what the
    filesystem of an image takes itself, and with the lowers of a union.
    """
    if image.exists(volume):
        return os.stat(image.path_of(volume)).st_blocks * 512
    match volume.driver:
        case "local" if "type" not in volume.options:
            own = ["_data"]
        case "union":
            own = ["upper", "views"]
        case _:
            own = []
    total = 0
    for name in own:
        with suppress(OSError):
            total += size_of_tree(f"{volume.directory}/{name}")
    return total
