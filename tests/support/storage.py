"""A union with storage, its layers and host directories; always cleaned up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.mount import cli_calls
from tests.mount.cli_calls import Done, Place, session_words, succeed, wait_for
from tests.support import areas
from unionfs.sys.process import children_of, command_of, start_time


class Storage:
    """A place with layers, a storage root, and a host directory."""

    def __init__(self, place: Place, session: str = "direct") -> None:
        self.place = place
        self.root = place.root / "storage"
        self.host = place.root / "host"
        self.host.mkdir()
        (self.host / "file").write_text("host\n")
        self.merged = place.merged
        self._session = session_words(session)

    def unionfs(self, *arguments: str | Path, cwd: Path | None = None, **extra: Any) -> Done:
        """Run `unionfs` with this storage root."""
        environment = {"UNIONFS_ROOT": str(self.root), **extra.pop("env", {})}
        return cli_calls.unionfs(*arguments, cwd=cwd, env=environment, **extra)

    def try_mount(self, *storage: str | Path, layers: bool = True) -> Done:
        """Mount with these options; the mount may be refused."""
        chosen = self.place.layers if layers else ()
        return self.unionfs("mount", *chosen, *self._session, *storage, self.merged)

    def mount(self, *storage: str | Path, layers: bool = True) -> int:
        """Mount with these options; return the daemon's pid."""
        assert succeed(self.try_mount(*storage, layers=layers)) == ""
        return self.place.pid()

    def umount(self) -> None:
        """Unmount; afterwards nothing is mounted, and the daemon is gone."""
        pid = self.place.pid()
        succeed(self.unionfs("umount", self.merged))
        assert self.mounts() == []
        assert cli_calls.gone(pid)

    def mounts(self) -> list[tuple[str, str]]:
        """(path in the union, type) of the mounts at and in the union; the kernel orders them by id."""
        return [
            (where.removeprefix(str(self.merged)) or "/", kind)
            for _, where, kind in areas.mounts_below(self.merged)
        ]

    def is_listed(self) -> bool:
        """Whether `unionfs ls` lists the union."""
        found = cli_calls.listed(self.unionfs("ls", "--json"))
        return any(item["mountpoint"] == str(self.merged) for item in found)

    def volume(self, name: str) -> Path:
        """A volume's directory."""
        return self.root / "volumes" / name / "_data"

    def volumes(self) -> list[str]:
        """The names of all volumes."""
        path = self.root / "volumes"
        return sorted(os.listdir(path)) if path.is_dir() else []

    def guardian(self) -> int:
        """The pid of the process that watches the daemon."""
        (found,) = [pid for pid in children_of(self.place.pid()) if command_of(pid) == "unionfs-guard"]
        assert start_time(found) is not None
        return found


@contextmanager
def storage(area: Path, session: str = "direct") -> Iterator[Storage]:
    """A union's layers and storage in `area`."""
    with cli_calls.place(area) as place:
        yield Storage(place, session)


def unmounted(found: Storage) -> bool:
    """Wait until nothing of it is mounted."""
    return wait_for(lambda: found.mounts() == [])
