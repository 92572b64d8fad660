"""The filesystem stressors of stress-ng, which verify what they have done."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.mounting import mounted
from tests.support.patience import patient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("root"),
    pytest.mark.skipif(shutil.which("stress-ng") is None, reason="stress-ng is missing"),
]

# Without those that have their own filesystems, and those of other subjects (fanotify, ioprio, procfs).
STRESSORS = (
    "access", "aio", "chattr", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany",
    "dnotify", "dup", "fallocate", "fcntl", "fiemap", "file-ioctl", "filename", "flock", "fpunch", "fsize",
    "fstat", "getdent", "handle", "hdd", "inode-flags", "inotify", "io", "iomix", "lease", "link", "locka",
    "lockf", "lockofd", "mknod", "mmap", "open", "readahead", "rename", "revio", "seek", "sendfile", "splice",
    "symlink", "sync-file", "touch", "utime", "verity", "vm-splice", "xattr",
)  # fmt: skip


def _stress(directory: Path, stressor: str) -> tuple[int, str]:
    """The exit code and what was printed. Two processes for two seconds."""
    words = ["stress-ng", "--temp-path", str(directory), f"--{stressor}", "2", "--timeout", "2", "--verify"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=patient(300), check=False, cwd="/")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.watchdog(900)
@pytest.mark.timeout(1800)
def test_each_verifies_its_work(area: Path, session: str) -> None:
    """With the result that it has on the upper's filesystem."""
    for name in ("lower", "upper", "work", "native"):
        (area / name).mkdir()
    failed = {}
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        for stressor in STRESSORS:
            code, printed = _stress(mount.mountpoint, stressor)
            if code and code != _stress(area / "native", stressor)[0]:
                failed[stressor] = f"{code}: {printed}"
        for directory in (mount.mountpoint, area / "native"):  # the stressor of chattr may leave a file
            subprocess.run(["chattr", "-R", "-f", "-i", "-a", directory], check=False)
        assert failed == {}
