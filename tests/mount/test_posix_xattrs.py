"""Extended attributes: on every type, of every namespace, and the overlay's own."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from tests.support import actions, snapshot
from tests.support.worker import Worker
from tests.support.world import World, errno_of

MakeWorld = Callable[..., World]
USER, TEAM, FOREIGN = 1000, 1001, 3000


def test_xattrs_on_everything(world: MakeWorld, user: Worker) -> None:
    """User xattrs exist on files and directories only; trusted ones are root's; symlinks are not followed."""

    def build(root: Path) -> None:
        (root / "f").write_bytes(b"x")
        (root / "d").mkdir()
        (root / "l").symlink_to("f")
        (root / "lost").symlink_to("nowhere")
        os.mkfifo(root / "p")
        os.mknod(root / "c", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(root / "s", stat.S_IFSOCK | 0o666)
        for name in ("f", "d"):
            (root / name).chmod(0o777)
            os.setxattr(root / name, "user.lower", b"1")
        os.setxattr(root / "l", "trusted.lower", b"2", follow_symlinks=False)

    made = world(build)
    names = ["user.a", "trusted.a", "security.a", "user.", "user", "other.a", "user." + "x" * 250,
             "user." + "x" * 251, "system.a", "trusted.overlayx",
             "user.overlay.opaque", "user.lower"]  # fmt: skip

    def calls(root: Path) -> list[object]:
        (root / "own").write_bytes(b"")
        (root / "own").chmod(0o666)
        found: list[object] = []
        for path in sorted(root.iterdir()):
            for name in names:
                for who in (user, None):
                    for function, args in (
                        (os.setxattr, (name, b"v", os.XATTR_REPLACE)),
                        (os.setxattr, (name, b"v", os.XATTR_CREATE)),
                        (os.setxattr, (name, b"w", os.XATTR_CREATE)),
                        (os.setxattr, (name, b"", 0)),
                        (os.getxattr, (name,)),
                        (os.removexattr, (name,)),
                        (os.removexattr, (name,)),
                    ):
                        found.append((path.name, name, errno_of(_xattr_call, who, function, str(path), args)))
            found.append(sorted(os.listxattr(path, follow_symlinks=False)))
            found.append(sorted(user.call(actions.list_xattrs, str(path))) if user.alive else None)
        found.append(errno_of(os.setxattr, root / "f", "user.big", b"x" * 65536))
        found.append(errno_of(os.setxattr, root / "f", "user.big", b"x" * 65537))
        return found

    made.as_native(calls)


def _xattr_call(
    who: Worker | None, function: Callable[..., object], path: str, args: tuple[object, ...]
) -> None:
    if who is None:
        actions.without_following(function, path, args)
    else:
        who.call(actions.without_following, function, path, args)


def test_removal_by_the_group(world: MakeWorld, user: Worker) -> None:
    """A member may remove an xattr of another user's file with setuid, which the group can write."""

    def build(root: Path) -> None:
        (root / "f").write_bytes(b"x")
        os.chown(root / "f", FOREIGN, TEAM)
        (root / "f").chmod(0o4775)
        os.setxattr(root / "f", "user.lower", b"1")

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = [errno_of(_xattr_call, user, os.removexattr, str(root / "f"), ("user.lower",))]
        return [*found, os.listxattr(root / "f")]

    assert made.as_native(calls) == [0, []]


def test_overlay_xattrs_are_escaped(world: MakeWorld) -> None:
    """A user's trusted.overlay.* is stored as by the kernel; the overlay's own are never shown."""

    def build(root: Path) -> None:
        (root / "d/sub").mkdir(parents=True)
        (root / "d/f").write_bytes(b"x")
        os.setxattr(root / "d/f", "trusted.overlay.origin", b"junk")
        os.setxattr(root / "d/f", "trusted.overlay.overlay.mine", b"kept")

    made = world(build, options=("index=off", "redirect_dir=off"))

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for name in ("d", "d/f", "new"):
            path = root / name
            if name == "new":
                path.mkdir()
            for key in ("opaque", "redirect", "metacopy", "origin", "impure", "overlay.x", "whiteout", "x"):
                found.append(errno_of(os.setxattr, path, "trusted.overlay." + key, b"y"))
            found.append(snapshot.read_xattrs(str(path)))
            found.append(errno_of(os.removexattr, path, "trusted.overlay.opaque"))
            found.append(errno_of(os.removexattr, path, "trusted.overlay.nothing"))
            found.append(errno_of(os.getxattr, path, "trusted.overlay.opaque"))
            found.append(sorted(os.listxattr(path)))
        (root / "d/new").mkdir()
        (root / "d/sub").rmdir()
        (root / "d/sub").mkdir()
        found.append(sorted(os.listxattr(root / "d/sub")))
        return found

    made.as_kernel(calls)
    own = {"trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.uuid"}
    for name in ("d", "d/f", "new"):
        ours, theirs = (snapshot.read_xattrs(str(upper / name)) for upper in (made.upper, made.kernel_upper))
        assert {k: v for k, v in ours.items() if k not in own} == {
            k: v for k, v in theirs.items() if k not in own
        }
