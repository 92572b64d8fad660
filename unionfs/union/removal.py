"""Removing whole trees inside the work directory, however deep, with few fds."""

from __future__ import annotations

import itertools
import os
from typing import Final

from unionfs.sys import calls
from unionfs.union.places import open_for_listing

_moved: Final = itertools.count()


def empty_directory(fd: int) -> None:
    """Remove everything in the directory ``fd``; directories below are first moved up to it.

    Raises ``OSError`` when something cannot be removed.
    """
    while True:
        subdirectories = []
        listing = open_for_listing(fd)
        try:
            with os.scandir(listing) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        subdirectories.append(name)
                    else:
                        os.unlink(name, dir_fd=fd)
        finally:
            os.close(listing)
        if not subdirectories:
            return
        for name in subdirectories:
            _flatten(fd, name)


def _flatten(fd: int, name: bytes) -> None:
    """Remove the directory ``name`` of ``fd``; what directories it has move up into ``fd``."""
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        with os.scandir(inner) as entries:
            for entry in entries:
                child = os.fsencode(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    calls.renameat2(inner, child, fd, b"#up%d.%d" % (os.getpid(), next(_moved)))
                else:
                    os.unlink(child, dir_fd=inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=fd)


def remove_tree(fd: int, name: bytes) -> None:
    """Remove the directory ``name`` of the work directory ``fd`` and all below it."""
    _flatten(fd, name)
    listing = open_for_listing(fd)
    try:
        left = [os.fsencode(n) for n in os.listdir(listing) if n.startswith("#up")]
    finally:
        os.close(listing)
    while left:
        for child in left:
            _flatten(fd, child)
        listing = open_for_listing(fd)
        try:
            left = [os.fsencode(n) for n in os.listdir(listing) if n.startswith("#up")]
        finally:
            os.close(listing)
