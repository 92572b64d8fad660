"""The configuration files: defaults of a host and of a user.

    /etc/unionfs/config.toml                 of the host
    $XDG_CONFIG_HOME/unionfs/config.toml     of the user (~/.config by default); its values replace the host's

The command line and the environment replace both. Root ignores a file below another user's directory. Uid 0
of a user namespace counts as an ordinary user.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Final

from unionfs.errors import UserError, quoted, reason
from unionfs.settings.configuration import KEYS, Configuration, Value, parse
from unionfs.sys.capabilities import is_host_root
from unionfs.sys.fds import Owned
from unionfs.sys.walking import Step, walk

SYSTEM: Final = "/etc/unionfs/config.toml"
_LARGEST: Final = 1 << 20
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def user_file(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the path of the user's file; None without a home directory."""
    values = os.environ if environment is None else environment
    chosen = values.get("XDG_CONFIG_HOME", "")
    if not chosen.startswith("/"):  # the specification ignores relative values
        home = values.get("HOME") or os.path.expanduser("~")
        if not home.startswith("/"):
            return None
        chosen = f"{home}/.config"
    return f"{chosen}/unionfs/config.toml"


def configuration(environment: Mapping[str, str] | None = None) -> Configuration:
    """Read both files. Raises UserError for one that cannot be read, is no TOML, or has an unknown key."""
    values = {key: Value(default) for key, (default, _) in KEYS.items()}
    for path in (SYSTEM, user_file(environment)):
        if path is not None and (content := _content(path)) is not None:
            values.update(parse(path, content))
    return Configuration(values)


def _content(path: str) -> bytes | None:
    """Return the content of a file that only root or this user can have written; None if there is none."""
    try:
        with (
            Owned(walk(path, lambda step: _check(path, step))) as found,
            Owned(os.open(f"/proc/self/fd/{found}", _FLAGS)) as fd,
            open(fd, "rb", closefd=False) as source,
        ):
            content = source.read(_LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError, _NotOurs):
        return None
    except PermissionError:
        if path == SYSTEM:
            raise UserError(f"{quoted(path)} cannot be read by this user; run `chmod a+r` on it.") from None
        return None
    except OSError as error:
        raise UserError(f"{quoted(path)} cannot be read: {reason(error)}; correct it.") from error
    if len(content) > _LARGEST:
        raise UserError(f"{quoted(path)} has more than {_LARGEST} bytes; shorten it.")
    return content


class _NotOurs(Exception):
    """A directory on the way to the user's file belongs to another user, as $HOME does after su(1)."""


def _check(path: str, step: Step) -> None:
    """Refuse a file that another user has written and, for root, that another user could replace.

    Raises UserError and _NotOurs.
    """
    status = step.status
    kind = stat.S_IFMT(status.st_mode)
    if step.is_last:
        if status.st_uid not in (0, os.geteuid()):
            raise UserError(
                f"the configuration {quoted(path)} cannot be trusted: it belongs to uid {status.st_uid}; "
                "change its owner, or remove it."
            )
        if kind != stat.S_IFREG:
            raise UserError(f"the configuration {quoted(path)} is not a regular file; replace it.")
    if not is_host_root():
        return
    if status.st_uid != 0:
        raise _NotOurs
    shared = kind == stat.S_IFDIR and status.st_mode & stat.S_ISVTX
    if kind != stat.S_IFLNK and status.st_mode & 0o022 and not shared:
        raise UserError(
            f"the configuration {quoted(path)} cannot be trusted: {quoted(step.path)} can be written by its "
            f"group or others; run `chmod go-w {quoted(step.path)}`."
        )
