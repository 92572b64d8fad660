"""The errors that a user of the command line sees."""

from __future__ import annotations


class UserError(Exception):
    """`str(error)` is one full sentence for the user: the thing, the cause and the cure."""


class LayerError(UserError):
    """A layer cannot be used."""


class MountRefusedError(UserError):
    """The kernel or libfuse refused the mount; what libfuse printed says why."""

    def __init__(self, mountpoint: str, cause: str) -> None:
        super().__init__(_refusal(mountpoint, cause))
        self.mountpoint = mountpoint

    def explained(self, printed: str) -> str:
        """The sentence with libfuse's reason."""
        return _refusal(self.mountpoint, printed) if printed else str(self)


def _refusal(mountpoint: str, cause: str) -> str:
    if "not permitted" in cause:
        cure = "mounting needs CAP_SYS_ADMIN, which a container has with `--cap-add SYS_ADMIN`"
    elif "Invalid argument" in cause:
        cure = "check the options, SELinux contexts above all"
    else:
        cure = "`unionfs doctor` may tell why"
    return f"{quoted(mountpoint)} cannot be mounted: {cause.rstrip('.')}; {cure}."


def quoted(path: str) -> str:
    """A path as it appears in a sentence: as it is, unless it holds what would break the line."""
    return path if path.isprintable() and path else repr(path)


def reason(error: OSError) -> str:
    """The cause within a sentence, in the C library's words, in small letters as a part of a sentence."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
