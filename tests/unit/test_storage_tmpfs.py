"""Making a tmpfs in difficult cases: without root, and on kernels that lack options."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pytest

from unionfs.errors import UserError
from unionfs.settings.specs import TmpfsOptions
from unionfs.storage import tmpfs
from unionfs.sys import detached

Parameters = Sequence[tuple[str, str]]


def refusing(monkeypatch: pytest.MonkeyPatch, code: int, *names: str) -> list[dict[str, str]]:
    """Let the kernel refuse every filesystem with one of these options (or all, without names)."""
    calls: list[dict[str, str]] = []

    def make(fstype: str, parameters: Parameters, attributes: int = 0) -> int:
        calls.append(dict(parameters))
        if not names or set(names) & set(calls[-1]):
            raise OSError(code, os.strerror(code))
        return 99

    monkeypatch.setattr(detached, "new_filesystem", make)
    return calls


def test_a_kernel_without_noswap(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = refusing(monkeypatch, errno.EINVAL, "noswap")
    assert tmpfs.make(TmpfsOptions(size="1"), owner="a tmpfs") == 99
    assert [sorted(call) for call in calls] == [["noswap", "size", "source"], ["size", "source"]]
    with pytest.raises(UserError, match="a tmpfs cannot be made: invalid argument"):
        tmpfs.make(TmpfsOptions(swap=False), owner="a tmpfs")
    calls.clear()
    assert tmpfs.make(TmpfsOptions(swap=True), owner="a tmpfs") == 99
    assert [sorted(call) for call in calls] == [["source"]]


def test_without_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, errno.EPERM)

    def forbidden(flags: int) -> None:
        raise OSError(errno.ENOSPC, "the limit is reached")

    monkeypatch.setattr(tmpfs, "unshare", forbidden)
    with pytest.raises(UserError) as caught:
        tmpfs.make(TmpfsOptions(), owner="the tmpfs for the upper")
    sentence = str(caught.value)
    assert sentence.startswith("the tmpfs for the upper cannot be made without root: no user namespace can ")
    assert sentence.endswith("or run as root.")
