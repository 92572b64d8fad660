"""Limits of symlinks in a volume on sshfs."""

from __future__ import annotations

from unionfs.sys.mountinfo import mount_id_of_fd, read_mountinfo


def are_sshfs(fd: int) -> bool:
    """Whether the filesystem of `fd` is sshfs.

    Do not set the owner and times of its symlinks: SFTP's SETSTAT follows symlinks
    (draft-ietf-secsh-filexfer-02, 6.9), so it would change the link's target, anywhere on the server. sshfs
    hides symlinks that are absolute or lead up, unless the option no_contain_symlinks is set.
    """
    mount_id = mount_id_of_fd(fd)
    return any(entry.mount_id == mount_id and entry.fstype == "fuse.sshfs" for entry in read_mountinfo())
