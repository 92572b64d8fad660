"""Who sees what when a lower file is copied up under live users: tried, and printed as a Markdown table."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support import areas, mounting

OLD, NEW = b"old data", b"the new data"
_IN_MODIFY = 0x2
_libc = ctypes.CDLL(None, use_errno=True)


def change(path: Path) -> None:
    """Another process writes to the file, which copies it up."""
    code = "import sys; f = open(sys.argv[1], 'r+b'); f.write(sys.argv[2].encode()); f.close()"
    subprocess.run([sys.executable, "-c", code, str(path), NEW.decode()], check=True)


def locked_out(path: Path, call: str) -> bool:
    """Whether another process that opens the file for writing is refused a lock."""
    code = (
        "import fcntl, sys\n"
        "f = open(sys.argv[1], 'r+b')\n"
        f"try: fcntl.{call}(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(1)\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 1


def data(found: bytes) -> str:
    """The cell for what was read."""
    return "new" if found.startswith(NEW[: len(found)]) else "old"


def old_read(path: Path) -> str:
    """read(2) on a descriptor that was opened before."""
    with path.open("rb", buffering=0) as file:
        change(path)
        return data(file.read(100) or b"")


def old_size(path: Path) -> str:
    """fstat(2) on it."""
    with path.open("rb", buffering=0) as file:
        change(path)
        return "new" if os.fstat(file.fileno()).st_size == len(NEW) else "old"


def old_mapping(path: Path) -> str:
    """A shared mapping made before, with its page read already."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[:3] == OLD[:3]
        change(path)
        return data(mapping[: len(OLD)])


def advisory(call: str) -> Callable[[Path], str]:
    """A lock that the reader holds against one the writer wants."""

    def probe(path: Path) -> str:
        with path.open("rb") as file:
            getattr(fcntl, call)(file, fcntl.LOCK_SH)
            return "meet" if locked_out(path, call) else "do not meet"

    return probe


def watch(path: Path) -> str:
    """An inotify watch set before."""
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert _libc.inotify_add_watch(fd, os.fsencode(path), _IN_MODIFY) >= 0
        change(path)
        ready, _, _ = select.select([fd], [], [], 1)
        return "told" if ready else "not told"
    finally:
        os.close(fd)


def reopened(path: Path) -> str:
    """Opening /proc/self/fd/N of the old descriptor for writing."""
    with path.open("rb") as file:
        change(path)
        try:
            with open(f"/proc/self/fd/{file.fileno()}", "r+b") as again:
                return data(again.read(100))
        except OSError as error:
            return error.strerror or "error"


def unlinked(path: Path) -> str:
    """The same for a lower file whose name is gone: its st_nlink, and opening it for writing."""
    with path.open("rb") as file:
        path.unlink()
        links = os.fstat(file.fileno()).st_nlink
        try:
            with open(f"/proc/self/fd/{file.fileno()}", "r+b"):
                return f"{links}, opens"
        except OSError as error:
            return f"{links}, {error.strerror}"


ROWS: dict[str, Callable[[Path], str]] = {
    "read of the old descriptor": old_read,
    "its fstat size": old_size,
    "an old mapping": old_mapping,
    "flock, reader and writer": advisory("flock"),
    "POSIX lock, reader and writer": advisory("lockf"),
    "inotify watch on the name": watch,
    "reopened for writing by /proc/self/fd": reopened,
    "unlinked: st_nlink, reopened for writing": unlinked,
}


def main() -> None:
    """Print the table."""
    places = ["native", "overlayfs", *mounting.sessions()]
    cells: dict[str, list[str]] = {}
    for row, probe in ROWS.items():
        for place in places:
            with areas.area() as area, contextlib.ExitStack() as stack:
                for name in ("lower", "upper", "work"):
                    (area / name).mkdir()
                (area / "lower/file").write_bytes(OLD)
                where = area / "lower"
                if place != "native":
                    mounted = mounting.mounted(
                        area, lowers=[where], upper=area / "upper", work=area / "work",
                        session="overlay" if place == "overlayfs" else place,
                    )  # fmt: skip
                    where = stack.enter_context(mounted).mountpoint
                cells.setdefault(row, []).append(probe(where / "file"))
    print("| | " + " | ".join(places) + " |")
    print("|---" * (len(places) + 1) + "|")
    for row, found in cells.items():
        print(f"| {row} | " + " | ".join(found) + " |")


if __name__ == "__main__":
    main()
