"""Owner, mode and type of files and directories kept in an xattr, as by fuse-overlayfs's xattr_permissions.

So an ordinary user's store can hold any owner and mode, and one unpacked copy serves all users. The value is
``UID:GID:MODE[:TYPE]``: decimal ids, an octal mode with or without the bits of S_IFMT, and a type that
replaces the one of an empty regular file: ``char-MAJOR-MINOR``, ``block-MAJOR-MINOR``, ``pipe``, ``socket``
(fuse-overlayfs 1.16: utils.c, override_mode; containers/storage: pkg/idtools, FormatContainersOverrideXattr).
Any other value is ignored. Objects of other types have their own attributes and no xattr.

The owner of a file sets its ``user.*`` xattrs: in a mount of the host's root they make no setuid or setgid
program of another owner, and no device, of an object that is not root's.

The root of a layer decides which xattr its objects have; without one, they have none (direct.c,
direct_load_data_source). A file in the upper belongs to the daemon's user, who may do everything to it, and
has no setuid or setgid on disk. With ``user.containers.override_stat``, an ordinary user's files have
``security.*`` xattrs too, under other names (main.c, encode_xattr_name).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from unionfs.core import layercalls
from unionfs.core.places import Layer
from unionfs.errors import LayerError
from unionfs.sys import attributes, calls
from unionfs.sys.capabilities import in_initial_user_namespace
from unionfs.union.attributes import SET_IDS, replaced
from unionfs.union.markers import Markers

PRIVILEGED: Final = b"security.fuseoverlayfs.override_stat"
CONTAINERS: Final = b"user.containers.override_stat"
#: Written by fuse-overlayfs before 1.14.
USER: Final = b"user.fuseoverlayfs.override_stat"
_NAMES: Final = (PRIVILEGED, USER, CONTAINERS)
_ESCAPE: Final = b"user.containers.override_"
_XATTR_NAME_MAX: Final = 255
_VALUE: Final = re.compile(
    rb"(-1|[0-9]{1,10}):(-1|[0-9]{1,10}):([0-7]{1,7})"
    rb"(?::(?:(dir|file|pipe|socket)|(char|block)-*([0-9]{1,10})-([0-9]{1,10})))?"
)
_TYPES: Final = {
    b"dir": stat.S_IFDIR, b"file": stat.S_IFREG, b"pipe": stat.S_IFIFO, b"socket": stat.S_IFSOCK,
    b"char": stat.S_IFCHR, b"block": stat.S_IFBLK,
}  # fmt: skip
_DEVICES: Final = {stat.S_IFCHR: b"char", stat.S_IFBLK: b"block"}
_NO_ID: Final = (1 << 32) - 1
#: Shown for -1, which fuse-overlayfs before 1.14 wrote for an id that a chown(2) leaves as it is.
_OVERFLOW: Final = 65534
_KEPT: Final = (stat.S_IFREG, stat.S_IFDIR)
#: What the owner of a file in the upper may do, and others to whom the way there is open (as fuse-overlayfs).
_OPEN: Final = 0o755
_NOT_PERMITTED: Final = (errno.EPERM, errno.EINVAL)


def parse(value: bytes, st: os.stat_result) -> os.stat_result | None:
    """The attributes of an object with such an xattr; ``st``: its own. None for an invalid value."""
    found = _VALUE.fullmatch(value)
    if found is None:
        return None
    uid, gid = (_OVERFLOW if number == b"-1" else int(number) for number in found.group(1, 2))
    mode = int(found[3], 8)
    actual = stat.S_IFMT(st.st_mode)
    word = found[4] or found[5]
    kind, rdev = actual if word is None else _TYPES[word], st.st_rdev
    if kind != actual and (actual != stat.S_IFREG or kind == stat.S_IFDIR or st.st_size):
        return None
    if uid >= _NO_ID or gid >= _NO_ID:
        return None
    if found[5]:
        major, minor = int(found[6]), int(found[7])
        if major >= 1 << 12 or minor >= 1 << 20:  # include/linux/kdev_t.h
            return None
        rdev = os.makedev(major, minor)
        if kind == stat.S_IFCHR and rdev == 0:
            return None  # a whiteout is none of these
    values = {stat.ST_MODE: kind | stat.S_IMODE(mode), stat.ST_UID: uid, stat.ST_GID: gid}
    return replaced(st, values, st_rdev=rdev)


def _harmless(shown: os.stat_result, st: os.stat_result) -> os.stat_result | None:
    """The attributes that the owner of an object with ``st`` could give to it, apart from the owner."""
    if stat.S_IFMT(shown.st_mode) in _DEVICES:
        return None
    if (shown.st_uid, shown.st_gid) == (st.st_uid, st.st_gid) or stat.S_ISDIR(st.st_mode):
        return shown
    return replaced(shown, {stat.ST_MODE: shown.st_mode & ~SET_IDS})


def value_of(st: os.stat_result) -> bytes:
    """The xattr for an object with these attributes."""
    value = b"%d:%d:%o" % (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))
    kind = stat.S_IFMT(st.st_mode)
    if kind in _DEVICES:
        return value + b":%b-%d-%d" % (_DEVICES[kind], os.major(st.st_rdev), os.minor(st.st_rdev))
    return value + {stat.S_IFIFO: b":pipe", stat.S_IFSOCK: b":socket"}.get(kind, b"")


class Permissions:
    """Reads and writes the xattr in one layer."""

    __slots__ = ("_escapes", "_trusted", "names")

    def __init__(self, names: Sequence[bytes], trusted: int | None = None) -> None:
        """``names``: the xattrs that its root has; the first one of an object counts, and all are written.
        ``trusted``: the owner whose objects may have any value; None: everybody.
        """
        self.names = tuple(names)
        self._trusted = None if PRIVILEGED in names else trusted
        self._escapes = CONTAINERS in names

    # -- attributes -----------------------------------------------------------------------------------

    def show(self, st: os.stat_result, where: int | bytes, *, follow: bool = True) -> os.stat_result:
        """The attributes of an object: those in its xattr, else its own, ``st``. ``where``: a path of it, or
        an fd, not opened with O_PATH.
        """
        if stat.S_IFMT(st.st_mode) not in _KEPT:
            return st
        follow = follow or type(where) is int
        for name in self.names:
            try:
                value = layercalls.call(os.getxattr, where, name, follow_symlinks=follow)
            except OSError:
                continue  # it has none, or nobody may read it
            shown = parse(value, st)
            if shown is not None and (self._trusted is None or st.st_uid == self._trusted):
                return shown
            if shown is not None and (harmless := _harmless(shown, st)) is not None:
                return harmless
        return st

    def show_fd(self, st: os.stat_result, fd: int) -> os.stat_result:
        """The same by any fd of the object."""
        return self.show(st, b"/proc/self/fd/%d" % fd)

    def show_at(self, st: os.stat_result, dir_fd: int, name: bytes) -> os.stat_result:
        """The same for ``name`` in a directory."""
        return self.show(st, b"/proc/self/fd/%d/%b" % (dir_fd, name), follow=False)

    def write(self, where: int | bytes, st: os.stat_result, *, follow: bool = True) -> None:
        """Keep these attributes of an object. Raises ``OSError``."""
        value = value_of(st)
        for name in self.names:
            os.setxattr(where, name, value, follow_symlinks=follow or type(where) is int)

    def chown(self, fd: int, uid: int, gid: int) -> None:
        """chown(2) of an object in the upper (an fd; O_PATH suffices). Raises ``OSError``.

        An object without the xattr keeps its owner where the daemon may set no other, as with
        fuse-overlayfs.
        """
        st = os.fstat(fd)
        if stat.S_IFMT(st.st_mode) not in _KEPT:
            try:
                calls.chown_fd(fd, uid, gid)
            except OSError as error:
                if error.errno not in _NOT_PERMITTED:
                    raise
            return
        shown = self.show_fd(st, fd)
        mode = shown.st_mode
        if not stat.S_ISDIR(mode):  # fs/attr.c, setattr_should_drop_suidgid
            mode &= ~SET_IDS if mode & stat.S_IXGRP else ~stat.S_ISUID
        values = {
            stat.ST_MODE: mode, stat.ST_UID: shown.st_uid if uid < 0 else uid,
            stat.ST_GID: shown.st_gid if gid < 0 else gid,
        }  # fmt: skip
        self.write(b"/proc/self/fd/%d" % fd, replaced(shown, values))

    def of_new(
        self, parent: os.stat_result, owner: tuple[int, int], mode: int, rdev: int
    ) -> os.stat_result:
        """The attributes of a new object of an owner, with that ``mode`` (with S_IFMT bits).

        In a directory with setgid (``parent``: its attributes) the group is the directory's, and a new
        directory has setgid; a file for the group, with setgid, loses it unless the owner is in the group
        (fs/inode.c, inode_init_owner and mode_strip_sgid).
        """
        uid, own_gid = owner
        gid = own_gid
        if parent.st_mode & stat.S_ISGID:
            gid = parent.st_gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
            elif mode & stat.S_IXGRP and uid != 0 and gid != own_gid:
                mode &= ~stat.S_ISGID
        values = {stat.ST_MODE: mode, stat.ST_UID: uid, stat.ST_GID: gid}
        return replaced(parent, values, st_rdev=rdev)

    def chmod(self, fd: int, mode: int) -> None:
        """chmod(2), likewise."""
        st = os.fstat(fd)
        if stat.S_IFMT(st.st_mode) not in _KEPT:
            os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(mode))
            return
        shown = self.show_fd(st, fd)
        mode = stat.S_IFMT(shown.st_mode) | stat.S_IMODE(mode)
        self.write(b"/proc/self/fd/%d" % fd, replaced(shown, {stat.ST_MODE: mode}))

    # -- copies ---------------------------------------------------------------------------------------

    def of_copy(
        self,
        st: os.stat_result,
        kind: int,
        xattrs: Mapping[bytes, bytes],
        source: Permissions | None,
        markers: Markers,
    ) -> attributes.FileAttributes:
        """The attributes to set on a copy in this layer of an object of a layer with ``source``.

        ``st``: the attributes shown; ``kind``: its own type (S_IFMT bits); ``xattrs``: those stored, without
        the overlay's own.
        """
        copied = {}
        for stored, value in xattrs.items():
            for name in shown_names(markers, source, [stored]):
                if not name.startswith(b"system.posix_acl_"):
                    copied[stored_name(markers, self, name)] = value
        if kind not in _KEPT:
            copied = {name: value for name, value in copied.items() if not name.startswith(b"user.")}
            return attributes.attributes(st, copied)
        copied.update(dict.fromkeys(self.names, value_of(st)))
        return attributes.attributes(st, copied)._replace(mode=open_mode(st.st_mode))

    # -- names of xattrs ------------------------------------------------------------------------------

    def is_escaped(self, markers: Markers, name: bytes) -> bool:
        """Whether the user's xattr ``name`` has another name on disk."""
        return (
            name in _NAMES
            or name.startswith(_ESCAPE)
            or (self._escapes and (name.startswith(b"security.") or markers.is_internal(name)))
        )


def stored_name(markers: Markers, permissions: Permissions | None, name: bytes) -> bytes:
    """The name on disk of the user's xattr ``name``. Raises EOPNOTSUPP if it is too long."""
    if permissions is None or not permissions.is_escaped(markers, name):
        return markers.stored_name(name)
    if len(_ESCAPE + name) > _XATTR_NAME_MAX:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return _ESCAPE + name


def shown_names(markers: Markers, permissions: Permissions | None, stored: list[bytes]) -> list[bytes]:
    """Convert names on disk to the names that users see."""
    if permissions is None:
        return markers.shown_names(stored)
    shown = []
    for name in stored:
        inner = name.removeprefix(_ESCAPE)
        if name.startswith(_ESCAPE) and permissions.is_escaped(markers, inner):
            shown.append(inner)
        elif not permissions.is_escaped(markers, name):
            shown += markers.shown_names([name])
    return shown


def open_mode(mode: int) -> int:
    """The mode on disk of a file or directory whose own mode is in the xattr."""
    return mode & 0o777 | _OPEN


# -- layers -------------------------------------------------------------------------------------------


def _in(names: Sequence[bytes]) -> Permissions:
    """The xattrs of one layer."""
    return Permissions(names, 0 if os.geteuid() == 0 and in_initial_user_namespace() else None)


def find(layers: Sequence[Layer], level: int) -> None:
    """Find the layers whose objects have the xattr, and prepare the upper. Raises LayerError.

    ``level``: 1 for `PRIVILEGED` in the upper, 2 for the others.
    """
    for layer in layers:
        names = [os.fsencode(name) for name in layer.once("permissions", _names_at)]
        if layer.is_idmapped and names:
            raise LayerError(
                f"lower {layer.path} is on an idmapped mount, which does not map the owners in its xattrs; "
                "leave out the idmap, or xattr_permissions."
            )
        if layer.is_upper:
            wanted = (PRIVILEGED,) if level == 1 else (USER, CONTAINERS)
            _prepare(layer, [name for name in wanted if name in names], level, layers)
        elif names:
            layer.keeps_permissions(_in([PRIVILEGED] if PRIVILEGED in names else list(names)))


def _prepare(upper: Layer, names: list[bytes], level: int, layers: Iterable[Layer]) -> None:
    """Give the upper's root the xattr if it has none: that of a lower, else with its own attributes."""
    chosen = _in(names or [PRIVILEGED if level == 1 else CONTAINERS])
    upper.keeps_permissions(chosen)
    if names:
        return
    st = os.stat(upper.root_fd)
    for layer in layers:
        found = {} if layer.is_upper else _at_root(layer.root_fd)
        lower = next((shown for value in found.values() if (shown := parse(value, st))), None)
        if lower is not None:
            st = lower
            break
    try:
        chosen.write(b"/proc/self/fd/%d" % upper.root_fd, st)
    except OSError as error:
        cure = "leave it out" if level == 2 else "write xattr_permissions=2"
        raise LayerError(
            f"xattr_permissions={level} is not possible with upper {upper.path or 'on the tmpfs'}, which "
            f"takes no xattr {os.fsdecode(chosen.names[0])}: {error.strerror}; {cure}."
        ) from error


def _names_at(root_fd: int) -> list[str]:
    """The xattrs that a root has."""
    return [os.fsdecode(name) for name in _at_root(root_fd)]


def _at_root(root_fd: int) -> dict[bytes, bytes]:
    found = {}
    for name in _NAMES:
        try:
            found[name] = os.getxattr(b"/proc/self/fd/%d" % root_fd, name)
        except OSError:
            continue
    return found
