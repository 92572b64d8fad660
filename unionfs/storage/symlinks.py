"""What cannot be done to symlinks in a volume on sshfs."""

from __future__ import annotations

from unionfs.sys.mountinfo import mount_id_of_fd, read_mountinfo


def are_sshfs(fd: int) -> bool:
    """Whether symlinks on the filesystem of `fd` are those of sshfs.

    Their owner and times must not be set: SFTP's SETSTAT follows symlinks (draft-ietf-secsh-filexfer-02,
    6.9), so it would change the file that the link leads to, anywhere on the server. And those that are
    absolute or lead up are not shown, unless it is told so (its option no_contain_symlinks).
    """
    mount_id = mount_id_of_fd(fd)
    return any(entry.mount_id == mount_id and entry.fstype == "fuse.sshfs" for entry in read_mountinfo())
