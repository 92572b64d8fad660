"""Where a daemon logs: stderr with `-f`, else syslog if the host has one, else a file beside the registry.

Lines for the journal of systemd start with their priority instead of time and level; sd-daemon(3).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO

from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.sys.manager import is_journal

_SYSLOG = "/dev/log"
_FILE = "unionfs.log"
_LARGEST_FILE = 1 << 20


def _has_syslog() -> bool:
    try:
        return stat.S_ISSOCK(os.stat(_SYSLOG).st_mode)
    except OSError:
        return False


def log_place(directory: str) -> str:
    """Return, for a message, the log of a daemon without `-f`."""
    return "syslog" if _has_syslog() else log_file(directory)


def log_file(directory: str) -> str:
    """Return the log file of all daemons that share a runtime directory."""
    return f"{directory}/{_FILE}"


def current_place() -> str:
    """Return where this daemon logs: `stderr`, `syslog`, or the path of a file."""
    handlers = logging.getLogger().handlers
    if any(isinstance(handler, _PrivateFile) for handler in handlers):
        return next(handler.baseFilename for handler in handlers if isinstance(handler, _PrivateFile))
    return "stderr" if any(isinstance(handler, logging.StreamHandler) for handler in handlers) else "syslog"


def to_stream(
    level: str, stream: TextIO | None = None, shape: str = "%(asctime)s unionfs %(levelname)s %(message)s"
) -> None:
    """Log to a stream (None: stderr), each message in this shape, or as the journal takes it."""
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Prioritised("%(message)s") if is_journal(stream) else logging.Formatter(shape))
    _install(handler, level)


class _Prioritised(logging.Formatter):
    """Each line with its priority: the journal makes an entry of every line."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a message, and of its traceback."""
        prefix = f"<{priority(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).split("\n"))


def priority(level: int) -> int:
    """Return the priority of syslog(3) for a level of `logging`."""
    steps = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
    return next((found for least, found in steps if level >= least), 7)


def to_host(level: str, directory: RuntimeDirectory, mountpoint: str) -> None:
    """Log to syslog, or to the file in `directory`, which is rotated when larger than 1 MiB.

    The directory must stay open as long as the process logs.
    """
    handler: logging.Handler
    where = mountpoint.encode("utf-8", "backslashreplace").decode()
    where = where.replace("%", "%%")
    if _has_syslog():
        # For start-up time: only a daemon needs it.
        from logging.handlers import SysLogHandler

        handler = SysLogHandler(_SYSLOG, facility=SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter(f"unionfs[%(process)d]: {where}: %(levelname)s %(message)s"))
    else:
        with suppress(OSError):
            if os.stat(_FILE, dir_fd=directory.fd, follow_symlinks=False).st_size > _LARGEST_FILE:
                os.replace(_FILE, f"{_FILE}.1", src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
        handler = _PrivateFile(directory)
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s unionfs[%(process)d] {where}: %(levelname)s %(message)s")
        )
    _install(handler, level)


def close() -> None:
    """Log nowhere."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()


class _PrivateFile(logging.FileHandler):
    """The log in a runtime directory: readable by its owner only, though the daemon's umask is 0."""

    def __init__(self, directory: RuntimeDirectory) -> None:
        self._directory = directory
        # Opened at the first line, so that a mount that logs nothing leaves no file.
        super().__init__(
            log_file(directory.path), encoding="utf-8", errors="backslashreplace", delay=True
        )

    def _open(self) -> TextIOWrapper:
        fd = self._directory.open(_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return os.fdopen(fd, "a", encoding=self.encoding, errors=self.errors)


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for pyfuse3's warning that the kernel no longer waits for an answer.

    write(2) to /dev/fuse returns ENOENT if the request was interrupted or the mount is gone.
    """
    return not (
        record.name.startswith("pyfuse3")
        and "fuse_reply_" in record.getMessage()
        and os.strerror(errno.ENOENT) in record.getMessage()
    )


def _install(handler: logging.Handler, level: str) -> None:
    # A full disk under the log must neither end a mount nor print a traceback.
    logging.raiseExceptions = False
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    handler.addFilter(_is_news)
    root.addHandler(handler)
    root.setLevel(level.upper())
