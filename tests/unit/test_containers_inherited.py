"""What a container could reach of its caller: keys, and the file of a program, by /proc/PID/exe."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.cli_calls import call
from tests.mount.user_calls import UID
from unionfs.containers.inherited import sealed_copy, unreachable
from unionfs.sys.asuser import run_as
from unionfs.sys.fds import Owned


@pytest.mark.parametrize(
    ("owner", "mode", "is_copied"),
    [
        (UID, 0o755, True), (UID, 0o555, True), (0, 0o757, True), (0, 0o755, False),
        (UID, 0o4755, False), (0, 0o4757, False),
    ],
)  # fmt: skip
def test_which_programs_a_user_copies(
    root: None, area: Path, owner: int, mode: int, is_copied: bool
) -> None:
    """Those that this user could change; a copy of a set-user-id program would not have its rights."""
    program = area / "program"
    program.write_bytes(b"program")
    os.chown(program, owner, owner)
    program.chmod(mode)
    assert run_as(UID, lambda: int(unreachable(str(program)) is not None)) == is_copied


def test_root_uses_a_read_only_mount(root: None, area: Path) -> None:
    program = area / "program"
    program.write_bytes(b"program")
    fd = unreachable(str(program))
    assert fd is not None
    with Owned(fd):
        assert os.path.samestat(os.fstat(fd), program.stat())
        with pytest.raises(OSError, match="Read-only"):
            os.chmod(f"/proc/self/fd/{fd}", 0o700)


def test_nothing_changes_a_copy(tmp_path: Path) -> None:
    """Content, size, and that these stay as they are: F_SEAL_WRITE and the others of fcntl(2)."""
    program = tmp_path / "program"
    content = os.urandom(3_000_000)
    program.write_bytes(content)
    with Owned(sealed_copy(str(program))) as fd:
        assert os.pread(fd, 4_000_000, 0) == content
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        changes: list[Callable[[int], object]] = [
            lambda own: os.pwrite(own, b"x", 0), lambda own: os.truncate(own, 0),
            lambda own: os.truncate(own, 4_000_000), lambda own: fcntl.fcntl(own, fcntl.F_ADD_SEALS, 0),
        ]  # fmt: skip
        with Owned(os.open(f"/proc/self/fd/{fd}", os.O_RDWR)) as own:
            for change in changes:
                with pytest.raises(PermissionError):
                    change(own)


def test_the_keys_of_the_session() -> None:
    """They are found before, and not afterwards: request_key(2)."""
    if shutil.which("keyctl") is None:
        pytest.skip("keyctl is not installed")
    search = 'os.execvp("keyctl", ["keyctl", "search", "@s", "user", "unionfs-test"])'
    joined = f"from unionfs.containers.inherited import join_new_keyring; join_new_keyring(); {search}"
    outcomes = []
    for code in (search, joined):
        script = (
            "keyctl add user unionfs-test secret @s > /dev/null || exit 77; "
            f"exec {sys.executable} -c 'import os; {code}'"
        )
        done = call(("keyctl", "session", "-", "sh", "-c", script))
        if "Operation not permitted" in done.stderr or "not implemented" in done.stderr:
            pytest.skip(done.stderr)
        outcomes.append((done.returncode, "not available" in done.stderr))
    assert outcomes == [(0, False), (1, True)]
