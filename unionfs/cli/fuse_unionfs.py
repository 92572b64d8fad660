"""The command `fuse-unionfs`: the command lines of fuse-overlayfs and of mount(8)'s helpers.

    fuse-unionfs [-f] [-d] -o lowerdir=A:B,upperdir=U,workdir=W MOUNTPOINT
    fuse-unionfs SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS] [-t TYPE]

Parsed by hand, because these callers (podman, mount(8), mount.fuse(8)) mix flags and arguments differently.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from unionfs import __version__
from unionfs.cli.common import failed, leave, prepare_streams
from unionfs.daemon import preflight, remounting
from unionfs.daemon.process import mount
from unionfs.daemon.settle import settle
from unionfs.errors import UserError, quoted
from unionfs.sys import libfuse

HELP: Final = """\
usage: fuse-unionfs [-f] [-d] [-o OPTION,...]... MOUNTPOINT
       fuse-unionfs SOURCE MOUNTPOINT [-o OPTION,...]... [-sfnv] [-t TYPE]

Mounts a union, with the command line of fuse-overlayfs or of mount(8)'s helpers.

  -o OPTION,...   lowerdir=A:B, upperdir=U, workdir=W and all others of `unionfs mount --help`;
                  remount: only give a live mount other flags (ro, rw, nosuid, nodev, noexec ...)
  -f              stay in the foreground; if called as mount.TYPE: check, but mount nothing
  -d, --debug     stay in the foreground and log everything
  -s, -n, -v      ignored, for compatibility with mount(8)
  -t TYPE         likewise
  -V, --version   print the versions
  -h, --help      print this

Example: fuse-unionfs -o lowerdir=/srv/base,upperdir=/srv/up,workdir=/srv/work /mnt
"""


@dataclass(slots=True)
class _Call:
    words: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    foreground: bool = False
    debug: bool = False
    fake: bool = False
    show: str = ""


def _parse(arguments: Sequence[str], *, helper: bool) -> _Call:
    call, rest = _Call(), list(arguments)
    while rest:
        word = rest.pop(0)
        match word:
            case "-h" | "--help":
                call.show = "help"
            case "-V" | "--version":
                call.show = "version"
            case "--debug":
                call.debug = True
            case "--":
                call.words += rest
                break
            case _ if word.startswith("--"):
                raise UserError(f"unknown option {quoted(word)}; see `fuse-unionfs --help`.")
            case _ if word.startswith("-") and len(word) > 1:
                _letters(call, word[1:], rest, helper=helper)
            case _:
                call.words.append(word)
    return call


def _letters(call: _Call, letters: str, rest: list[str], *, helper: bool) -> None:
    """Parse combined flags (`-sfnv`); the last one may take the next argument."""
    for position, letter in enumerate(letters):
        if letter in "otN":
            value = letters[position + 1 :] or (rest.pop(0) if rest else None)
            if value is None:
                raise UserError(f"option -{letter} needs a value; see `fuse-unionfs --help`.")
            if letter == "o":
                call.options.append(value)
            elif letter == "N":
                raise UserError("option -N: mounting in another namespace is not supported; use `nsenter`.")
            return
        match letter:
            case "f":
                # mount(8) passes --fake as -f: "Causes everything to be done except for the actual system
                # call".
                call.fake, call.foreground = helper, not helper
            case "d":
                call.debug = True
            case "s" | "n" | "v":
                pass
            case _:
                raise UserError(f"unknown option -{letter}; see `fuse-unionfs --help`.")


def _print_version() -> None:
    """Print the versions in fuse-overlayfs's form, which `podman info` shows unchanged."""
    print(f"fuse-unionfs: version {__version__}", flush=True)
    library = libfuse.load()
    if library is not None:
        print(f"FUSE library version {libfuse.version(library)}", flush=True)
        library.fuse_lowlevel_version()  # "using FUSE kernel interface version 7.N"
        ctypes.CDLL(None).fflush(None)


def _mount(call: _Call, program: str) -> int:
    match call.words:
        case [mountpoint]:
            source = None
        case [source, mountpoint]:
            pass
        case []:
            raise UserError(f"no mountpoint is given; see `{program} --help`.")
        case _:
            raise UserError(f"unexpected argument {quoted(call.words[2])}; see `{program} --help`.")
    if remounting.is_remount(call.options):
        if not call.fake:
            remounting.change(mountpoint, call.options)
        return 0
    # Container engines mount overlayfs without an index: of a lower's file with several names, only the one
    # that was changed is to be in the layer. An option of the caller's comes later and counts more.
    options = ["index=off", *call.options] if source is None else call.options
    settings = settle(
        mountpoint,
        options=options,
        source=source,
        log_level="debug" if call.debug else None,
    )
    if call.fake:
        preflight.check(settings)
        return 0
    return mount(settings, foreground=call.foreground or call.debug)


def _run(arguments: Sequence[str], program: str, *, helper: bool) -> int:
    prepare_streams()
    try:
        call = _parse(arguments, helper=helper)
        if call.show == "help":
            print(HELP, end="")
            return 0
        if call.show == "version":
            _print_version()
            return 0
        return _mount(call, program)
    except (UserError, KeyboardInterrupt, OSError) as error:
        return failed(program, error)


def mount_helper(arguments: Sequence[str], program: str) -> int:
    """Serve a call from mount(8), independent of the program's name. Returns the exit code."""
    return _run(arguments, program, helper=True)


def run_here(arguments: Sequence[str], program: str) -> int:
    """Run `fuse-unionfs` in this process; `program` is the name it is called by. Returns the exit code."""
    helper = program.startswith("mount.")
    return _run(arguments, "unionfs" if helper else "fuse-unionfs", helper=helper)


def main() -> None:
    """`fuse-unionfs` without the launcher."""
    leave(run_here(sys.argv[1:], os.path.basename(sys.argv[0])))
