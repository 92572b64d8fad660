"""Redirects that a union writes: whether it does, and which one a renamed directory gets.

A redirect names where a directory lies in the lowers, so that it still merges with them under its new name.
The rules are overlayfs's (fs/overlayfs/dir.c, ovl_set_redirect and ovl_get_redirect; params.c).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from unionfs.core.node import Node
from unionfs.core.places import Gate, Layer
from unionfs.sys.calls import os_error
from unionfs.union.markers import ABSENT, Markers
from unionfs.union.redirects import c_string, markers_of

_LONGEST: Final = 256
"""The longest absolute redirect, in bytes (fs/overlayfs/super.c, ovl_redirect_max)."""
_PARAMETERS: Final = "/sys/module/overlay/parameters"


def mode(chosen: str | None, prefix: bytes, upper: Layer | None) -> str:
    """The value of `redirect_dir` for a union: on, follow or nofollow. ``chosen``: the option's, or None.

    `off` follows redirects unless the kernel's parameter says otherwise. The default is on, except under
    `user.overlay.`, and in an upper made by a kernel that has it off: such a kernel, or a tool, may rely on
    that.
    """
    trusted = not prefix.startswith(b"user.")
    if chosen is None:
        chosen = "on" if trusted and not _is_kernels(upper, prefix) else "off"
    if chosen == "off":
        return "follow" if trusted and parameter("redirect_always_follow", "Y") == "Y" else "nofollow"
    return chosen


def _is_kernels(upper: Layer | None, prefix: bytes) -> bool:
    """Whether a kernel that does not write redirects by default made the upper. It leaves a ``uuid`` in a new
    one (util.c, ovl_init_uuid_xattr; since Linux 6.6)."""
    if upper is None:
        return False
    try:
        os.getxattr(b"/proc/self/fd/%d" % upper.root_fd, prefix + b"uuid")
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return False
    return parameter("redirect_dir", "N") == "N"


def parameter(name: str, default: str) -> str:
    """A parameter of the kernel's overlayfs; ``default``: while the module is not loaded."""
    try:
        with open(f"{_PARAMETERS}/{name}") as file:
            return file.read().strip()
    except OSError:
        return default


def redirect_for(markers: Markers, gate: Gate, node: Node, *, same_parent: bool) -> bytes | None:
    """The redirect that a directory with lower parts needs before it is renamed; None: it has it already.

    Within its parent it is its name in the lowers. Otherwise it is its path there, from the nearest directory
    above with an absolute redirect; EXDEV if that is too long.
    """
    redirect = _redirect_of(markers, gate, node)
    if redirect is not None and (same_parent or redirect.startswith(b"/")):
        return None
    return node.name if same_parent else absolute_redirect(markers, gate, node, redirect)


def absolute_redirect(markers: Markers, gate: Gate, node: Node, redirect: bytes | None) -> bytes:
    """The path in the lowers of what an object of the upper refers to; EXDEV if it is too long.

    ``redirect``: the relative one that it has, if any.
    """
    path, step = b"", redirect or node.name
    while node.parent is not None:
        is_absolute = step.startswith(b"/")
        path = (step if is_absolute else b"/" + step) + path
        if len(path) > _LONGEST:
            raise os_error(errno.EXDEV)
        if is_absolute:
            break
        node = node.parent
        step = _redirect_of(markers, gate, node) or node.name
    return path


def _redirect_of(markers: Markers, gate: Gate, node: Node) -> bytes | None:
    """The redirect of a directory's part in the upper; None without one."""
    if not node.in_place:
        return None
    opaque, redirect, *_ = markers_of(markers, gate, node.parts[0])
    return None if opaque or redirect is None else c_string(redirect)
