"""Mounts a volume's storage by mount(8) and umount(8), which handle loop devices and helper programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from unionfs.errors import UserError, quoted
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.mountinfo import MountEntry, mounted_at
from unionfs.sys.unmount import MNT_DETACH, umount2

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SECONDS = 120.0

# mount(8) runs /sbin/mount.TYPE for these; the package is Debian's.
_HELPERS = {
    "nfs": ("mount.nfs", "nfs-common"),
    "nfs4": ("mount.nfs4", "nfs-common"),
    "cifs": ("mount.cifs", "cifs-utils"),
    "smb3": ("mount.smb3", "cifs-utils"),
}


@dataclass(frozen=True, slots=True)
class MountCall:
    """One call of mount(8). `environment` holds values that a process list must not show."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def program_path(name: str) -> str | None:
    """The path of a program, searched also in the sbin directories; None when it is not installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_PATH}")


def need_program(name: str, package: str, what: str) -> str:
    """The path of a program. Raises UserError that names its package."""
    found = program_path(name)
    if found is None:
        raise UserError(
            f"{what} needs the program {name}, which is not installed; install the package {package}."
        )
    return found


def mount_call(fstype: str, device: str, options: str, target: str) -> MountCall:
    """The call of mount(8) for Docker's type, device and o. Raises UserError if a helper is missing.

    Docker passes these words to mount(2), where an NFS device is `:/path` and the server is addr=; helpers
    expect `server:/path` (nfs(5)). A cifs password goes into the environment (mount.cifs(8), PASSWD).
    """
    words = [word for word in options.split(",") if word]
    environment = {}
    if fstype in _HELPERS:
        program, package = _HELPERS[fstype]
        if program_path(program) is None:
            raise UserError(
                f"volumes of type {fstype} need the program {program}, which is not installed; install the "
                f"package {package}."
            )
    if fstype in ("nfs", "nfs4") and device.startswith(":"):
        server = next((word[5:] for word in words if word.startswith("addr=")), "")
        if not server:
            raise UserError(
                f"the device {quoted(device)} of an NFS volume has no server; add addr=SERVER to the "
                "option o."
            )
        device = (f"[{server}]" if ":" in server and not server.startswith("[") else server) + device
        words = [word for word in words if not word.startswith("addr=")]
    if fstype in ("cifs", "smb3"):
        for word in list(words):
            key, equals, value = word.partition("=")
            if equals and key in ("password", "pass"):
                environment["PASSWD"] = value
                words.remove(word)
    command = ["mount", "-t", fstype]
    if fstype == "none" and "bind" not in words and "rbind" not in words:
        raise UserError("a volume of type none needs the option o=bind.")
    if words:
        command += ["-o", ",".join(words)]
    return MountCall((*command, "--", device, target), environment)


def run_mount(call: MountCall, what: str) -> None:
    """Run mount(8) for `what` ("volume x"). Raises UserError with mount's error message."""
    if not has_capability(CAP_SYS_ADMIN):
        raise UserError(
            f"{what} cannot be mounted: that needs root; run as root, or use a volume without options."
        )
    run_program(call.command, f"{what} cannot be mounted", environment=call.environment)


def run_program(
    command: Sequence[str],
    complaint: str,
    *,
    environment: Mapping[str, str] = {},
    good: Sequence[int] = (0,),
    stdin: str = "",
    cure: str = "check the volume's options",
) -> str:
    """Run a program and return its output. Raises UserError: `complaint`, then the program's message."""
    path = need_program(command[0], _PACKAGES.get(command[0], command[0]), complaint.split(" cannot")[0])
    # Files, not pipes: a program that stays in the background may keep pipes open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        given.write(stdin.encode())
        given.seek(0)
        try:
            code = subprocess.run(
                [path, *command[1:]],
                stdin=given,
                stdout=out,
                stderr=err,
                check=False,
                timeout=_SECONDS,
                cwd="/",
                env={
                    **os.environ,
                    "LC_ALL": "C",
                    "PATH": f"{os.environ.get('PATH', '')}:{_PATH}",
                    **environment,
                },
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"{complaint}: {command[0]} did not answer within {_SECONDS:.0f} s; check that "
                "its server can be reached."
            ) from error
        printed = [os.fsdecode(os.pread(file.fileno(), 1 << 16, 0)) for file in (err, out)]
    if code not in good:
        text = " ".join((printed[0].strip() or printed[1]).split()) or f"it ended with {code}"
        text = text.removesuffix("dmesg(1) may have more information after failed mount system call.").strip()
        text = text.removeprefix(f"{command[0]}: ").rstrip(".")
        raise UserError(f"{complaint}: {command[0]}: {text}; {cure}.")
    return printed[1]


_PACKAGES = {
    "mount": "mount", "umount": "mount", "losetup": "mount",
    "mkfs.ext4": "e2fsprogs", "resize2fs": "e2fsprogs", "e2fsck": "e2fsprogs",
    "mkfs.xfs": "xfsprogs", "xfs_growfs": "xfsprogs",
    "dmsetup": "dmsetup", "zfs": "zfsutils-linux",
}  # fmt: skip


def mount_at(target: str) -> MountEntry | None:
    """The mount exactly at `target`, or None."""
    parent = os.path.realpath(os.path.dirname(target))
    return mounted_at(f"{parent}/{os.path.basename(target)}")


def run_umount(target: str, what: str) -> None:
    """Run umount(8) if `target` is a mount. Raises UserError when it is busy."""
    for _ in range(16):
        if mount_at(target) is None:
            return
        run_program(("umount", "--", target), f"{what} cannot be unmounted")


def detach(target: str) -> None:
    """Detach a mount that cannot be unmounted because its server is dead; ignores errors."""
    with suppress(OSError):
        umount2(target, MNT_DETACH)
