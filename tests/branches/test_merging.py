"""`commit --merge`: texts, and the attributes of each side, with the state that both began with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.branches.branching import Branching, differing, tree

LINES = [f"{number}\n" for number in range(20)]
OURS = "sed -i s/^2$/ours/ t; echo rest > rest"
MERGED = "".join([*LINES[:2], "ours\n", *LINES[3:15], "theirs\n", *LINES[16:]])


@pytest.fixture
def text(branching: Branching) -> Path:
    path = branching.base / "t"
    path.write_text("".join(LINES))
    subprocess.run(["setfattr", "-n", "user.both", "-v", "old", path], check=True)
    return path


def theirs(path: Path, script: str = ":") -> None:
    """Change a line in place, and run a script in its directory."""
    path.write_text("".join([*LINES[:15], "theirs\n", *LINES[16:]]))
    subprocess.run(["sh", "-ec", script], cwd=path.parent, check=True)


def acl(path: Path) -> str:
    return subprocess.run(["getfacl", "-cpE", path], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("only", [["t"], []])
def test_attributes_of_the_base_stay(branching: Branching, text: Path, only: list[str]) -> None:
    branching.tries(OURS)
    theirs(text, "chmod 600 t; chown 1000:1001 t; setfattr -n user.x -v 1 t; setfattr -x user.both t")
    assert branching.commit(conflicts="merge", only=only).merged == [b"/t"]
    st = text.stat()
    assert (text.read_text(), st.st_mode & 0o7777, st.st_uid, st.st_gid) == (MERGED, 0o600, 1000, 1001)
    assert {name: os.getxattr(text, name) for name in os.listxattr(text)} == {"user.x": b"1"}


def test_attributes_of_the_branch_are_committed(branching: Branching, text: Path) -> None:
    branching.tries(f"{OURS}; chmod 640 t; chown 1000 t; setfattr -n user.both -v new t")
    theirs(text, "chgrp 1001 t; setfattr -n user.x -v 1 t")
    branching.commit(conflicts="merge")
    st = text.stat()
    assert (text.read_text(), st.st_mode & 0o7777, st.st_uid, st.st_gid) == (MERGED, 0o640, 1000, 1001)
    assert {name: os.getxattr(text, name) for name in os.listxattr(text)} == {
        "user.x": b"1", "user.both": b"new",
    }  # fmt: skip


@pytest.mark.parametrize("side", ["ours", "theirs", "both"])
def test_acls(branching: Branching, text: Path, side: str) -> None:
    command = "setfacl -m u:1000:rw,g:1001:r t"
    branching.tries(f"{OURS}; {command if side != 'theirs' else ':'}")
    theirs(text, command if side != "ours" else ":")
    (branching.base / "expected").write_text("")
    subprocess.run(["sh", "-ec", command.replace(" t", " expected")], cwd=branching.base, check=True)
    branching.commit(conflicts="merge")
    assert (text.read_text(), acl(text)) == (MERGED, acl(branching.base / "expected"))


@pytest.mark.parametrize(
    ("ours", "others", "what"),
    [
        ("chmod 640 t", "chmod 600 t", "mode"),
        ("chown 1000 t", "chown 1001 t", "owner"),
        ("setfattr -n user.both -v a t", "setfattr -n user.both -v b t", "xattr user.both"),
        ("setfattr -n user.both -v a t", "setfattr -x user.both t", "xattr user.both"),
        ("chmod 640 t", "setfacl -m u:1000:rw t", "mode"),
    ],
)
def test_both_changed_differently(
    branching: Branching, text: Path, ours: str, others: str, what: str
) -> None:
    branching.tries(f"{OURS}; {ours}")
    theirs(text, others)
    before = tree(branching.base)
    done = branching.unionfs("branch", "commit", "--merge", "br")
    assert (done.returncode, done.stdout) == (3, f"conflict: t ({what} changed differently below since)\n")
    assert differing(before, tree(branching.base)) == {}


def test_the_rest_does_not_take_it_back(branching: Branching, text: Path) -> None:
    branching.tries(OURS)
    theirs(text)
    branching.commit(conflicts="merge", only=["t"])
    assert branching.says("branch", "diff", "br") == "A rest\n"
    assert branching.shown()[b"t"][7] == tree(branching.base)[b"t"][7]
    assert branching.commit().conflicts == []
    assert text.read_text() == MERGED


def test_the_original_is_that_of_the_last_commit(branching: Branching, text: Path) -> None:
    """A second change begins with what was committed, and a hand's return to the first text is a change."""
    branching.tries(OURS)
    branching.commit(only=["t"])
    branching.tries("sed -i s/^18$/again/ t")
    text.write_text("".join(LINES))
    assert branching.commit(conflicts="merge").merged == [b"/t"]
    assert text.read_text() == "".join([*LINES[:18], "again\n", LINES[19]])


def test_no_original_of_a_base_that_has_changed(branching: Branching, text: Path) -> None:
    """The branch's text began with another one: taken for the original, it would undo the base's change."""
    branching.tries("chmod 600 t")
    theirs(text)
    branching.tries("sed -i s/^2$/ours/ t")
    assert [path for _, path in branching.commit(conflicts="merge").conflicts] == [b"/t"]
    assert "theirs" in text.read_text()


@pytest.mark.parametrize("other", ["e", "z"])
def test_names_of_one_file_are_not_merged(branching: Branching, text: Path, other: str) -> None:
    branching.tries(f"{OURS}; ln t {other}")
    theirs(text)
    result = branching.commit(conflicts="merge")
    what = "changed, not merged: the branch has other names (links) of it"
    assert (result.done, result.merged, result.conflicts) == (False, [], [(what, b"/t")])
    assert text.read_text() == "".join([*LINES[:15], "theirs\n", *LINES[16:]])
