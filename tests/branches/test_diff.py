"""`unionfs branch diff`: what a reviewer decides by."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.branches.branching import Branching
from tests.branches.test_try import _Box
from tests.mount.run_calls import Terminal

INVALID = b"\xff\x80"
NAMES = [b"plain", b"with space", b"new\nline", b'"quoted"', b"back\\slash", INVALID, "grün".encode(),
         b"tab\tname", b"bell\a\b\v\f\r", b"esc\x1b[31m", b"del\x7f"]  # fmt: skip


def lines_of(filled: Branching, *words: str) -> list[str]:
    return filled.says("branch", "diff", *words, "br").splitlines()


def test_what_changes(filled: Branching) -> None:
    filled.tries(
        "echo more >> a; chmod 0600 b; chown 5:6 c; mv sub dir; mkdir __pycache__; echo > "
        "__pycache__/x.pyc; "
        "ln -s a link; head -c 99 /dev/zero > bin"
    )
    assert lines_of(filled) == [
        "C a  (content)", "C b  (mode 0644 -> 0600)", "A bin", "C c  (owner 0:0 -> 5:6)", "R sub -> dir/",
        "A link -> a", "and 2 in caches and temporary directories; --all lists them",
    ]  # fmt: skip
    text = filled.says("branch", "diff", "--content", "br")
    assert "--- a/a\n+++ b/a\n@@ -1 +1,2 @@\n a\n+more\n" in text
    assert "new: 99 bytes, sha256 " in text
    assert "1 lines added" in filled.says("branch", "diff", "--stat", "br")
    values = json.loads(filled.says("branch", "diff", "--json", "--all", "br"))
    added = [item["path"] for item in values if item["change"] == "A"]
    assert added == ["__pycache__", "__pycache__/x.pyc", "bin", "link"]
    (owner,) = [item for item in values if item["path"] == "c"]
    assert (owner["what"], owner["old"]["uid"], owner["new"]["uid"]) == (["owner"], 0, 5)
    assert next(item["what"] for item in values if item["path"] == "a") == ["content", "times"]
    assert filled.says("branch", "diff", "--only", "a", "--except", "b", "br") == "C a  (content)\n"
    done = filled.unionfs("branch", "diff", "--json", "br")
    assert len(json.loads(done.stdout)) == len(values) - 2
    assert done.stderr == (
        "unionfs: 2 changes in caches and temporary directories are left out; --all lists them.\n"
    )


def test_content_or_only_times(filled: Branching) -> None:
    """What was copied up with the same content is none; a change of the same size is one."""
    (filled.base / "old").write_text("same size\n")
    os.utime(filled.base / "old", (10**9, 10**9))
    filled.tries("touch a; cp b x; cat x > b; printf 'C\\n' > c; touch -r old ref; echo 'SAME SIZE' > old; "
                 "touch -r ref old; rm x ref")  # fmt: skip
    assert lines_of(filled) == ["C a  (times)", "C b  (times)", "C c  (content)", "C old  (content)"]
    # Back again, as in the story of a reviewed run.
    filled.tries("echo c > c; echo 'same size' > old; touch -d @1000000000 old")
    assert lines_of(filled) == ["C a  (times)", "C b  (times)", "C c  (times)"]


def test_what_is_added(filled: Branching) -> None:
    (filled.base / "d").symlink_to("a")
    filled.tries(
        "cp /bin/true s; chmod 4755 s; chown 7:8 s; chmod 4755 s; cp /bin/true x; chmod 755 x; cp a plain; "
        "mkdir dir open; chmod 1777 open; ln -s /etc/shadow l; ln -s 'a b' sub/m; mknod null c 1 3; "
        "mkfifo pipe; chmod 600 pipe; rm b; ln -s /etc b; ln -sfn c d; cp a wide; chmod 666 wide; "
        "cp /bin/true cap; setcap cap_net_raw+ep cap"
    )
    assert lines_of(filled) == [
        "C b -> /etc  (file -> symlink, mode 0644 -> 0777)",
        "A cap  (mode 0755, xattrs security.capability)", "C d  (target a -> c)", "A dir/",
        "A l -> /etc/shadow", "A null  (character device)", "A open/  (mode 1777)",
        "A pipe  (fifo)", "A plain", "A s  (mode 4755, owner 7:8)", "A sub/m -> 'a b'",
        "A wide  (mode 0666)", "A x  (mode 0755)",
    ]  # fmt: skip


def test_renamed_files(filled: Branching) -> None:
    filled.tries("mv a sub/z; mv b y; echo changed >> y")
    assert lines_of(filled) == ["D b", "R a -> sub/z", "A y"]


def test_a_renamed_object_with_other_attributes(filled: Branching) -> None:
    (filled.base / "sub/in").write_text("in\n")
    filled.tries("mv a z; chown 7:8 z; mv sub dir; chmod 0700 dir; setfattr -n user.x -v 1 dir")
    assert lines_of(filled) == [
        "R sub -> dir/  (mode 0755 -> 0700, xattrs user.x)", "R a -> z  (owner 0:0 -> 7:8)",
    ]  # fmt: skip


def test_names_of_one_file(filled: Branching) -> None:
    """Every name has the attributes that the branch shows, also one that only the base has."""
    os.link(filled.base / "a", filled.base / "other")
    os.utime(filled.base / "a", (10**9, 10**9))
    filled.tries("ln a third; echo more >> third")
    values = json.loads(filled.says("branch", "diff", "--json", "br"))
    assert [(item["change"], item["path"]) for item in values] == [("C", "a"), ("C", "other"), ("A", "third")]
    (new,) = {(item["new"]["size"], item["new"]["mtime_ns"]) for item in values}
    assert new[0] == 7
    assert new[1] > 10**18
    assert {(item["old"]["size"], item["old"]["mtime_ns"]) for item in values[:2]} == {(2, 10**18)}
    assert lines_of(filled) == ["C a  (content)", "C other  (content)", "A third"]


def test_names_are_quoted_as_by_git(filled: Branching, area: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    repository = area / "repository"
    repository.mkdir()
    for place in (repository, filled.base):
        for name in NAMES:
            (Path(os.fsdecode(os.fsencode(place) + b"/" + name))).write_text("old\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    script = "for f in *; do echo new > \"$f\"; done"
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=repository, check=True)
    subprocess.run(["sh", "-ec", script], cwd=repository, check=True)
    expected = ""
    # What is not UTF-8 is quoted as by default, so that it cannot change a terminal.
    for quotes, names in (("off", [":!" + os.fsdecode(INVALID)]), ("on", [INVALID])):
        expected += subprocess.run(
            [*git, "-c", f"core.quotePath={quotes}", "diff", "--", *names], cwd=repository, check=True,
            capture_output=True, text=True, errors="surrogateescape",
        ).stdout  # fmt: skip
    filled.tries('for f in *; do test -d "$f" || echo new > "$f"; done')
    found = filled.says("branch", "diff", "--content", "--except", "[abc]", "br")

    def headers(text: str) -> list[str]:
        return sorted(line for line in text.split("\n") if line.startswith(("--- ", "+++ ")))

    assert headers(found) == headers(expected)
    assert len(headers(found)) == 2 * len(NAMES)


def test_a_name_forges_nothing_on_a_terminal(filled: Branching) -> None:
    filled.tries("printf 'x\\n' > \"$(printf 'n\\n+++ b')\"")
    terminal = Terminal(_Box(filled), "-n", "br", "--look", "--", "true")
    text = terminal.wait_for(b"kept as branch")
    terminal.end()
    assert b'+++ "b/n\\n+++ b"' in text
    assert b"\n+++ b\r" not in text
