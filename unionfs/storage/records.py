"""A volume's record and users: small files beside its data, the only authoritative state.

    ROOT/volumes/NAME/volume.json    the volume's record; replaced by one rename
    ROOT/volumes/NAME/.user-DIGEST   one user: its text and the path of the data
    ROOT/volumes/NAME/renamed.json   the record with the name that a rename is about to give it
    ROOT/volumes/NAME/spare          space for one user, for a full disk

Writers hold the volume's short lock; readers need no lock. Each user has a separate file: removing it needs
no space on a full disk. It need not survive a power cut, because its process does not.

Earlier versions have the users in the record, and take one without `users` for a damaged one. When their
daemons end, they take those for all users there are; so while there are any, new users are added, too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.storage import jsonfiles
from unionfs.storage.model import ANONYMOUS_LABEL, Volume, VolumeUser
from unionfs.sys import fds

_RECORD = "volume.json"
_RENAMED = "renamed.json"
_USER = ".user-"
_SPARE = "spare"
_SPARE_BYTES = 4096
_VERSION = 1
_MISSPELT = (ValueError, KeyError, TypeError, AttributeError)


class UnreadableRecordError(UserError):
    """A record is damaged, or cannot be opened."""


def find(directory: str) -> Volume | None:
    """The volume of a directory, or None if it is not a volume.

    A directory of this user with `_data` and without a readable record is a local volume. Raises UserError
    for a record of a newer version, and UnreadableRecordError for one that cannot be opened, and a damaged
    one without `_data`.
    """
    try:
        at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(directory, error) from error
    # Through its fd: a new volume of that name is another directory, whose record was never missing.
    with fds.Owned(at):
        try:
            return _found(directory, at)
        except OSError as error:
            raise _unreadable(directory, error) from error


def _found(directory: str, at: int) -> Volume | None:
    """The volume of the directory, open as `at`. Raises also OSError."""
    if os.fstat(at).st_uid != os.geteuid():
        return None
    if (volume := _recorded(directory, at)) is not None:
        return volume
    try:
        status = os.stat("_data", dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        with suppress(FileNotFoundError):
            os.stat(_RECORD, dir_fd=at, follow_symlinks=False)
            raise UnreadableRecordError(
                f"the record {quoted(f'{directory}/{_RECORD}')} is damaged; correct it, or remove the "
                "volume with --force."
            ) from None
        return None
    # A new volume gets its record first, which may have been just before its `_data`.
    if (volume := _recorded(directory, at)) is not None:
        return volume
    name = os.path.basename(directory)
    # As in Docker, the names of anonymous volumes are 64 hexadecimal digits.
    anonymous = len(name) == 64 and set(name) <= set("0123456789abcdef")
    labels = {ANONYMOUS_LABEL: ""} if anonymous else {}
    data = f"{directory}/_data"
    return Volume(
        name, "local", data, anonymous, {}, labels, status.st_mtime, directory=directory, recorded=False
    )


def _recorded(directory: str, at: int) -> Volume | None:
    found = (_read(directory, at, file) for file in (_RECORD, _RENAMED))
    return next((volume for volume in found if volume is not None), None)


def _read(directory: str, at: int, file: str) -> Volume | None:
    path = f"{directory}/{file}"
    try:
        values = jsonfiles.read(file, at)
        if values.get("version", _VERSION) > _VERSION:
            raise UserError(
                f"the record {quoted(path)} has version {values['version']}, and this unionfs knows "
                f"{_VERSION}: a newer one wrote it; use that one, or another storage root."
            )
        volume = Volume.from_json(values, directory)
    except (FileNotFoundError, *_MISSPELT):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    return volume if volume.name == os.path.basename(directory) else None


@contextmanager
def prepared(directory: str, renamed: Volume) -> Iterator[None]:
    """Keep a second record in a volume's directory, with its new name, while the directory is renamed.

    Raises UserError and OSError, without the second record.
    """
    path = f"{directory}/{_RENAMED}"
    with _recording(renamed.name, path):
        jsonfiles.write(path, {**renamed.to_json(), "users": []})
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def settle(renamed: Volume) -> None:
    """Make the second record the first one, after the directory has its new name. Raises UserError."""
    with _recording(renamed.name, renamed.directory):
        os.rename(f"{renamed.directory}/{_RENAMED}", f"{renamed.directory}/{_RECORD}")


def is_lost(directory: str) -> bool:
    try:
        with fds.directory(directory) as at:
            return _recorded(directory, at) is None
    except (UserError, OSError):
        return False


def write(volume: Volume, users: Iterable[VolumeUser] | None = None) -> None:
    """Write a volume's record; None: with the users of earlier versions in it. Raises UserError."""
    path = f"{volume.directory}/{_RECORD}"
    if users is None:
        users = _earlier_users(volume.directory)
    with _recording(volume.name, path):
        jsonfiles.write(path, {**volume.to_json(), "users": [[user.text, user.path] for user in users]})
    _keep_spare(volume.directory)


def keep_damaged(directory: str) -> None:
    with suppress(FileNotFoundError):
        os.rename(f"{directory}/{_RECORD}", f"{directory}/{_RECORD}.damaged")


# -- users -------------------------------------------------------------------------------------------------


def users(directory: str, *, sweeps: bool = False) -> list[VolumeUser]:
    """The users of a volume, sorted by text, including those whose process has ended. Raises UserError.

    `sweeps`: also remove what killed writers have left; the caller holds the volume's short lock.
    """
    found = {user.text: user for user in _earlier_users(directory)}
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from error
    for name in names:
        if not name.startswith(_USER):
            continue
        if name.endswith(".new"):
            if sweeps:
                with suppress(OSError):  # the next one tries again
                    os.unlink(f"{directory}/{name}")
            continue
        try:
            text, path = jsonfiles.read(f"{directory}/{name}")
            user = VolumeUser.from_stored(str(text), str(path))
            found[user.text] = user
        except (FileNotFoundError, *_MISSPELT):
            continue  # removed just now, or a power cut came before its content was on disk
        except OSError as error:
            raise _unreadable(f"{directory}/{name}", error) from error
    return sorted(found.values(), key=lambda user: user.text)


def add_user(directory: str, user: VolumeUser) -> None:
    """Record a user, or the new count of its hold; adding it again has no effect. Raises UserError."""
    path, values = _user_file(directory, user.text), [user.stored_text, user.path]
    with _recording(os.path.basename(directory), path):
        try:
            jsonfiles.write(path, values, sync=False)
        except OSError:
            if not jsonfiles.write_into(f"{directory}/{_SPARE}", path, values):
                raise
        else:
            _keep_spare(directory)
    if earlier := _earlier_users(directory):
        _write_earlier_users(directory, [*(one for one in earlier if one.text != user.text), user])


def remove_user(directory: str, text: str) -> None:
    """Remove a user, if recorded. Raises UserError."""
    path = _user_file(directory, text)
    failure = on_failure(f"the user {quoted(path)} of a volume cannot be removed", "correct that")
    with failure, suppress(FileNotFoundError):
        os.unlink(path)
    earlier = _earlier_users(directory)
    if any(user.text == text for user in earlier):
        _write_earlier_users(directory, [user for user in earlier if user.text != text])


def _earlier_users(directory: str) -> list[VolumeUser]:
    try:
        known = jsonfiles.read(f"{directory}/{_RECORD}")["users"]
        return [VolumeUser(str(text), str(path)) for text, path in known]
    except (OSError, *_MISSPELT):
        return []


def _write_earlier_users(directory: str, users: list[VolumeUser]) -> None:
    volume = find(directory)
    if volume is not None and volume.recorded:
        with suppress(UserError):  # a full disk: they count until their process ends
            write(volume, users)


def _keep_spare(directory: str) -> None:
    """Reserve space for one user, so that a volume on a full disk can still be measured and backed up."""
    path, written = f"{directory}/{_SPARE}", 0
    with suppress(OSError):
        if os.stat(path, follow_symlinks=False).st_size >= _SPARE_BYTES:
            return
        os.unlink(path)
    with suppress(OSError):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with fds.Owned(os.open(path, flags, 0o600)) as fd:
                written = os.write(fd, b" " * _SPARE_BYTES)
        finally:
            if written < _SPARE_BYTES:
                os.unlink(path)


def _user_file(directory: str, text: str) -> str:
    return f"{directory}/{_USER}{hashlib.sha256(os.fsencode(text)).hexdigest()[:32]}"


def _unreadable(path: str, error: OSError) -> UserError:
    return UnreadableRecordError(
        f"the record {quoted(path)} cannot be read: {reason(error)}; check its permissions."
    )


def _recording(name: str, path: str) -> on_failure:
    what = f"volume {quoted(name)} cannot be recorded in {quoted(path)}"
    return on_failure(what, "free space or check the permissions")
