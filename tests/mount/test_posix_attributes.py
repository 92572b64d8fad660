"""Modes, owners, times, ACLs: changed and cleared by calls."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import acl, actions, syscalls
from tests.support.worker import Worker
from tests.support.world import World, errno_of, outcome

MakeWorld = Callable[..., World]
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
USER, TEAM, FOREIGN = 1000, 1001, 3000


def _mode(path: Path) -> str:
    return oct(path.lstat().st_mode)


def _has_capability(path: Path) -> bool:
    return "security.capability" in os.listxattr(path)


CHANGES: dict[str, Callable[[Worker | None, Path], None]] = {
    "write": lambda who, path: _run(who, actions.write_at, str(path), b"w", 0),
    "append": lambda who, path: _run(who, actions.append_lines, str(path), 1, 1),
    "fallocate": lambda who, path: _run(who, actions.allocate, str(path)),
    "truncate": lambda who, path: _run(who, os.truncate, str(path), 2),
    "truncate same size": lambda who, path: _run(who, os.truncate, str(path), 4),
    "open truncating": lambda who, path: _run(who, actions.open_truncating, str(path)),
    "chown -1 -1": lambda who, path: _run(who, os.chown, str(path), -1, -1),
    "chown group": lambda who, path: _run(who, os.chown, str(path), -1, TEAM),
    "chown owner": lambda who, path: _run(who, os.chown, str(path), USER, -1),
    "chmod same": lambda who, path: _run(who, os.chmod, str(path), stat.S_IMODE(os.stat(path).st_mode)),
    "utime": lambda who, path: _run(who, os.utime, str(path)),
    "setxattr": lambda who, path: _run(who, os.setxattr, str(path), "user.x", b"1"),
}


def _run(who: Worker | None, function: Callable[..., object], *args: object) -> None:
    if who is None:
        function(*args)
    else:
        who.call(function, *args)


def test_set_id_bits_and_capabilities_are_cleared(world: MakeWorld, user: Worker) -> None:
    """By write, truncate and chown, of lower and upper files, by root, the owner and others."""
    modes = (0o4777, 0o2777, 0o6777, 0o4666, 0o2666, 0o6666, 0o777)
    owners = ((0, 0), (USER, USER), (FOREIGN, FOREIGN), (FOREIGN, TEAM), (USER, FOREIGN))

    def build(root: Path) -> None:
        for change in CHANGES:
            for mode in modes:
                for owner, group in owners:
                    for by in ("root", "user"):
                        path = root / f"{change}.{mode:o}.{owner} {group}.{by}"
                        path.write_bytes(b"data")
                        os.chown(path, owner, group)
                        os.chmod(path, mode)
                        if mode in (0o6777, 0o777):
                            os.setxattr(path, "security.capability", CAPABILITY)

    made = world(build)

    def calls(root: Path) -> list[object]:
        own = root / "own"
        own.mkdir()
        own.chmod(0o777)
        build(own)
        found: list[object] = []
        for base in (root, own):
            for name in sorted(os.listdir(base)):
                if name == "own":
                    continue
                path = base / name
                change, mode, _, by = name.split(".")
                if made.mount.session == "pyfuse3" and change == "chown -1 -1" and mode in ("2666", "6666"):
                    continue  # the kernel sends no request
                code = errno_of(CHANGES[change], user if by == "user" else None, path)
                found.append((base.name == "own", name, code, _mode(path), _has_capability(path)))
        return found

    made.as_kernel(calls)


def test_capabilities_beside_setgid_for_locking(world: MakeWorld, user: Worker) -> None:
    """Another user's chown without an owner does not remove them, where setgid must be cleared as well."""

    def build(root: Path) -> None:
        for mode in (0o2666, 0o2767, 0o666):
            (root / f"{mode:o}").write_bytes(b"data")
            (root / f"{mode:o}").chmod(mode)
            os.setxattr(root / f"{mode:o}", "security.capability", CAPABILITY)

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for path in sorted(root.iterdir()):
            user.errno(os.chown, str(path), -1, -1)  # with pyfuse3 it succeeds
            found.append((path.name, _mode(path), _has_capability(path)))
        return found

    made.as_native(calls)


def test_chown_that_names_no_owner_of_a_file_open_for_writing(world: MakeWorld) -> None:
    """Clears root's set-id bits, too; root's write keeps them, and removes a capability."""

    def build(root: Path) -> None:
        for capable in (False, True):
            path = root / f"script{capable}"
            path.write_bytes(b"data")
            path.chmod(0o6755)
            if capable:
                os.setxattr(path, "security.capability", CAPABILITY)

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for path in sorted(root.iterdir()):
            with open(path, "r+b", buffering=0) as file:
                for _ in range(2):
                    file.write(b"d")
                    found.append((path.name, _mode(path), _has_capability(path)))
                os.fchown(file.fileno(), -1, -1)
                found.append((path.name, _mode(path), _has_capability(path)))
                file.write(b"d")
            found.append((path.name, _mode(path), path.read_bytes()))
        return found

    made.as_native(calls)


def test_chown_that_names_no_owner(world: MakeWorld, user: Worker) -> None:
    """For a fifo and a device as for a file; a directory keeps its setgid bit."""

    def build(root: Path) -> None:
        for owner in (0, USER):
            for mode in (0o6777, 0o2770, 0o777):
                name = f"{mode:o}.{owner}"
                os.mkfifo(root / f"fifo.{name}")
                os.mknod(root / f"null.{name}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
                (root / f"dir.{name}").mkdir()
                for kind in ("fifo", "null", "dir"):
                    path = root / f"{kind}.{name}"
                    os.chown(path, owner, owner)
                    os.chmod(path, mode)

    made = world(build)

    def calls(root: Path) -> list[object]:
        names = sorted(os.listdir(root))
        found: list[object] = [
            (name, user.errno(os.chown, str(root / name), -1, -1), _mode(root / name)) for name in names
        ]
        return found + [
            (name, errno_of(os.chown, root / name, -1, -1), _mode(root / name)) for name in names
        ]

    made.as_kernel(calls)


@pytest.mark.parametrize("size", [10, 10_000, 3_000_000])
def test_what_is_given_after_a_write_stays(world: MakeWorld, size: int) -> None:
    """Set-id bits, or capabilities, of a file with data not written back yet."""
    made = world(lambda root: (root / "lower").touch())

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for name in ("new", "lower"):
            for given in ("bits", "capabilities"):
                path = root / name
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
                try:
                    os.write(fd, b"x" * size)
                    if given == "bits":
                        os.fchmod(fd, 0o6755)
                    else:
                        os.setxattr(fd, "security.capability", CAPABILITY)
                    os.utime(fd, ns=(10**18, 10**18 + 1))
                    os.fsync(fd)
                finally:
                    os.close(fd)
                found += [_mode(path), _has_capability(path), path.stat().st_mtime_ns, path.stat().st_size]
        return found

    made.as_native(calls)


def test_set_id_bits_through_an_open_file(world: MakeWorld, user: Worker) -> None:
    """A second write, after chmod restored the bits, clears them again."""
    made = world(lambda root: None)

    def calls(root: Path) -> list[object]:
        path = root / "f"
        path.write_bytes(b"data")
        path.chmod(0o666)
        found: list[object] = []
        for _ in range(2):
            path.chmod(0o6777)
            os.setxattr(path, "security.capability", CAPABILITY)
            user.call(actions.write_at, str(path), b"x", 1)
            found += [_mode(path), _has_capability(path), path.read_bytes()]
        return found

    made.as_native(calls)


def test_setgid_directories(world: MakeWorld, user: Worker) -> None:
    """New entries in a setgid directory, also over a whiteout, get its group; a file's setgid is cleared if
    its creator is not a member."""

    def build(root: Path) -> None:
        for group in (TEAM, FOREIGN, USER):
            path = root / f"g{group}"
            path.mkdir()
            for name in ("was-f", "was-d", "was-p", "was-s"):
                (path / name).touch()
            os.chown(path, 0, group)
            path.chmod(0o2777)

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for group in (TEAM, FOREIGN, USER):
            base = root / f"g{group}"
            for mask in (0, 0o027):
                for mode in (0o2775, 0o2755, 0o2745, 0o6777, 0o644):
                    name = f"{mode:o}{mask:o}"
                    found.append(user.errno(actions.make_file, str(base / f"f{name}"), mode, mask))
                    found.append(user.errno(actions.make_directory, str(base / f"d{name}"), mode, mask))
                    found.append(
                        user.errno(actions.make_node, str(base / f"p{name}"), stat.S_IFIFO | mode, mask)
                    )
                    found.append(errno_of(actions.make_file, str(base / f"r{name}"), mode, mask))
                    os.umask(0o022)
            user.call(os.symlink, "x", str(base / "s"))
            user.call(os.chmod, str(base / "f6440"), 0o2755)
            for name in ("was-f", "was-d", "was-p", "was-s"):
                user.call(os.unlink, str(base / name))
            user.call(actions.make_file, str(base / "was-f"), 0o2775, 0o027)
            user.call(actions.make_directory, str(base / "was-d"), 0o755, 0o027)
            user.call(actions.make_node, str(base / "was-p"), stat.S_IFIFO | 0o2775, 0o027)
            user.call(os.symlink, "x", str(base / "was-s"))
            for name in sorted(os.listdir(base)):
                info = (base / name).lstat()
                found.append((name, oct(info.st_mode), info.st_uid, info.st_gid))
        return found

    made.as_native(calls)


def test_umask(world: MakeWorld, user: Worker) -> None:
    """The umask applies without a default ACL, also over a whiteout and in an opaque directory."""

    def build(root: Path) -> None:
        root.chmod(0o777)
        for index in range(4):
            (root / f"old{index}").write_bytes(b"")

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for index, mask in enumerate((0, 0o022, 0o077, 0o777)):
            (root / f"old{index}").unlink()
            user.call(actions.make_file, str(root / f"old{index}"), 0o777, mask)
            user.call(actions.make_directory, str(root / f"d{index}"), 0o777, mask)
            user.call(actions.make_node, str(root / f"p{index}"), stat.S_IFIFO | 0o777, mask)
            found += [_mode(root / f"{kind}{index}") for kind in ("old", "d", "p")]
        return found

    made.as_native(calls)


def _acl_tree(root: Path) -> None:
    (root / "d").mkdir()
    os.setxattr(root / "d", acl.DEFAULT, acl.simple(7, 5, 0, users={USER: 7, 1002: 1}, mask=7))
    (root / "d").chmod(0o777)
    (root / "f").write_bytes(b"x")
    os.setxattr(root / "f", acl.ACCESS, acl.simple(6, 4, 0, users={USER: 6}, mask=6))


def _acls(path: Path) -> list[object]:
    found: list[object] = [_mode(path)]
    for name in (acl.ACCESS, acl.DEFAULT):
        value = outcome(lambda p, name=name: acl.decode(os.getxattr(p, name)), path)  # type: ignore[misc]
        found.append(value)
    return found


def test_acl_and_mode_in_step(world: MakeWorld, user: Worker) -> None:
    """chmod changes the mask, an ACL changes the mode, a minimal ACL is none; users get its rights."""
    made = world(_acl_tree)

    def calls(root: Path) -> list[object]:
        path = root / "f"
        found: list[object] = [_acls(path), user.errno(actions.write_at, str(path), b"u", 0)]
        path.chmod(0o640)
        found += [_acls(path), user.errno(actions.write_at, str(path), b"u", 0)]
        os.setxattr(path, acl.ACCESS, acl.simple(7, 1, 2, users={USER: 7}, mask=3))
        found += [_acls(path), user.errno(actions.write_at, str(path), b"u", 0)]
        os.setxattr(path, acl.ACCESS, acl.simple(6, 4, 4))
        found += [_acls(path), sorted(os.listxattr(path))]
        found.append(errno_of(os.setxattr, path, acl.ACCESS, b"junk"))
        found.append(errno_of(os.setxattr, path, acl.DEFAULT, acl.simple(7, 5, 5)))
        found.append(user.errno(os.setxattr, str(path), acl.ACCESS, acl.simple(7, 7, 7)))
        os.setxattr(path, acl.ACCESS, acl.simple(7, 7, 0, users={5: 4}, mask=4))
        found.append(errno_of(os.removexattr, path, acl.ACCESS))
        found += [_acls(path), errno_of(os.removexattr, path, acl.ACCESS)]
        os.setxattr(root / "d", acl.DEFAULT, acl.encode([]))
        found.append(_acls(root / "d"))
        return found

    made.as_native(calls)


def test_default_acl_is_inherited(world: MakeWorld, user: Worker) -> None:
    """With umask 0 exactly as natively; in the lower's directory and in new ones, and over whiteouts."""

    def build(root: Path) -> None:
        _acl_tree(root)
        for name in ("gone", "gone-dir"):
            (root / "d" / name).write_bytes(b"")

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for name in ("gone", "gone-dir"):
            (root / "d" / name).unlink()
        for who, base in (("root", root / "d"), ("user", root / "d/new-dir")):
            if who == "user":
                os.umask(0)
                base.mkdir()
            for mode in (0o666, 0o640, 0o777):
                _run(user if who == "user" else None, actions.make_file, str(base / f"f{mode:o}"), mode, 0)
                _run(
                    user if who == "user" else None, actions.make_directory, str(base / f"d{mode:o}"), mode, 0
                )
        os.umask(0)
        actions.make_file(str(root / "d/gone"), 0o666, 0)
        (root / "d/gone-dir").mkdir(0o750)
        os.mkfifo(root / "d/fifo", 0o666)
        os.umask(0o022)
        (root / "d/link").symlink_to("gone")
        for folder, _, names in sorted(os.walk(root / "d")):
            for name in [".", *sorted(names)]:
                if name != "link":
                    found.append(
                        (os.path.relpath(os.path.join(folder, name), root), _acls(Path(folder, name)))
                    )
        return found

    made.as_native(calls)


def test_default_acl_under_a_umask_grants_no_more(world: MakeWorld, session: str) -> None:
    """It replaces the umask; with pyfuse3 both apply, so a mode may have fewer bits, never more."""
    made = world(_acl_tree)

    def calls(root: Path) -> list[int]:
        actions.make_file(str(root / "d/f"), 0o666, 0o022)
        actions.make_directory(str(root / "d/e"), 0o777, 0o027)
        os.umask(0o022)
        return [stat.S_IMODE((root / "d" / name).stat().st_mode) for name in ("f", "e")]

    if session != "pyfuse3":
        made.as_native(calls)
        return
    for ours, native in zip(calls(made.union), calls(made.native), strict=True):
        assert ours & ~native == 0


TIMES = [
    ((10**9, 123456789), (10**9 + 5, 987654321)),
    ((0, 0), (0, 1)),
    ((-100, 5), (-1, 999999999)),
    ((5_000_000_000, 1), (6_000_000_000, 2)),
    ((0, syscalls.UTIME_OMIT), (77, 7)),
    ((88, 8), (0, syscalls.UTIME_OMIT)),
    ((0, syscalls.UTIME_OMIT), (0, syscalls.UTIME_OMIT)),
]


def test_times(world: MakeWorld, user: Worker) -> None:
    """Nanoseconds, times before 1970 and after 2106, UTIME_OMIT and UTIME_NOW; on symlinks too."""

    def build(root: Path) -> None:
        (root / "f").write_bytes(b"x")
        (root / "d").mkdir()
        (root / "l").symlink_to("f")
        (root / "w").write_bytes(b"x")
        (root / "w").chmod(0o666)
        for name in ("f", "d", "l"):
            os.utime(root / name, ns=(10**17, 10**17 + 1), follow_symlinks=False)

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        (root / "own").write_bytes(b"")
        for name in ("f", "d", "l", "own"):
            for atime, mtime in TIMES:
                syscalls.utimensat(str(root / name), atime, mtime, follow=False)
                info = (root / name).lstat()
                found.append((name, info.st_atime_ns if name != "own" or atime[0] else 0, info.st_mtime_ns))
        now = (0, syscalls.UTIME_NOW)
        omit = (0, syscalls.UTIME_OMIT)
        before = (root / "f").stat()
        syscalls.utimensat(str(root / "f"), omit, now)
        after = (root / "f").stat()
        found += [after.st_atime_ns == before.st_atime_ns, after.st_mtime_ns > 1_600_000_000 * 10**9]
        found += [after.st_ctime_ns >= before.st_ctime_ns]
        # a user with write permission may set the current time, but no other
        for times in ((now, now), (omit, now), ((5, 5), now), (omit, omit), ((5, 5), (5, 5))):
            found.append(user.errno(syscalls.utimensat, str(root / "w"), *times))
            found.append(user.errno(syscalls.utimensat, str(root / "f"), *times))
        return found

    made.as_native(calls)


def _own_copy(root: Path, calls: Callable[[Path], list[object]]) -> list[object]:
    own = root / "own"
    (own / "d").mkdir(parents=True)
    for name in ("f", "g"):
        (own / "d" / name).write_bytes(b"data")
    return calls(own)


def test_ctime_and_mtime_move(world: MakeWorld) -> None:
    """ctime changes with metadata, mtime with content, a directory's with its names; nothing else changes."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        (root / "d/f").write_bytes(b"data")
        (root / "d/g").write_bytes(b"data")
        for path in (root / "d/f", root / "d/g", root / "d"):
            os.utime(path, ns=(10**18, 10**18))

    made = world(build)
    steps: list[Callable[[Path], object]] = [
        lambda root: os.chmod(root / "d/f", 0o600),
        lambda root: os.setxattr(root / "d/f", "user.a", b"1"),
        lambda root: os.truncate(root / "d/f", 4),
        lambda root: (root / "d/f").write_bytes(b"more"),
        lambda root: os.link(root / "d/f", root / "d/h"),
        lambda root: os.unlink(root / "d/h"),
        lambda root: os.rename(root / "d/f", root / "d/i"),
        lambda root: os.rename(root / "d/i", root / "d/f"),
        lambda root: (root / "d/g").read_bytes(),
        lambda root: os.listdir(root / "d"),
        lambda root: os.close(os.open(root / "d/g", os.O_RDWR)),
    ]

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for step in steps:
            for path in (root / "d/f", root / "d"):
                os.utime(path, ns=(10**18, 10**18))
            before = [(root / name).stat() for name in ("d", "d/f", "d/g")]
            step(root)
            after = [outcome(os.stat, root / name) for name in ("d", "d/f", "d/g")]
            found.append([
                isinstance(new, str)
                or (old.st_mtime_ns == new.st_mtime_ns, old.st_ctime_ns == new.st_ctime_ns)
                for old, new in zip(before, after, strict=True)
            ])  # fmt: skip
        return found

    made.as_kernel(lambda root: [row[0][0] if row[0] is not True else True for row in calls(root)])  # type: ignore[index]
    # ctimes of files too, natively (overlayfs shows the lower's until copy-up, and so does the union)
    made.as_native(lambda root: _own_copy(root, calls))


def test_ctime_moves_when_a_name_goes_into_a_directory_of_a_lower_below(world: MakeWorld) -> None:
    """The new directory is copied up for it, which does not change the old one; the rename does."""

    def build(root: Path) -> None:
        for name in ("file", "directory"):
            (root / "d" / name).mkdir(parents=True)
        (root / "d/f").write_bytes(b"data")

    def calls(root: Path) -> list[tuple[bool, bool]]:
        os.truncate(root / "d/f", 1)
        (root / "d/new").mkdir()
        found = []
        for old, new in (("d/f", "d/file/f"), ("d/new", "d/directory/new")):
            os.utime(root / "d", ns=(10**18, 10**18))
            before = (root / "d").stat()
            time.sleep(0.02)  # until Linux 6.13 a ctime is that of the last tick
            os.rename(root / old, root / new)
            after = (root / "d").stat()
            found.append((after.st_mtime_ns > before.st_mtime_ns, after.st_ctime_ns > before.st_ctime_ns))
        return found

    made = world(build)
    made.as_native(calls)


def test_permissions_are_checked(world: MakeWorld, user: Worker) -> None:
    """Mode bits, sticky directories and search permission apply to the caller, not to the daemon."""

    def build(root: Path) -> None:
        (root / "secret").mkdir(0o700)
        (root / "secret/f").write_bytes(b"")
        (root / "sticky").mkdir()
        (root / "sticky").chmod(0o1777)
        (root / "sticky/roots").write_bytes(b"")
        (root / "noexec").mkdir()
        (root / "noexec").chmod(0o744)
        (root / "noexec/f").write_bytes(b"")
        (root / "ro").write_bytes(b"x")
        (root / "team").write_bytes(b"x")
        os.chown(root / "team", 0, TEAM)
        (root / "team").chmod(0o660)

    made = world(build)

    def calls(root: Path) -> list[object]:
        base = str(root)
        return [
            user.errno(os.listdir, base + "/secret"),
            user.errno(os.lstat, base + "/secret/f"),
            user.errno(os.unlink, base + "/sticky/roots"),
            user.errno(os.rename, base + "/sticky/roots", base + "/sticky/x"),
            user.errno(actions.make_file, base + "/sticky/mine", 0o600, 0),
            user.errno(os.unlink, base + "/sticky/mine"),
            user.errno(os.listdir, base + "/noexec"),
            user.errno(os.lstat, base + "/noexec/f"),
            user.errno(actions.write_at, base + "/ro", b"x", 0),
            user.errno(actions.write_at, base + "/team", b"x", 0),
            user.errno(os.chmod, base + "/ro", 0o777),
            user.errno(os.chown, base + "/ro", USER, USER),
            user.errno(os.mkdir, base + "/new"),
            user.errno(os.link, base + "/ro", base + "/sticky/ro"),
            user.errno(os.truncate, base + "/ro", 0),
            user.errno(os.setxattr, base + "/ro", "user.x", b"1"),
            user.errno(os.getxattr, base + "/team", "user.x"),
            (root / "ro").read_bytes(),
        ]

    found = made.as_native(calls)
    assert errno.EACCES in found


def test_setuid_program_runs_as_its_owner(world: MakeWorld, user: Worker) -> None:
    """A suid program of the lower is effective (the mount has no nosuid), also after copy-up."""

    def build(root: Path) -> None:
        subprocess.run(["cp", "/usr/bin/id", str(root / "id")], check=True)
        (root / "id").chmod(0o4755)

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = [user.call(actions.run, [str(root / "id"), "-u"])]
        os.utime(root / "id")
        found.append(user.call(actions.run, [str(root / "id"), "-u"]))
        return found

    assert made.as_native(calls) == ["0\n", "0\n"]
