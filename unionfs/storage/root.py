"""The storage root: the directory that holds volumes and containers.

    ROOT/volumes/NAME/_data         a volume's files, in Docker's layout
    ROOT/containers/NAME/           a container's upper and work
    ROOT/locks/                     lock files

Only its owner may enter or write these directories: their content is trusted, the content of a volume
(`_data`) is not.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.storage.configured import configuration
from unionfs.sys.capabilities import is_host_root
from unionfs.sys.fds import Owned

if TYPE_CHECKING:
    from unionfs.sys.walking import Step

ENVIRONMENT = "UNIONFS_ROOT"
_SYSTEM = "/var/lib/unionfs"
_MODE = 0o700
_OTHER = f"give another storage root by --root or {ENVIRONMENT}"


def storage_root(chosen: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """The storage root as an absolute path; it need not exist.

    The first of: `chosen` (`--root`), `UNIONFS_ROOT`, the configuration, /var/lib/unionfs for root,
    `$XDG_DATA_HOME/unionfs` for others (XDG Base Directory Specification: ~/.local/share by default, relative
    values are ignored). Uid 0 of a user namespace counts as an ordinary user. Raises UserError if there is
    no home directory.
    """
    values = os.environ if environment is None else environment
    if chosen is not None and not chosen:
        raise UserError("--root is given without a directory; name one.")
    path = chosen or values.get(ENVIRONMENT) or configuration(environment).get("root")
    if path:
        try:
            return os.path.abspath(path)
        except FileNotFoundError as error:  # of getcwd
            raise UserError(
                f"the storage root {quoted(path)} is relative, but the current directory is gone; give an "
                "absolute path."
            ) from error
    if is_host_root():
        return _SYSTEM
    data = values.get("XDG_DATA_HOME", "")
    if not data.startswith("/"):
        home = values.get("HOME") or os.path.expanduser("~")
        if not home.startswith("/"):
            raise UserError(
                f"there is no home directory for the storage root; set HOME or {ENVIRONMENT}, or give --root."
            )
        data = f"{home}/.local/share"
    return f"{data}/unionfs"


def open_root(root: str) -> None:
    """Create the storage root if it is missing, and refuse one that another user could change.

    It must belong to this user and be writable only by its owner. For root, the same applies to every
    directory and symlink on the path: a user who may rename one of them can replace the root (except in a
    sticky directory such as /tmp; inode(7)). For uid 0 of a user namespace, which can do no more harm than
    the user it maps to, only the root itself is checked. Raises UserError, with nothing created.
    """
    try:
        if is_host_root():
            _check_way(root)
        if not os.path.lexists(root):
            make_directory(root)
            return
        status = os.stat(root)
    except OSError as error:
        raise _unusable(root, error) from error
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"the storage root {quoted(root)} is not a directory; {_OTHER}.")
    _check_owner(root, status)
    if status.st_mode & 0o077 and _is_default(root):
        # An earlier version set mode 0711; no user chose it.
        _tighten(root)


def make_directory(path: str) -> str:
    """Create a directory of the storage root and its parents, if missing. Raises UserError.

    Its mode is 0700: a user who may pass through it can run a set-id file in a volume (as CVE-2021-41091). An
    existing directory must belong to this user and not be writable by others; its mode becomes 0700. A
    symlink is not followed.
    """
    with on_failure(f"{quoted(path)} cannot be made", _OTHER):
        # os.makedirs creates the parents with mode 0777 less the umask.
        missing = [path]
        while not os.path.lexists(missing[-1]):
            missing.append(os.path.dirname(missing[-1]))
        for directory in reversed(missing[:-1]):
            with suppress(FileExistsError):
                os.mkdir(directory, _MODE)
                os.chmod(directory, _MODE)
    check_directory(path)
    return path


def check_directory(path: str) -> None:
    """Refuse a directory below the storage root that others could change, and make it private.

    Raises UserError. Ignores a missing directory.
    """
    try:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            _check_owner(path, status)
            if status.st_mode & 0o077:
                _tighten(path)
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(path, error) from error
    kind = "a symlink" if stat.S_ISLNK(status.st_mode) else "not a directory"
    raise UserError(f"{quoted(path)} is {kind}; move it away, or {_OTHER}.")


def is_own_directory(path: str) -> bool:
    """Whether `path` is a directory of this user, not a symlink."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _tighten(path: str) -> None:
    with Owned(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.chmod(f"/proc/self/fd/{fd}", _MODE)


def _is_default(root: str) -> bool:
    values = {name: value for name, value in os.environ.items() if name != ENVIRONMENT}
    try:
        return root == storage_root(None, values)
    except UserError:
        return False


def _check_owner(path: str, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise UserError(
            f"{quoted(path)} belongs to uid {status.st_uid}, not to this user (uid {os.geteuid()}); run the "
            f"command as its owner, or {_OTHER}."
        )
    if status.st_mode & 0o022:
        raise UserError(
            f"{quoted(path)} is writable by its group or others, so what lies there cannot be trusted; check "
            f"its content and run `chmod go-w {quoted(path)}`, or {_OTHER}."
        )


def _check_way(root: str) -> None:
    """Refuse a path that a user other than root could redirect. Raises UserError, OSError."""
    # For start-up time: a mount without storage does not need it.
    from unionfs.sys.walking import walk

    def look(step: Step) -> None:
        if not step.is_last:
            _check_above(root, step.path, step.status)

    with suppress(FileNotFoundError), Owned(walk(root, look)):
        pass


def _check_above(root: str, path: str, status: os.stat_result) -> None:
    if status.st_uid != 0:
        raise UserError(
            f"the storage root {quoted(root)} lies below {quoted(path)}, which belongs to uid "
            f"{status.st_uid}: that user could replace it; run the command as that user, or {_OTHER}."
        )
    if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise UserError(
            f"the storage root {quoted(root)} lies below {quoted(path)}, which its group or others may write "
            f"to: they could replace it; run `chmod go-w {quoted(path)}`, or {_OTHER}."
        )


def _unusable(path: str, error: OSError) -> UserError:
    return UserError(f"{quoted(path)} cannot be used: {reason(error)}; {_OTHER}.")
