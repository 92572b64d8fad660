"""What cannot be done to a symlink in a volume."""

from __future__ import annotations

from unionfs.sys.mountinfo import mount_id_of_fd, read_mountinfo

_FOLLOWING = ("fuse.sshfs",)


def can_be_changed(fd: int) -> bool:
    """Whether owner and times of a symlink can be set on the filesystem that `fd` is on.

    SFTP's SETSTAT follows symlinks (draft-ietf-secsh-filexfer-02, 6.9), and sshfs sends it for a symlink too:
    it would change the file that the link leads to, anywhere on the server.
    """
    mount_id = mount_id_of_fd(fd)
    return not any(entry.mount_id == mount_id and entry.fstype in _FOLLOWING for entry in read_mountinfo())
