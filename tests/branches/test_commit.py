"""A commit produces the tree that the branch showed, the same as running its commands directly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.branches.branching import Branching, differing, directly, tree

FILL = """
mkdir -p src/deep/er lib docs empty; umask 022
for n in 1 2 3 4 5; do echo line $n > src/file$n; echo deep $n > src/deep/er/f$n; done
echo text > docs/page; ln -s page docs/link; ln src/file1 src/other1; ln src/file2 lib/other2
mkfifo lib/pipe; printf '#!/bin/sh\\n' > lib/run; chmod 4755 lib/run; chmod 0750 lib
truncate -s 1M lib/sparse; printf end >> lib/sparse
setfattr -n user.note -v base docs/page; setfattr -n user.dir -v base docs
touch -d 2001-02-03 src/file3 docs; printf 'odd\\n' > "$(printf 'new\\nline')"
"""

SCRIPTS = {
    "content": "echo more >> src/file1; echo new > src/file3; echo all > docs/page",
    "new": "mkdir -p a/b/c; echo x > a/b/c/f; ln -s ../x a/l; mkfifo a/p; cp -a src a/copy",
    "removed": "rm -r src/deep docs/link lib/pipe; rmdir empty",
    "replaced": "rm -r src; mkdir src; echo only > src/one; rm docs/page; mkdir docs/page; echo in > "
    "docs/page/in",
    "to-file": "rm -r src; echo file > src; rm docs/link; echo plain > docs/link",
    "renamed": "mv src sources; mv docs/page docs/paper; mv sources/deep lib/deep; echo x >> lib/deep/er/f1",
    "renamed-deep": "mv src lib/moved; echo x >> lib/moved/deep/er/f1; rm lib/moved/deep/er/f2; chmod 0700 "
    "lib/moved/deep; mkdir lib/moved/n; echo n > lib/moved/n/n; mv lib/moved/deep/er/f3 lib/moved/up; rm -r "
    "empty; mkdir src; echo again > src/file1; mv docs papers; rm -r lib/moved/deep/er; "
    "mkdir lib/moved/deep/er",
    "exchanged": "mv src t; mv lib src; mv t lib; echo z > src/z; rm lib/file4",
    "attributes": "chmod 0700 docs src/file2; chown 1:2 src/file4 lib; touch -d 1999-01-01 src/file5 empty",
    "xattrs": "setfattr -n user.note -v new docs/page; setfattr -x user.dir docs; setfattr -n user.d "
    "-v 1 src; "
              "setfattr -n user.t -v 2 src/file1",
    "acls": "setfacl -m u:1000:rwx docs/page; setfacl -d -m g:1001:rx docs; setfacl -m u:3:r src/file4",
    "links": "ln src/file3 docs/third; ln src/deep/er/f1 f1; rm src/other1; ln lib/other2 lib/again",
    "sparse": "truncate -s 5M big; printf x | dd of=big bs=1 seek=3000000 conv=notrunc; printf y >> "
    "lib/sparse",
    "devices": "mknod null c 1 3; chmod 0640 null; mknod disk b 7 1; python3 -c \"import socket; "
               "socket.socket(socket.AF_UNIX).bind('sock')\"",
    "set-id": "chmod 2755 docs; cp -p lib/run run; chmod 6711 run; cp /bin/true cap; setcap "
    "cap_net_raw+ep cap",
    "names": "printf x > \"$(printf 'a\\nb')\"; printf y > \"$(printf '\\377\\376')\"; rm \"$(printf "
    "'new\\nline')\"; "
             "mkdir ' '; echo > ' /-rf'",
}  # fmt: skip


def fill(directory: Path) -> None:
    subprocess.run(["sh", "-ec", FILL], cwd=directory, check=True)


PLAIN = ("new", "attributes", "xattrs", "acls", "sparse", "devices", "set-id", "names")
"""These have nothing to do with each other, and are also done at once."""
ALL = {"at once": "; ".join(SCRIPTS[name] for name in PLAIN), **SCRIPTS}
QUICK = ("at once", "replaced", "renamed", "renamed-deep")


@pytest.mark.parametrize(
    "script",
    [pytest.param(ALL[name], id=name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL],
)
def test_the_tree_is_that_of_the_command(branching: Branching, area: Path, script: str) -> None:
    if "setcap" in script and shutil.which("setcap", path="/usr/sbin:/sbin") is None:
        pytest.skip("setcap is not installed")
    fill(branching.base)
    before = tree(branching.base)
    branching.tries(script)
    assert differing(before, tree(branching.base)) == {}
    shown = branching.shown()
    result = branching.commit()
    assert (result.done, result.conflicts) == (True, [])
    assert differing(shown, tree(branching.base, links=False)) == {}
    assert differing(directly(area, fill, script), tree(branching.base, times=False)) == {}
    branching.says("branch", "undo")
    assert differing(before, tree(branching.base)) == {}
    assert branching.stored() == ["branches/br"]
    # And again: the undone branch is as it was.
    assert differing(shown, branching.shown()) == {}
    assert branching.commit().conflicts == []
    assert differing(shown, tree(branching.base, links=False)) == {}


def test_what_is_still_written_to_is_copied(branching: Branching) -> None:
    """A file that a process has open in the branch's mount, which was detached, is not the base's file."""
    (branching.base / "a").write_text("base\n")
    place = Path(branching.says("branch", "create", "--base", branching.base, "br").strip())
    with (place / "a").open("w") as held:
        held.write("branch\n")
        held.flush()
        os.fsync(held.fileno())
        branching.says("umount", "--lazy", place)
        branching.commit()
        held.write("later\n")
        held.flush()
        os.fsync(held.fileno())
        assert (branching.base / "a").read_text() == "branch\n"


def test_a_renamed_directory_is_renamed(branching: Branching) -> None:
    """It is the same directory afterwards, with the same files, whatever its size; undo renames it back."""
    fill(branching.base)
    old = {path: os.stat(branching.base / path).st_ino for path in ("src", "src/file3", "src/deep", "docs")}
    branching.tries("mv src sources; echo x >> sources/deep/er/f1; mkdir new; mv docs new/docs")
    assert "R src -> sources/" in branching.says("branch", "diff", "br")
    shown = branching.shown()
    branching.commit()
    assert differing(shown, tree(branching.base, links=False)) == {}
    for path in ("src", "src/file3", "src/deep"):
        assert os.stat(branching.base / path.replace("src", "sources")).st_ino == old[path], path
    (branching.base / "sources/file5").write_text("later\n")
    (branching.base / "sources/later").write_text("later\n")
    branching.says("branch", "undo")
    assert (branching.base / "src/later").exists()
    assert (branching.base / "src/file5").read_text() == "later\n"
    assert {path: os.stat(branching.base / path).st_ino for path in old} == old


class TestHardLinksOfARenamedDirectory:
    """A name in a renamed directory is one file with another, which the branch changes."""

    @pytest.fixture
    def linked(self, branching: Branching) -> Branching:
        for name in ("one", "other"):
            (branching.base / name).mkdir()
        (branching.base / "one" / "f").write_text("old\n")
        os.link(branching.base / "one" / "f", branching.base / "other" / "l")
        branching.tries("mv other moved; echo new > one/f")
        return branching

    def test_commit(self, linked: Branching) -> None:
        linked.commit()
        texts = [(linked.base / name).read_text() for name in ("one/f", "moved/l")]
        assert texts == ["new\n", "new\n"]
        assert (linked.base / "one/f").samefile(linked.base / "moved/l")

    def test_a_branch_of_the_branch(self, linked: Branching) -> None:
        done = linked.tries("cat one/f moved/l", "child", "--from", "br")
        assert done.stdout == "new\nnew\n"


@pytest.mark.slow
def test_a_tree_deeper_than_the_stack(branching: Branching) -> None:
    """A commit and its undo of directories whose path is longer than PATH_MAX, of which not all are open."""
    script = "import os\nfor _ in range(1000): os.mkdir('dir'); os.chdir('dir')"
    words = ["try", "-q", "--rw", sys.prefix, "--keep", "-n", "br", "--", sys.executable, "-c", script]
    assert branching.unionfs(*words, timeout=300).returncode == 0
    done = branching.unionfs("branch", "commit", "br", timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found = subprocess.run(["find", branching.base, "-type", "d"], check=True, capture_output=True)
    assert found.stdout.count(b"\n") == 1001
    branching.says("branch", "undo", timeout=300)
    assert os.listdir(branching.base) == []


def test_hard_links_at_a_long_path(branching: Branching) -> None:
    """A renamed directory is copied by a commit of a part: also links whose path is longer than PATH_MAX."""
    here = os.open(branching.base, os.O_RDONLY)
    try:
        for name in ["top", *["d" * 200] * 25]:
            os.mkdir(name, dir_fd=here)
            below = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(os.open("one", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.link("one", "two", src_dir_fd=here, dst_dir_fd=here)
    finally:
        os.close(here)
    branching.tries("mv top new; touch other")
    branching.says("branch", "commit", "--only", "new", "--only", "top", "br")
    words = ["find", branching.base / "new", "-type", "f", "-printf", "%i %f\\n"]
    found = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    assert sorted(found[1::2]) == ["one", "two"]
    assert found[0] == found[2]
    assert os.listdir(branching.base) == ["new"]
