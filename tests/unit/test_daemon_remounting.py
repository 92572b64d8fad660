"""The flags of `mount -o remount`."""

from __future__ import annotations

import pytest

from unionfs.daemon.remounting import flags_of, is_remount
from unionfs.sys.remount import FLAGS, READ_ONLY


def test_what_is_a_remount() -> None:
    """Whatever else the arguments of `-o` have."""
    assert is_remount(["remount"])
    assert is_remount(["lowerdir=/l", "ro,remount"])
    assert not is_remount(["lowerdir=remount", "ro"])
    assert not is_remount([])


@pytest.mark.parametrize(
    ("positive", "negative"),
    [("rw", "ro"), ("suid", "nosuid"), ("dev", "nodev"), ("exec", "noexec"), ("async", "sync"),
     ("symfollow", "nosymfollow"), ("atime", "noatime"), ("diratime", "nodiratime"),
     ("norelatime", "relatime"), ("nostrictatime", "strictatime"), ("nolazytime", "lazytime")],
)  # fmt: skip
def test_the_last_word_counts(positive: str, negative: str) -> None:
    flag = FLAGS[negative]
    assert flag
    assert flags_of([negative]) == flags_of([f"{positive},{negative}"]) == flag
    assert flags_of([positive, negative]) == flag
    assert flags_of([positive]) == flags_of([f"{negative},{positive}"]) == flags_of([negative, positive]) == 0


def test_flags_are_added_up() -> None:
    """What is none is ignored."""
    options = ["remount,lowerdir=/l,nosuid", "ro,unknown", "noexec,exec"]
    assert flags_of(options) == FLAGS["nosuid"] | READ_ONLY
    assert flags_of([]) == 0
