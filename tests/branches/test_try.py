"""`unionfs try` and the commands of branches, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.branches.branching import Branching, differing, killed_before, tree
from tests.mount import cli_calls
from tests.mount.cli_calls import refused
from tests.mount.launcher_calls import LAUNCHER, end_residents, need_launcher, residents
from tests.mount.run_calls import Containers, Terminal
from tests.support import areas, mounting


class TestTry:
    def test_the_command_sees_the_branch_at_its_path(self, filled: Branching) -> None:
        done = filled.unionfs(
            "try", "-n", "br", "--", "sh", "-c",
            f"pwd; echo x > {filled.base}/x; cat {filled.base}/x; cat a; ls {filled.base}",
        )  # fmt: skip
        assert done.stdout.splitlines() == [str(filled.base), "x", "a", "a", "b", "c", "sub", "x"]
        assert "A x" in done.stderr
        assert "branch br: 1 added" in done.stderr
        assert "unionfs branch diff br" in done.stderr
        assert not (filled.base / "x").exists()
        assert filled.stored() == ["branches/br"]
        assert areas.mounts_below(filled.area) == []

    def test_from_a_directory_below(self, filled: Branching) -> None:
        done = filled.unionfs(
            "try", "-q", "--keep", "-n", "br", "-D", filled.base, "--", "pwd", cwd=filled.base / "sub"
        )
        assert (done.stdout, done.stderr) == (f"{filled.base}/sub\n", "")

    def test_the_rest_is_read_only(self, filled: Branching, area: Path) -> None:
        outside = area / "outside"
        outside.mkdir()
        script = f"touch {outside}/x /etc/x; touch /tmp/x /var/tmp/x /dev/shm/x && echo private"
        done = filled.unionfs("try", "--discard", "--", "sh", "-c", script, env={"TMPDIR": "/tmp"})
        assert "touch: cannot touch '/etc/x': Read-only file system" in done.stderr
        assert f"cannot touch '{outside}/x'" in done.stderr
        assert "private" in done.stdout
        assert list(outside.iterdir()) == []
        assert not Path("/tmp/x").exists()
        done = filled.unionfs("try", "--rw", outside, "--", "touch", f"{outside}/x")
        assert done.returncode == 0
        assert (outside / "x").exists()

    def test_hidden(self, filled: Branching, area: Path) -> None:
        secret = area / "secret"
        secret.mkdir()
        (secret / "key").write_text("key")
        done = filled.unionfs(
            "try", "--hide", secret, "--hide", "/etc/hostname", "--", "sh", "-c", f"ls {secret}; cat "
            "/etc/hostname"
        )
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
        refused(filled.unionfs("try", "--hide", area / "none", "--", "true"), "does not exist")

    def test_exit_codes(self, filled: Branching) -> None:
        def code(*words: str) -> int:
            return filled.unionfs("try", "--discard", "--", *words).returncode

        assert code("sh", "-c", "exit 7") == 7
        assert code("sh", "-c", "kill -TERM $$") == 128 + signal.SIGTERM
        assert code("no-such-command") == 127
        assert code("./a") == 126
        program = filled.area / "program"  # which may be in /tmp
        program.write_text("#!/bin/sh\nexit 5\n")
        program.chmod(0o755)
        assert code(str(program)) == (127 if str(program).startswith(("/tmp/", "/var/tmp/")) else 5)
        assert filled.stored() == []

    def test_a_signal_reaches_the_command(self, filled: Branching) -> None:
        script = "trap 'exit 9' TERM; echo; while :; do sleep .1; done"
        process = started(filled, "--discard", "--", "sh", "-c", script)
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            process.terminate()
            assert process.wait(20) == 9

    def test_no_change_leaves_no_branch(self, filled: Branching) -> None:
        done = filled.unionfs("try", "--", "cat", "a")
        assert (done.stdout, done.stderr, done.returncode) == ("a\n", "", 0)
        assert filled.stored() == []

    def test_then(self, filled: Branching) -> None:
        assert filled.unionfs("try", "--commit", "--", "touch", "new").stdout.startswith("committed ")
        assert (filled.base / "new").exists()
        done = filled.unionfs("try", "-n", "br", "--commit", "--", "sh", "-c", "touch other; false")
        assert done.returncode == 1
        assert not (filled.base / "other").exists()
        done = filled.unionfs("try", "-n", "br", "--look", "--", "sh", "-c", "echo line > other")
        assert "+line" in done.stdout
        filled.unionfs("try", "-n", "br", "--discard", "--", "true")
        assert [name for name in filled.stored() if name.startswith("branches")] == []

    def test_several_tries_go_on(self, filled: Branching) -> None:
        filled.tries("echo 1 > new")
        filled.tries("cat new; echo 2 >> new")
        (values,) = json.loads(filled.says("branch", "ls", "--json"))
        assert (values["command"][-1], values["exit_code"]) == ("cat new; echo 2 >> new", 0)
        filled.commit()
        assert (filled.base / "new").read_text() == "1\n2\n"

    def test_the_resident_mounts(self, filled: Branching) -> None:
        need_launcher()
        end_residents()
        assert filled.unionfs("try", "-n", "x", "--", "cat", "a").stdout == "a\n"
        assert len(residents()) == 1
        done = filled.unionfs("try", "--discard", "--", "sh", "-c", "echo > n")
        assert (done.returncode, len(residents())) == (0, 1)
        refused(filled.unionfs("try", "-D", filled.base / "none", "--", "true"), "cannot be used")

    def test_no_network(self, filled: Branching) -> None:
        script = "cat /proc/net/dev | tail -n +3 | cut -d: -f1"
        done = filled.unionfs("try", "--net", "none", "--", "sh", "-c", script)
        assert done.stdout.split() == ["lo"]

    def test_a_report(self, filled: Branching, area: Path) -> None:
        script = "echo > n; rm a; exit 3"
        filled.unionfs("try", "--keep", "--report", area / "report", "--", "sh", "-c", script)
        values = json.loads((area / "report").read_text())
        assert values["exit_code"] == 3
        assert [(item["change"], item["path"]) for item in values["changes"]] == [("D", "a"), ("A", "n")]

    def test_the_question(self, filled: Branching) -> None:
        box = _Box(filled)
        terminal = Terminal(box, "-n", "br", "--", "sh", "-c", "test -t 0 && echo t''ty; echo new > n")
        terminal.wait_for(b"tty")
        terminal.wait_for(b"iscard?")
        terminal.type(b"l\n")
        terminal.wait_for(b"+new")
        terminal.wait_for(b"iscard?")
        terminal.type(b"c\n")
        terminal.wait_for(b"committed br")
        assert terminal.end() == 0
        assert (filled.base / "n").read_text() == "new\n"


def started(filled: Branching, *words: str) -> subprocess.Popen[str]:
    """A `try` that runs."""
    environment = {**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY), "UNIONFS_ROOT": str(filled.root)}
    return subprocess.Popen(
        ["env", "--default-signal", *mounting.command(), "try", *words], cwd=filled.base, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


class _Box(Containers):
    """`Terminal` calls `unionfs run` of one of these."""

    def __init__(self, filled: Branching) -> None:
        self.root = filled.root
        self._base = filled.base

    def words(self, *arguments: str | Path, lower: bool = True) -> list[str | Path]:
        return ["try", "-D", self._base, *arguments]


class TestBranches:
    def test_create_is_mounted(self, filled: Branching, area: Path) -> None:
        place = Path(filled.says("branch", "create", "--base", filled.base, "br").strip())
        (place / "new").write_text("new")
        (place / "a").unlink()
        other = area / "other"
        other.mkdir()
        filled.says("branch", "create", "--base", filled.base, "two", other)
        (other / "b").write_text("two\n")
        assert (place / "b").read_text() == "b\n"
        assert filled.says("branch", "diff", "br").splitlines() == ["D a", "A new"]
        done = filled.unionfs("branch", "commit", "br")
        assert done.stdout == f"committed br to {filled.base}\n"
        assert f"{filled.base} is a lower of the mount at {other}" in done.stderr
        assert areas.mounts_below(place) == []
        filled.says("umount", other)
        assert filled.says("branch", "commit", "two").startswith("committed")
        assert (filled.base / "b").read_text() == "two\n"

    def test_a_mounted_branch_is_refused_by_name(self, filled: Branching, area: Path) -> None:
        place = area / "place"
        place.mkdir()
        filled.says("branch", "create", "--base", filled.base, "br", place)
        for words in ("try -n br -- true", "branch shell br", "branch mount br"):
            done = filled.unionfs(*words.split())
            refused(done, f"branch br is mounted at {place}", f"`unionfs umount {place}`")
        filled.says("umount", place)
        assert filled.tries("true").returncode == 0

    def test_a_second_commit_says_when_the_first_was(self, filled: Branching) -> None:
        filled.tries("echo new > b")
        filled.says("branch", "commit", "br")
        told = filled.says("branch", "commit", "br")
        assert told.startswith(f"nothing to commit: br was committed to {filled.base} at 2")
        assert told.endswith("; `unionfs branch undo` takes that back\n")
        again = json.loads(filled.says("branch", "commit", "--json", "br"))
        assert (again["done"], again["went_on"]) == (True, False)
        assert again["before"] in told
        filled.says("branch", "undo")
        assert json.loads(filled.says("branch", "commit", "--json", "br"))["before"] is None

    def test_a_commit_that_cannot_be_undone_says_so(
        self, filled: Branching, filesystem: Callable[..., Path]
    ) -> None:
        """What it replaces is kept in the store, which cannot be renamed to from another filesystem."""
        base = filesystem("ext4") / "base"
        base.mkdir()
        (base / "a").write_text("a")
        filled.tries("echo more >> a", "br", "-D", base, cwd=base)
        assert filled.says("branch", "commit", "br") == (
            f"committed br to {base}; it cannot be undone: the store is on another filesystem\n"
        )
        assert "cannot be undone, since its base is not on" in str(filled.unionfs("branch", "undo").stderr)

    def test_many_names_take_no_time(self, filled: Branching) -> None:
        """A branch is made without a look at its base: no entry of it is opened or listed."""
        (filled.base / "sub").chmod(0)
        filled.store.create("br", str(filled.base))
        assert os.listdir(filled.root / "branches/br/upper") == []

    def test_nested(self, filled: Branching) -> None:
        """Three deep; each is committed to the one below it."""
        filled.tries("echo 1 > one; rm a; mkdir d; echo d > d/f", "first")
        filled.tries("echo 2 > two; mv one uno; echo x >> d/f", "second", "--from", "first")
        script = "cat uno two; rm b; rm -r d; ln two zwei; setfattr -n user.x -v 1 c"
        filled.tries(script, "third", "--from", "second")
        refused(filled.unionfs("branch", "commit", "first"), "others lie over it")
        refused(filled.unionfs("branch", "discard", "second"), "others lie over it")
        refused(filled.unionfs("try", "-n", "first", "--", "true"), "others lie over it")
        assert filled.says("branch", "diff", "third").splitlines() == [
            "D b", "C c  (xattrs user.x)", "D d/", "A zwei",
        ]  # fmt: skip
        before, shown = tree(filled.base), filled.shown("third")
        targets = {"third": "branch second", "second": "branch first", "first": str(filled.base)}
        for name, target in targets.items():
            assert filled.says("branch", "commit", name) == f"committed {name} to {target}\n"
            if name != "first":
                assert differing(before, tree(filled.base)) == {}
                assert differing(shown, filled.shown(target.split()[1])) == {}
        assert differing(shown, tree(filled.base, links=False)) == {}

    def test_hard_links_of_a_branch_below(self, filled: Branching) -> None:
        """A name that shows its copy by the index of the branch below, which is no longer used."""
        (filled.base / "sub/other").hardlink_to(filled.base / "a")
        filled.tries("echo more >> a", "first")
        done = filled.tries("cat sub/other; echo even more >> sub/other", "second", "--from", "first")
        assert done.stdout == "a\nmore\n"
        filled.says("branch", "commit", "second")
        filled.says("branch", "commit", "first")
        assert (filled.base / "sub/other").read_text() == "a\nmore\neven more\n"

    @pytest.mark.slow
    def test_a_nested_commit_is_killed(self, filled: Branching) -> None:
        """The next command goes on: the parent is mounted again."""
        for step in ("begun", "prepared", "move /two", "set ", "applied", "ending"):
            filled.tries("echo 1 > one; rm a", "first")
            filled.tries("echo 2 > two; mv one uno; rm b; echo x >> c", "second", "--from", "first")
            shown = filled.shown("second")
            killed_before(step, lambda: filled.commit("second"))
            assert filled.commit("second").done, step
            assert differing(shown, filled.shown("first")) == {}, step
            filled.says("branch", "discard", "first")

    @pytest.mark.slow
    def test_a_branch_under_two(self, filled: Branching) -> None:
        filled.tries("echo 1 > one", "first")
        filled.tries("echo 2 > two", "second", "--from", "first")
        filled.tries("echo 3 > three", "third", "--from", "first")
        refused(filled.unionfs("branch", "commit", "second"), "others lie over that, too")
        filled.says("branch", "discard", "third")
        filled.says("branch", "commit", "--into", "first", "second")
        refused(filled.unionfs("branch", "commit", "--into", "other", "first"), "lies over the base")

    @pytest.mark.slow
    def test_three_at_once(self, filled: Branching) -> None:
        """Three processes try and commit on one base at the same time."""
        script = "for n in $(seq 50); do echo $n > sub/$0$n; done; rm $0"
        processes = [
            started(filled, "--commit", "-n", f"br{name}", "--", "sh", "-ec", script, name)
            for name in ("a", "b", "c")
        ]
        for process in processes:
            output = process.communicate(timeout=120)
            assert process.returncode == 0, output
        assert sorted(os.listdir(filled.base)) == ["sub"]
        assert len(os.listdir(filled.base / "sub")) == 150

    def test_the_installed_command_commits(self, filled: Branching) -> None:
        """By the resident; to a branch, which has to be mounted, in a process of its own."""
        need_launcher()

        def commit(*words: str) -> cli_calls.Done:
            environment = {"UNIONFS_ROOT": str(filled.root), "UNIONFS_RESIDENT_SECONDS": "60"}
            program = str(LAUNCHER.parent / "unionfs")
            return cli_calls.call((program, "branch", "commit"), *words, cwd=filled.base, env=environment)

        filled.tries("echo 1 > one; rm a", "first")
        filled.tries("mv one two", "second", "--from", "first")
        for name, target in (("second", "branch first"), ("first", str(filled.base))):
            done = commit(name)
            assert (done.returncode, done.stdout, done.stderr) == (0, f"committed {name} to {target}\n", "")
        assert sorted(os.listdir(filled.base)) == ["b", "c", "sub", "two"]
        assert len(residents()) == 1
        filled.tries("echo branch >> b")
        (filled.base / "b").write_text("base\n")
        done = commit("br")
        assert (done.returncode, done.stdout) == (3, "conflict: b (changed below since)\n")
        refused(commit("none"), "there is no branch none")

    def test_names_and_records(self, filled: Branching) -> None:
        refused(filled.unionfs("branch", "create", "--base", filled.base / "none", "br"), "cannot be used")
        storage = filled.root / "branches"
        storage.mkdir(parents=True, mode=0o700, exist_ok=True)
        refused(filled.unionfs("branch", "create", "--base", storage, "br"), "is in the storage root")
        refused(filled.unionfs("branch", "create", "--base", filled.base, "../br"), "invalid branch name")
        refused(filled.unionfs("branch", "diff", "none"), "there is no branch none")
        refused(filled.unionfs("branch", "undo"), "no commit to undo")
        filled.says("branch", "create", "--no-mount", "--base", filled.base, "br")
        refused(filled.unionfs("branch", "create", "--base", filled.base, "br"), "already exists")
        renamed = json.loads(filled.says("branch", "rename", "--json", "br", "other"))
        assert renamed == {"name": "other", "former": "br"}
        done = filled.unionfs("branch", "shell", "other", env={"SHELL": "/bin/pwd"})
        assert (done.returncode, done.stdout) == (0, f"{filled.base}\n")
        filled.tries("echo > n", "other")
        refused(filled.unionfs("branch", "rm", "other"), "has changes")
        (filled.root / "branches/other/branch.json").write_text("{}")
        refused(filled.unionfs("branch", "diff", "other"), "cannot be used")
        assert filled.unionfs("branch", "ls").returncode == 1
        filled.says("branch", "create", "--no-mount", "--base", filled.base, "br")
        assert json.loads(filled.says("branch", "rm", "--json", "br")) == {"removed": ["br"]}

    def test_hazards(self, filled: Branching) -> None:
        filled.tries("cp /bin/true tool; chmod 4755 tool; mknod null c 1 3")
        done = filled.unionfs("branch", "commit", "--dry-run", "br")
        assert "tool is a set-id program (mode 4755)" in done.stderr
        assert "null is the device 1:3" in done.stderr
        assert done.stdout == "A null\nA tool\n"
        assert not (filled.base / "tool").exists()
