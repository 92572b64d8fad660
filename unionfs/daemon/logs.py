"""Where a daemon's log goes: syslog if the host has one, else a file beside the registry; stderr with
`-f`."""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from io import TextIOWrapper
from typing import TextIO

_SYSLOG = "/dev/log"
_LARGEST_FILE = 1 << 20


def _has_syslog() -> bool:
    try:
        return stat.S_ISSOCK(os.stat(_SYSLOG).st_mode)
    except OSError:
        return False


def log_place(directory: str) -> str:
    """Where the log of a daemon without `-f` is found, as words for a person."""
    return "syslog" if _has_syslog() else log_file(directory)


def log_file(directory: str) -> str:
    """The log file of all daemons that share a runtime directory."""
    return f"{directory}/unionfs.log"


def to_stream(level: str, stream: TextIO | None = None) -> None:
    """Log to a stream, stderr when None, each line with time and level."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(logging.Formatter("%(asctime)s unionfs %(levelname)s %(message)s"))
    _install(handler, level)


def to_host(level: str, directory: str, mountpoint: str) -> None:
    """Log to syslog or to the file in `directory`, which starts anew when it has grown past 1 MiB."""
    handler: logging.Handler
    where = mountpoint.encode("utf-8", "backslashreplace").decode()
    where = where.replace("%", "%%")
    if _has_syslog():
        from logging.handlers import SysLogHandler

        handler = SysLogHandler(_SYSLOG, facility=SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter(f"unionfs[%(process)d]: {where}: %(levelname)s %(message)s"))
    else:
        path = log_file(directory)
        try:
            if os.stat(path).st_size > _LARGEST_FILE:
                os.replace(path, path + ".1")
        except OSError:
            pass
        # Opened at the first line, so that a mount without trouble leaves no file.
        handler = _PrivateFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s unionfs[%(process)d] {where}: %(levelname)s %(message)s")
        )
    _install(handler, level)


class _PrivateFile(logging.FileHandler):
    """Readable by its owner only, though the daemon's umask is 0; a symlink is not followed."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.fdopen(
            os.open(self.baseFilename, flags, 0o600), "a", encoding=self.encoding, errors=self.errors
        )


def _is_news(record: logging.LogRecord) -> bool:
    """False for pyfuse3's complaint that the kernel no longer waits for an answer.

    write(2) to /dev/fuse fails by ENOENT when the request was interrupted or the mount has gone meanwhile.
    """
    return not (
        record.name.startswith("pyfuse3")
        and "fuse_reply_" in record.getMessage()
        and os.strerror(errno.ENOENT) in record.getMessage()
    )


def _install(handler: logging.Handler, level: str) -> None:
    # A full disk under the log must not end a mount, nor print.
    logging.raiseExceptions = False
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    handler.addFilter(_is_news)
    root.addHandler(handler)
    root.setLevel(level.upper())
