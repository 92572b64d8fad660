"""Errors shown to users of the command line."""

from __future__ import annotations

import errno
import os
from types import TracebackType


class UserError(Exception):
    """`str(error)` is one sentence for the user: the thing, the cause and the cure."""


class LayerError(UserError):
    """A layer cannot be used."""


class DeadMountError(UserError):
    """A path is on a mount whose daemon has died."""


class MountRefusedError(UserError):
    """The kernel or libfuse refused the mount; libfuse's output contains the reason."""

    def __init__(self, mountpoint: str, cause: str) -> None:
        super().__init__(_refusal(mountpoint, cause))
        self.mountpoint = mountpoint

    def explained(self, printed: str) -> str:
        """Return the sentence with libfuse's reason."""
        return _refusal(self.mountpoint, printed) if printed else str(self)


def _refusal(mountpoint: str, cause: str) -> str:
    if "not permitted" in cause:
        cure = "mounting needs CAP_SYS_ADMIN, which a container has with `--cap-add SYS_ADMIN`"
    elif "Invalid argument" in cause:
        cure = "check the options, SELinux contexts above all"
    else:
        cure = "`unionfs doctor` may tell why"
    return f"{quoted(mountpoint)} cannot be mounted: {cause.rstrip('.')}; {cure}."


def quoted(path: str | bytes) -> str:
    """Return a path for use in a sentence: unchanged if printable, else its repr().

    Bytes are the path of an entry below a root, which is itself `.`.
    """
    text = path if isinstance(path, str) else os.fsdecode(path or b".")
    return text if text.isprintable() and text else repr(text)


def reason(error: OSError) -> str:
    """Return the C library's text for an error, starting in lower case for use within a sentence."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def path_in(error: OSError, otherwise: str = "") -> str:
    """Return the path that an error names. Calls on an fd name that, which says nothing."""
    return os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else otherwise


def reason_at(error: OSError) -> str:
    """Return the reason of an error, after the path that it names, if any."""
    path = path_in(error)
    return f"{quoted(path)}: {reason(error)}" if path else reason(error)


def cure_for(error: OSError, otherwise: str) -> str:
    """Return the cure for an error in a sentence: for a full disk that, else `otherwise`."""
    return "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else otherwise


def with_cure(why: str, cure: str) -> str:
    """Return a cause and a cure for a sentence: a cause with a semicolon has its own."""
    return why if ";" in why else f"{why}; {cure}"


class on_failure:
    """Raises a UserError `COMPLAINT: CAUSE; CURE.` for an error of the block, OSError or one of `errors`."""

    def __init__(self, complaint: str, cure: str, *errors: type[Exception]) -> None:
        self._complaint = complaint
        self._cure = cure
        self._errors = errors or (OSError,)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, self._errors):
            cause = reason(error) if isinstance(error, OSError) else str(error)
            raise UserError(f"{self._complaint}: {cause}; {self._cure}.") from error
