"""Limits of symlinks in a volume on sshfs."""

from __future__ import annotations

from unionfs.sys.mountinfo import mount_id_of_fd, mount_of_id


def are_sshfs(fd: int) -> bool:
    """Whether the filesystem of `fd` is sshfs.

    Do not set the owner and times of its symlinks: SFTP's SETSTAT follows symlinks
    (draft-ietf-secsh-filexfer-02, 6.9), so it would change the link's target, anywhere on the server. sshfs
    hides symlinks that are absolute or lead up, unless the option no_contain_symlinks is set.
    """
    mount = mount_of_id(mount_id_of_fd(fd))
    return mount is not None and mount.fstype == "fuse.sshfs"
