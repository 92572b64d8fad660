"""The operations that change a union, each in a directory of its own, and what such a directory looks like.

The same directory is built in the layers for each fault, and for kernel overlayfs, which says what it looks
like before and after.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tests.support import acl, syscalls

WHEN: Final = 1_000_000_000
"""The time of everything in the layers: what is later was changed."""

OWNER, GROUP = 1234, 2345
SMALL, LARGE = b"old data " * 20, bytes(range(256)) * 4096


@dataclass(frozen=True)
class Operation:
    """``build`` fills a directory of the lower and one of the upper, ``act`` changes the merged one."""

    name: str
    build: Callable[[Path, Path], object]
    act: Callable[[str], object]
    #: Of ``-o``.
    options: tuple[str, ...] = ()
    #: Whether a write is part of it: after an error each file has old or new data, or a part of it.
    writes: bool = False
    #: Other errnos that the caller may get.
    others: tuple[int, ...] = ()

    @property
    def late(self) -> bool:
        """Whether the caller may get an error after the change: that of reading the attributes of what was
        made and opened, which is another request; and that of an attribute, set again without harm."""
        return self.name.startswith(
            ("create", "truncate", "open", "chmod", "chown", "utimens", "acl", "metacopy ch", "tmpfile")
        )

    @property
    def links(self) -> bool:
        """Whether files have several names, which takes the index."""
        return self.build is _links

    def __str__(self) -> str:
        return self.name


# -- the layers ------------------------------------------------------------------------------------------


def _file(path: Path, data: bytes = SMALL, mode: int = 0o640) -> Path:
    path.write_bytes(data)
    os.chown(path, OWNER, GROUP)
    os.chmod(path, mode)
    return path


def _nothing(lower: Path, upper: Path) -> None:
    pass


def _files(lower: Path, upper: Path) -> None:
    """``low``, ``up`` and ``copied`` in both; a directory of the lower with a file."""
    _file(lower / "low")
    os.setxattr(lower / "low", "user.one", b"1")
    _file(lower / "plain")
    _file(upper / "up")
    os.setxattr(upper / "up", "user.one", b"1")
    _file(lower / "copied", b"hidden")
    _file(upper / "copied")
    (lower / "d").mkdir()
    _file(lower / "d/f")
    os.setxattr(lower / "d", "user.dir", b"d")


def _large(lower: Path, upper: Path) -> None:
    _file(lower / "low", LARGE)
    os.setxattr(lower / "low", "user.one", b"1")


def _links(lower: Path, upper: Path) -> None:
    _file(lower / "one")
    os.link(lower / "one", lower / "two")
    os.link(lower / "one", lower / "three")


def _symlinks(lower: Path, upper: Path) -> None:
    os.symlink("target", lower / "low")
    os.symlink("target", upper / "up")


def _whiteouts(lower: Path, upper: Path) -> None:
    for name in ("gone", "other"):
        _file(lower / name)
        os.mknod(upper / name, stat.S_IFCHR, 0)
    _file(upper / "up")
    (upper / "made").mkdir()
    os.setxattr(upper / "made", "trusted.overlay.opaque", b"y")


def _directories(lower: Path, upper: Path) -> None:
    (lower / "low").mkdir()
    (upper / "up").mkdir()
    for name in ("merged", "emptied", "full"):
        (lower / name).mkdir()
        _file(lower / name / "f")
        (upper / name).mkdir()
    os.mknod(upper / "emptied/f", stat.S_IFCHR, 0)
    _file(upper / "merged/g")
    (lower / "opaque").mkdir()
    _file(lower / "opaque/hidden")
    (upper / "opaque").mkdir()
    os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    (upper / "to").mkdir()
    (lower / "into").mkdir()


# -- the operations --------------------------------------------------------------------------------------


def _at(name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Callable[[str], object]:
    return lambda top: call(f"{top}/{name}", *arguments, **named)


def _two(call: Callable[..., Any], one: str, other: str) -> Callable[[str], object]:
    return lambda top: call(f"{top}/{one}", f"{top}/{other}")


def _open(name: str, flags: int, mode: int = 0o644) -> Callable[[str], object]:
    def act(top: str) -> None:
        os.close(os.open(f"{top}/{name}", flags, mode))

    return act


def _exchange(one: str, other: str) -> Callable[[str], object]:
    return lambda top: syscalls.renameat2(f"{top}/{one}", f"{top}/{other}", syscalls.RENAME_EXCHANGE)


def _times(name: str) -> Callable[[str], object]:
    return _at(name, os.utime, ns=((WHEN + 9) * 10**9, (WHEN + 7) * 10**9), follow_symlinks=False)


def _write(name: str, data: bytes, offset: int = 3) -> Callable[[str], object]:
    def act(top: str) -> None:
        fd = os.open(f"{top}/{name}", os.O_RDWR)
        try:
            os.pwrite(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)

    return act


def _tmpfile(top: str) -> None:
    directory = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = os.open(top, os.O_TMPFILE | os.O_RDWR, 0o640)
        try:
            # with a directory it is linkat(2), which follows
            os.link(f"/proc/self/fd/{fd}", "new", dst_dir_fd=directory)
        finally:
            os.close(fd)
    finally:
        os.close(directory)


def _chmod_and_write(top: str) -> None:
    os.chmod(f"{top}/low", 0o604)
    _write("low", b"NEW")(top)


def _allocate(name: str) -> Callable[[str], object]:
    def act(top: str) -> None:
        fd = os.open(f"{top}/{name}", os.O_RDWR)
        try:
            os.posix_fallocate(fd, 0, 10_000)
        finally:
            os.close(fd)

    return act


def _copy_range(top: str) -> None:
    """Between files of the upper."""
    source = os.open(f"{top}/up", os.O_RDONLY)
    try:
        target = os.open(f"{top}/copied", os.O_RDWR)
        try:
            os.copy_file_range(source, target, 50, 0, 10)
            os.fsync(target)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _acl(name: str, kind: str) -> Callable[[str], object]:
    return _at(name, os.setxattr, kind, acl.simple(7, 5, 1, users={OWNER: 7}, mask=7))


_EXCL = os.O_CREAT | os.O_EXCL | os.O_RDWR
_CHOWN = {"uid": 77, "gid": 88, "follow_symlinks": False}
_NO_REDIRECT = (errno.EXDEV,)  # as from overlayfs (dir.c, ovl_set_redirect): the caller may copy it
_UNSEEN = (errno.ENOTEMPTY,)  # as on overlayfs, what cannot be examined is no whiteout (ovl_check_whiteouts)
_METACOPY = ("metacopy=on",)


def _everywhere(kind: str, act: Callable[[str], Callable[[str], object]], *names: str) -> list[Operation]:
    """The same of files of the upper, copies, files of the lower with and without xattrs, a directory."""
    names = names or ("up", "low", "plain", "d", "d/f")
    return [Operation(f"{kind} {name}", _files, act(name)) for name in names]


OPERATIONS: Final = [
    Operation("create", _nothing, _open("new", _EXCL)),
    Operation("create in lower", _files, _open("d/new", _EXCL)),
    Operation("create over whiteout", _whiteouts, _open("gone", _EXCL)),
    Operation("mkdir", _nothing, _at("new", os.mkdir, 0o750)),
    Operation("mkdir in lower", _files, _at("d/new", os.mkdir, 0o750)),
    Operation("mkdir over whiteout", _whiteouts, _at("gone", os.mkdir, 0o750)),
    Operation("mknod fifo", _nothing, _at("new", os.mknod, stat.S_IFIFO | 0o640)),
    Operation("mknod device over whiteout", _whiteouts, _at("gone", os.mknod, stat.S_IFBLK, 0x763)),
    Operation("symlink", _nothing, lambda top: os.symlink("target", f"{top}/new")),
    Operation("symlink over whiteout", _whiteouts, lambda top: os.symlink("target", f"{top}/gone")),
    Operation("link up", _files, _two(os.link, "up", "new")),
    Operation("link low", _files, _two(os.link, "low", "d/new")),
    Operation("link over whiteout", _whiteouts, _two(os.link, "up", "gone")),
    Operation("link of linked", _links, _two(os.link, "one", "four")),
    # the kernel repeats linkat(2), and no longer follows the link of /proc
    Operation("tmpfile", _files, _tmpfile, others=(errno.ENOENT,)),
    Operation("unlink up", _files, _at("up", os.unlink)),
    Operation("unlink low", _files, _at("low", os.unlink)),
    Operation("unlink copied", _files, _at("copied", os.unlink)),
    Operation("unlink in lower", _files, _at("d/f", os.unlink)),
    Operation("unlink linked", _links, _at("one", os.unlink)),
    Operation("unlink symlink", _symlinks, _at("low", os.unlink)),
    Operation("rmdir up", _directories, _at("up", os.rmdir)),
    Operation("rmdir low", _directories, _at("low", os.rmdir)),
    Operation("rmdir emptied", _directories, _at("emptied", os.rmdir), others=(errno.ENOTEMPTY,)),
    Operation("rmdir opaque", _directories, _at("opaque", os.rmdir)),
    Operation("rename up", _files, _two(os.rename, "up", "new")),
    Operation("rename low", _files, _two(os.rename, "low", "d/new")),
    Operation("rename copied", _files, _two(os.rename, "copied", "new")),
    Operation("rename linked", _links, _two(os.rename, "one", "four")),
    Operation("rename over", _files, _two(os.rename, "up", "copied")),
    Operation("rename low over low", _files, _two(os.rename, "plain", "low")),
    Operation("rename over whiteout", _whiteouts, _two(os.rename, "up", "gone")),
    Operation("rename symlink", _symlinks, _two(os.rename, "low", "up")),
    Operation("rename directory", _directories, _two(os.rename, "up", "new")),
    Operation("rename merged", _directories, _two(os.rename, "merged", "new"), others=_NO_REDIRECT),
    Operation("rename merged away", _directories, _two(os.rename, "merged", "to/new"), others=_NO_REDIRECT),
    Operation("rename lower directory into lower", _directories, _two(os.rename, "full", "into/new"),
              others=_NO_REDIRECT),
    Operation("rename directory over emptied", _directories, _two(os.rename, "merged", "emptied"),
              others=(*_NO_REDIRECT, *_UNSEEN)),
    Operation("rename directory over whiteout", _whiteouts, _two(os.rename, "made", "gone"),
              others=_NO_REDIRECT),
    Operation("exchange", _files, _exchange("up", "copied")),
    Operation("exchange low", _files, _exchange("low", "d/f")),
    Operation("exchange directories", _directories, _exchange("merged", "up"), others=_NO_REDIRECT),
    Operation("exchange file and directory", _files, _exchange("up", "d"), others=_NO_REDIRECT),
    *_everywhere("truncate", lambda name: _at(name, os.truncate, 7), "up", "low", "plain"),
    Operation("truncate large", _large, _at("low", os.truncate, 600_000)),
    *_everywhere("open truncating", lambda name: _open(name, os.O_WRONLY | os.O_TRUNC), "up", "low", "plain"),
    *_everywhere("chmod", lambda name: _at(name, os.chmod, 0o604)),
    *_everywhere("chown", lambda name: _at(name, os.chown, **_CHOWN)),
    Operation("chown symlink", _symlinks, _at("low", os.chown, **_CHOWN)),
    Operation("chmod linked", _links, _at("one", os.chmod, 0o604)),
    *_everywhere("utimens", _times),
    *_everywhere("setxattr", lambda name: _at(name, os.setxattr, "user.new", b"value")),
    *_everywhere("removexattr", lambda name: _at(name, os.removexattr, "user.one"), "up", "low"),
    *_everywhere("acl", lambda name: _acl(name, acl.ACCESS), "up", "low", "d"),
    Operation("default acl", _files, _acl("d", acl.DEFAULT)),
    *_everywhere("open for writing", lambda name: _open(name, os.O_RDWR), "low", "plain", "d/f"),
    Operation("open large for writing", _large, _open("low", os.O_RDWR)),
    Operation("open linked for writing", _links, _open("two", os.O_RDWR)),
    Operation("write", _files, _write("up", b"NEW"), writes=True),
    Operation("write low", _files, _write("low", b"NEW"), writes=True),
    Operation("write large", _large, _write("low", b"NEW", 500_000), writes=True),
    Operation("write linked", _links, _write("two", b"NEW"), writes=True),
    Operation("fallocate", _files, _allocate("up"), writes=True),
    Operation("copy range", _files, _copy_range, writes=True),
    Operation("metacopy chmod", _large, _at("low", os.chmod, 0o604), _METACOPY),
    Operation("metacopy chown of linked", _links, _at("one", os.chown, **_CHOWN), _METACOPY),
    Operation("metacopy rename", _large, _two(os.rename, "low", "new"), _METACOPY),
    Operation("metacopy link", _large, _two(os.link, "low", "new"), _METACOPY),
    Operation("metacopy write", _large, _chmod_and_write, _METACOPY, writes=True),
]  # fmt: skip


def set_times(top: Path) -> None:
    """Everything there is old."""
    for path, directories, files in os.walk(top, topdown=False):
        for name in (*files, *directories):
            os.utime(os.path.join(path, name), (WHEN, WHEN), follow_symlinks=False)
    os.utime(top, (WHEN, WHEN))


# -- what it looks like ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One name. ``mtime``: seconds, None for what was changed. ``same``: the names of the same object."""

    mode: int
    owner: tuple[int, int]
    size: int
    rdev: int
    mtime: int | None
    content: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    same: tuple[str, ...] = field(default=())


Look = dict[str, Seen]


def look(top: str) -> Look:
    """The tree there, as a user sees it."""
    found: Look = {}
    objects: dict[tuple[int, int], list[str]] = {}
    _look(top, ".", found, objects)
    for names in objects.values():
        if len(names) > 1:
            for name in names:
                found[name] = replace(found[name], same=tuple(sorted(names)))
    return found


def _look(top: str, name: str, found: Look, objects: dict[tuple[int, int], list[str]]) -> None:
    path = top if name == "." else f"{top}/{name}"
    st = os.lstat(path)
    kind, content, xattrs = stat.S_IFMT(st.st_mode), b"", ()
    if kind == stat.S_IFLNK:
        content = os.fsencode(os.readlink(path))
    elif kind == stat.S_IFREG:
        with open(path, "rb", buffering=0) as file:
            content = file.read()
    if kind in (stat.S_IFREG, stat.S_IFDIR):
        names = [one for one in os.listxattr(path) if not one.startswith("trusted.overlay.")]
        xattrs = tuple((one, os.getxattr(path, one)) for one in sorted(names))
    size = 0 if kind == stat.S_IFDIR else st.st_size
    mtime = int(st.st_mtime)
    found[name] = Seen(
        st.st_mode, (st.st_uid, st.st_gid), size, st.st_rdev, mtime if mtime < WHEN + 1000 else None, content,
        xattrs,
    )  # fmt: skip
    if kind == stat.S_IFDIR:
        for below in sorted(os.listdir(path)):
            _look(top, below if name == "." else f"{name}/{below}", found, objects)
    else:
        objects.setdefault((st.st_dev, st.st_ino), []).append(name)


def differences(one: Look, other: Look) -> str:
    """What distinguishes two trees, in words."""
    parts = [f"{name} is missing" for name in one.keys() - other.keys()]
    parts += [f"{name} is there" for name in other.keys() - one.keys()]
    for name in sorted(one.keys() & other.keys()):
        for key, value in one[name].__dict__.items():
            found = getattr(other[name], key)
            if value != found:
                parts.append(f"{name}: {key} {_short(found)}, not {_short(value)}")
    return "; ".join(parts)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}... of {len(text)}"


def same_but_directories(one: Look, other: Look) -> bool:
    """Whether two trees are equal but for the times of directories."""
    return _without_times(one) == _without_times(other)


def _without_times(tree: Look) -> Look:
    return {
        name: replace(seen, mtime=None) if stat.S_ISDIR(seen.mode) else seen for name, seen in tree.items()
    }


def is_between(old: Look, new: Look, found: Look) -> bool:
    """Whether a tree is the old or the new one but for data that was being written, its size and time, and
    the times of directories."""
    old, new, found = (_without_times(tree) for tree in (old, new, found))
    if found.keys() not in (old.keys(), new.keys()):
        return False
    free = {"content", "mtime", "size"}
    for name, seen in found.items():
        ends = [tree[name] for tree in (old, new) if name in tree]
        for key, value in seen.__dict__.items():
            if value in [getattr(end, key) for end in ends]:
                continue
            if key not in free or not stat.S_ISREG(seen.mode) or len({end.content for end in ends}) == 1:
                return False
    return True
