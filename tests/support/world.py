"""The same content three times: as the lower of a union, as the lower of kernel overlayfs, and native.

The expected value of a test is the result of the same calls on one of the other two.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import mounting
from tests.support.mounting import Mount

Build = Callable[[Path], object]


def nothing(root: Path) -> None:
    """An empty layer."""


@dataclass
class World:
    """``union`` is the mountpoint under test; ``kernel`` and ``native`` are the references."""

    area: Path
    mount: Mount
    kernel_mount: Mount
    native: Path

    @property
    def union(self) -> Path:
        """The mountpoint of the union."""
        return self.mount.mountpoint

    @property
    def kernel(self) -> Path:
        """The mountpoint of kernel overlayfs."""
        return self.kernel_mount.mountpoint

    @property
    def lower(self) -> Path:
        """The union's topmost lower."""
        return self.mount.lowers[0]

    @property
    def upper(self) -> Path:
        """The union's upper."""
        assert self.mount.upper is not None
        return self.mount.upper

    @property
    def kernel_upper(self) -> Path:
        """The upper that the kernel writes."""
        assert self.kernel_mount.upper is not None
        return self.kernel_mount.upper

    def as_native(self, function: Callable[[Path], Any]) -> Any:
        """Run the function on the union and natively; both results must be equal. Returns the result."""
        expected, found = outcome(function, self.native), outcome(function, self.union)
        assert found == expected
        return found

    def as_kernel(self, function: Callable[[Path], Any]) -> Any:
        """Run the function on the union and on kernel overlayfs; both results must be equal. Returns it."""
        expected, found = outcome(function, self.kernel), outcome(function, self.union)
        assert found == expected
        return found


def outcome(function: Callable[[Path], Any], root: Path) -> Any:
    """What the function returns, or its errno."""
    try:
        return function(root)
    except OSError as error:
        return f"errno {error.errno} ({os.strerror(error.errno or 0)})"


def errno_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The errno of a call; 0 if it succeeds."""
    try:
        function(*args, **kwargs)
    except OSError as error:
        return error.errno or 0
    return 0


@contextlib.contextmanager
def world(
    area: Path, session: str, builds: Sequence[Build], *, options: Sequence[str] = ()
) -> Iterator[World]:
    """Build each lower (topmost first) twice, and natively all of them into one directory, bottom first."""
    mask = os.umask(0o022)
    try:
        homes = {name: area / name for name in ("u", "k")}
        for home in homes.values():
            for part in ("upper", "work", *(f"lower{index}" for index in range(len(builds)))):
                (home / part).mkdir(parents=True)
        native = area / "native"
        native.mkdir()
        for index, build in enumerate(builds):
            for home in homes.values():
                build(home / f"lower{index}")
        for home in homes.values():
            # The root of a union is its upper's.
            shutil.copystat(home / "lower0", home / "upper")
        if len(builds) == 1:
            builds[0](native)
    finally:
        os.umask(mask)
    lowers = {name: [home / f"lower{index}" for index in range(len(builds))] for name, home in homes.items()}
    redirects = [o for o in options if o.startswith("redirect_dir=")] or ["redirect_dir=on"]
    with (
        mounting.kernel_mounted(
            homes["k"],
            lowers=lowers["k"],
            upper=homes["k"] / "upper",
            work=homes["k"] / "work",
            options=[*redirects, *(() if "index=off" in options else ("index=on",))],
        ) as kernel,
        mounting.mounted(
            homes["u"],
            lowers=lowers["u"],
            upper=homes["u"] / "upper",
            work=homes["u"] / "work",
            session=session,
            options=options,
        ) as mount,
    ):
        yield World(area, mount, kernel, native)
