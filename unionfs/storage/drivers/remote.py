"""Drivers for storage on other machines, using existing FUSE programs: sshfs, rclone, glusterfs."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage.drivers import replacing
from unionfs.storage.drivers.base import Driver, Replacement
from unionfs.storage.model import Volume
from unionfs.storage.mounts import detach, mount_at, need_program, run_program
from unionfs.sys.liveness import is_dead
from unionfs.sys.unmount import unmount

_READY_SECONDS = 30.0
_SENT_SECONDS = 600.0


class RemoteDriver(Driver):
    """The common base: a program mounts at `_data` and ends with the mount."""

    scope = "global"
    program = ""
    package = ""
    needed: tuple[str, ...] = ()

    def command(self, options: Mapping[str, str], target: str, directory: str) -> list[str]:
        raise NotImplementedError

    def check(self, options: Mapping[str, str]) -> None:
        super().check(options)
        for key in self.needed:
            if not options.get(key):
                raise UserError(
                    f"the volume option {key} is missing ({self.known_options[key]}); the driver {self.name} "
                    "needs it."
                )
        for key, value in options.items():
            if "\0" in value or "\n" in value or (key in self.needed and value.startswith("-")):
                raise UserError(
                    f"the volume option {key}={quoted(value)} is not one that {self.program} accepts."
                )
        need_program(self.program, self.package, f"the driver {self.name}")

    def create(self, volume: Volume) -> None:
        with on_failure(f"volume {quoted(volume.name)} cannot be made", "free space"):
            os.mkdir(f"{volume.directory}/_data", 0o755)

    def remove(self, volume: Volume) -> None:
        self.unmount(volume, "")

    def mount(self, volume: Volume, user: str) -> str:
        data = f"{volume.directory}/_data"
        what = f"volume {quoted(volume.name)}"
        if mount_at(data) is not None:
            if not is_dead(data):
                return data
            detach(data)  # its program has died
        need_program(self.program, self.package, f"the driver {self.name}")
        run_program(
            [self.program, *self.command(volume.options, data, volume.directory)],
            f"{what} cannot be mounted",
            stdin=self.secret(volume.options),
        )
        deadline = time.monotonic() + _READY_SECONDS
        while mount_at(data) is None or is_dead(data):
            if time.monotonic() > deadline:
                detach(data)
                raise UserError(
                    f"{what} cannot be mounted: {self.program} did not start within {_READY_SECONDS:.0f} s"
                    f"{self.log(volume)}; check the volume's options."
                )
            time.sleep(0.02)
        return data

    def secret(self, options: Mapping[str, str]) -> str:
        """The program's standard input."""
        return ""

    def log(self, volume: Volume) -> str:
        """The end of the program's log, as a sentence fragment."""
        return ""

    def settle(self, volume: Volume) -> None:
        """Wait until written files can be renamed. Raises UserError."""

    def unmount(self, volume: Volume, user: str) -> None:
        data = f"{volume.directory}/_data"
        if (found := mount_at(data)) is None:
            return
        with on_failure(f"volume {quoted(volume.name)} cannot be unmounted", f"end what uses {quoted(data)}"):
            unmount(found, lazy=is_dead(data))

    def restores_mounted(self, volume: Volume) -> bool:
        return True

    @contextmanager
    def replacement(self, volume: Volume) -> Iterator[Replacement]:
        with replacing.in_place(volume, f"{volume.directory}/_data", lambda: self.settle(volume)) as place:
            yield place

    def check_clone(self, volume: Volume) -> None:
        raise UserError(
            f"volume {quoted(volume.name)} cannot be cloned: a volume with the same options would be the "
            "same data; make a new volume elsewhere, and restore a backup into it."
        )


class Sshfs(RemoteDriver):
    """A directory on another host, over SFTP. The options are those of docker's sshfs plugins."""

    name = "sshfs"
    program = "sshfs"
    package = "sshfs"
    needed = ("sshcmd",)
    known_options: Mapping[str, str] = {
        "sshcmd": "USER@HOST:PATH",
        "port": "the port of the SSH server",
        "IdentityFile": "the private key",
        "password": "the password",
        "ssh_command": "the program to run in ssh's place",
        "o": "more options of sshfs, separated by commas",
    }

    def check(self, options: Mapping[str, str]) -> None:
        if ":" not in options.get("sshcmd", ":"):
            raise UserError(f"sshcmd={quoted(options['sshcmd'])} has no path; write USER@HOST:PATH.")
        if not options.get("port", "1").isdigit():
            raise UserError(f"invalid port={quoted(options['port'])}: not a number.")
        super().check(options)

    def command(self, options: Mapping[str, str], target: str, directory: str) -> list[str]:
        words = ["-o", "reconnect,ServerAliveInterval=15,ServerAliveCountMax=3"]
        if os.geteuid() == 0:
            words += ["-o", "allow_other,default_permissions"]
        for key in ("port", "IdentityFile", "ssh_command"):
            if key in options:
                words += ["-o", f"{key}={options[key]}"]
        words += ["-o", "password_stdin" if "password" in options else "BatchMode=yes"]
        if options.get("o"):
            words += ["-o", options["o"]]
        return [*words, options["sshcmd"], target]

    def secret(self, options: Mapping[str, str]) -> str:
        return f"{options['password']}\n" if "password" in options else ""


class Rclone(RemoteDriver):
    """An rclone remote: S3, Google Drive, WebDAV and many more."""

    name = "rclone"
    program = "rclone"
    package = "rclone"
    needed = ("remote",)
    known_options: Mapping[str, str] = {
        "remote": "NAME:PATH of rclone's configuration, or a path",
        "config": "rclone's configuration file",
        "vfs-cache-mode": "off, minimal, writes (default) or full",
        "o": "more flags of `rclone mount` without their dashes, separated by commas",
    }

    def check(self, options: Mapping[str, str]) -> None:
        super().check(options)
        for word in filter(None, options.get("o", "").split(",")):
            if not re.fullmatch(r"[a-z][a-z0-9-]*(=.*)?", word):
                raise UserError(f"the option o has {quoted(word)}, which is not a flag of `rclone mount`.")

    def command(self, options: Mapping[str, str], target: str, directory: str) -> list[str]:
        words = ["mount", options["remote"], target, "--daemon", "--log-file", f"{directory}/rclone.log"]
        words += [f"--vfs-cache-mode={options.get('vfs-cache-mode', 'writes')}"]
        # Otherwise rclone uploads a file seconds after its close, or never after an earlier unmount.
        words += ["--vfs-write-back=0", f"--cache-dir={directory}/cache"]
        if os.geteuid() == 0:
            words += ["--allow-other", "--default-permissions"]
        if "config" in options:
            words += [f"--config={options['config']}"]
        return words + [f"--{word}" for word in filter(None, options.get("o", "").split(","))]

    def log(self, volume: Volume) -> str:
        return _last_line(f"{volume.directory}/rclone.log")

    def settle(self, volume: Volume) -> None:
        # A file is uploaded after its close; if renamed during the upload, it arrives under both names.
        deadline = time.monotonic() + _SENT_SECONDS
        while _is_sending(f"{volume.directory}/cache/vfsMeta"):
            if time.monotonic() > deadline:
                raise UserError(
                    f"volume {quoted(volume.name)} is not restored: rclone has not sent all files in "
                    f"{_SENT_SECONDS:.0f} s{self.log(volume)}; check that its remote can be reached."
                )
            time.sleep(0.05)


def _is_sending(directory: str) -> bool:
    """Whether rclone's cache holds a file not uploaded yet, according to its JSON files (vfs/vfscache)."""
    for where, _, names in os.walk(directory):
        for name in names:
            try:
                with open(f"{where}/{name}", encoding="utf-8", errors="replace") as source:
                    if json.load(source).get("Dirty"):
                        return True
            except FileNotFoundError:
                continue
            except ValueError:
                return True  # being written now
    return False


class Glusterfs(RemoteDriver):
    """A volume of a GlusterFS cluster."""

    name = "glusterfs"
    program = "glusterfs"
    package = "glusterfs-client"
    needed = ("servers", "volname")
    known_options: Mapping[str, str] = {
        "servers": "the hosts of the cluster, separated by commas",
        "volname": "the cluster's volume",
        "subdir": "a directory of it",
        "o": "more options of glusterfs without their dashes, separated by commas",
    }

    def command(self, options: Mapping[str, str], target: str, directory: str) -> list[str]:
        words = [f"--volfile-server={server}" for server in options["servers"].split(",") if server]
        words += [f"--volfile-id={options['volname']}", "--acl", f"--log-file={directory}/glusterfs.log"]
        if options.get("subdir"):
            words.append(f"--subdir-mount=/{options['subdir'].strip('/')}")
        words += [f"--{word}" for word in filter(None, options.get("o", "").split(","))]
        return [*words, target]

    def log(self, volume: Volume) -> str:
        return _last_line(f"{volume.directory}/glusterfs.log")


def _last_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as log:
            lines = [line.strip() for line in log.read()[-4000:].splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if " E [" in line or "ERROR" in line or "CRITICAL" in line]
    return f" ({(errors or lines)[-1][-300:]})" if lines else ""
