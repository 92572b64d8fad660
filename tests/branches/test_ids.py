"""`try -D /` of an ordinary user with subordinate ids: uid 0 of a user namespace with many owners."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.branches.systems import CONTROL, System, look, make_package, system
from tests.mount.cli_calls import REPOSITORY, Done
from tests.support.patience import patient

UID = 4321
FIRST = {"uid": 200_000, "gid": 300_000}
ENTER = """
cd "$1"; shift
mount --bind srv/fuse dev/fuse
mkdir -p srv/former; pivot_root . srv/former; umount -l srv/former
cd "$HOME"; exec setpriv --reuid "$0" --regid "$0" --clear-groups -- "$@"
"""
KILLED = """
import os, sys
from unionfs.branches import apply
from unionfs.cli.main import main
step = sys.argv.pop(1)
apply.set_hook(lambda seen: os.kill(os.getpid(), 9) if seen.startswith(step) else None)
sys.exit(main())
"""


class Someone:
    """An ordinary user of a system, whose home is on its root filesystem, as is the store."""

    def __init__(self, host: System) -> None:
        self.host = host
        self.home = host.root / "home/someone"
        self._enter("passwd", f"someone:x:{UID}:{UID}::/home/someone:/bin/sh\n")
        self._enter("group", f"someone:x:{UID}:\n")
        for kind, first in FIRST.items():
            self._enter(f"sub{kind}", f"someone:{first}:65536\n")
        self.home.mkdir(parents=True)
        os.chown(self.home, UID, UID)
        os.mknod(host.root / "srv/fuse", 0o20666, os.makedev(10, 229))
        (host.root / "srv/fuse").chmod(0o666)
        for path in {REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)}:
            for above in path.parents:
                inside = host.root / str(above)[1:]
                inside.chmod(inside.stat().st_mode | 0o111)  # in the layer

    def _enter(self, name: str, line: str) -> None:
        path = self.host.root / "etc" / name
        text = "" if name.startswith("sub") else path.read_text()
        path.write_text(text + line)

    def run(self, *words: str) -> Done:
        return subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-ec", ENTER, str(UID), str(self.host.root),
             *words],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=patient(240),
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "PYTHONPATH": str(REPOSITORY),
                 "HOME": "/home/someone", "UNIONFS_RESIDENT_SECONDS": "0", "LC_ALL": "C.UTF-8",
                 "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip

    def calls(self, *words: str) -> Done:
        return self.run(sys.executable, "-m", "unionfs", *words)

    def says(self, *words: str) -> str:
        done = self.calls(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def tries(self, script: str, name: str = "br") -> Done:
        done = self.calls("try", "--keep", "-n", name, "-D", "/", "--", "sh", "-ec", script)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done

    def refused(self, *words: str) -> str:
        done = self.calls(*words)
        assert (done.returncode, done.stdout) == (1, ""), (words, done.stdout)
        return done.stderr

    def files(self) -> dict[str, tuple[int, int, int, bytes]]:
        """Owner, mode and content of what the home has, without the store."""
        found = {}
        for path in sorted(self.home.rglob("*")):
            if ".local" not in path.parts:
                st = path.lstat()
                content = path.read_bytes() if path.is_file() else b""
                found[str(path.relative_to(self.home))] = (st.st_uid, st.st_gid, st.st_mode, content)
        return found

    def stored(self) -> list[str]:
        store = self.home / ".local/share/unionfs"
        found = [path.name for part in ("branches", "commits") for path in (store / part).iterdir()]
        return sorted(name for name in found if name not in ("lock", "last.json"))


@pytest.fixture
def someone(root: None, area: Path) -> Iterator[Someone]:
    for program in ("newuidmap", "newgidmap", "pivot_root"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed")
    if any(UID in (one.pw_uid, one.pw_gid) for one in pwd.getpwall()):
        pytest.skip(f"the id {UID}, which these tests use, is somebody's on this host")
    with system(area / "host") as host:
        yield Someone(host)


CHANGES = """
id -u; cut -d: -f1 /etc/passwd > /dev/null
echo mine > ~/mine; mkdir ~/dir; echo in > ~/dir/in
echo his > ~/his; chown 42:43 ~/his; mkdir -m 0700 ~/closed; echo in > ~/closed/in; chown -R 7:8 ~/closed
chown 9 /etc/hostname; chown nobody:nogroup /etc/hosts
stat -c '%n %u:%g' ~/mine ~/his ~/closed /etc/hostname /etc/hosts /etc/services
setpriv --reuid 42 --clear-groups sh -c '! echo x > ~/mine; ! ls ~/closed; echo x >> ~/his' 2> /dev/null
"""


def test_owners(someone: Someone) -> None:
    for name in ("hostname", "hosts"):
        (someone.host.root / "etc" / name).write_text("old\n")
    before = someone.files()
    done = someone.tries(CHANGES)
    home = "/home/someone"
    assert done.stdout.splitlines() == [
        "0", f"{home}/mine 0:0", f"{home}/his 42:43", f"{home}/closed 7:8", "/etc/hostname 9:0",
        "/etc/hosts 0:0", "/etc/services 0:0",
    ]  # fmt: skip
    assert someone.files() == before
    # The layer has this host's ids.
    layer = someone.home / ".local/share/unionfs/branches/br/upper/home/someone"
    owner = (layer / "his").stat()
    assert (owner.st_uid, owner.st_gid) == (FIRST["uid"] + 41, FIRST["gid"] + 42)
    assert (layer / "mine").stat().st_uid == UID
    lines = someone.says("branch", "diff", "br").splitlines()
    assert {"A home/someone/closed/in", "C etc/hostname  (owner 0:0 -> 9:0)"} <= {*lines}
    assert not any(line.startswith("C home") or "etc/services" in line for line in lines)
    content = json.loads(someone.says("branch", "diff", "--content", "--json", "br"))
    (his,) = [item for item in content if item["path"] == "home/someone/his"]
    assert (his["new"]["uid"], his["new"]["gid"]) == (42, 43)
    assert "+x" in his["diff"]


def test_commit_undo_and_discard(someone: Someone) -> None:
    roots = someone.home / "roots"
    roots.write_text("root\n")
    someone.tries(f"{CHANGES}echo more >> ~/roots")
    before = someone.files()
    # What only root could do is a sentence, and nothing is done.
    text = someone.refused("branch", "commit", "--only", "home", "br")
    assert "home/someone/closed and 2 more belong to other ids of the branch's user namespace" in text
    assert someone.files() == before
    dry = someone.calls("branch", "commit", "--dry-run", "br")
    assert "belong to other ids" in dry.stderr
    someone.tries("chown root:root /etc/hostname; echo new > /etc/hostname")
    text = someone.refused("branch", "commit", "--except", "home", "br")
    assert "branch br cannot be committed: etc/hostname: permission denied; everything was put back" in text
    assert someone.files() == before

    done = someone.calls(
        "branch", "commit", "--only", "home/someone", "--except", "his", "--except", "closed", "br"
    )
    assert (done.returncode, done.stdout) == (0, "committed br to /\n"), done.stderr
    assert "home/someone/roots belongs to another user, not to you" in done.stderr
    after = someone.files()
    assert set(after) - set(before) == {"mine", "dir", "dir/in"}
    assert {found[:2] for found in after.values()} == {(UID, UID)}
    assert after["roots"][3] == b"root\nmore\n"
    someone.says("branch", "undo")
    assert someone.files() == before
    assert someone.stored() == ["br"]
    someone.says("branch", "discard", "br")
    assert someone.stored() == []


def test_nested(someone: Someone) -> None:
    someone.tries("echo 1 > ~/one; chown 7 ~/one", "one")
    text = someone.refused("branch", "create", "--from", "one", "two")
    assert "run them by `unionfs branch shell two`" in text
    assert someone.stored() == ["one"]
    done = someone.calls(
        "try", "--commit", "-n", "two", "--from", "one", "--", "sh", "-ec",
        "stat -c %u ~/one; echo 2 >> ~/one; chown 8 ~/one",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "7\ncommitted two to branch one\n"), done.stderr
    assert someone.tries("stat -c %u ~/one; cat ~/one", "one").stdout == "8\n1\n2\n"
    someone.says("branch", "undo")
    someone.says("branch", "discard", "two")
    assert someone.tries("stat -c %u ~/one", "one").stdout == "7\n"
    someone.says("branch", "discard", "one")
    assert someone.stored() == []


def test_a_killed_commit_goes_on(someone: Someone) -> None:
    (someone.home / "a").write_text("old\n")
    os.chown(someone.home / "a", UID, UID)
    before = someone.files()
    someone.tries("echo new > ~/a; mkdir ~/d; echo b > ~/d/b")
    someone.says("try", "-q", "--keep", "-n", "plain", "-D", "/home/someone", "--", "touch", "plain")
    for step in ("begun", "prepared", "move /home/someone/d", "applied", "ending", "branch moved", "ended"):
        done = someone.run(sys.executable, "-c", KILLED, step, "branch", "commit", "br")
        assert done.returncode == -9, (step, done)
        if step == "move /home/someone/d":
            # Another branch's commit leaves it alone.
            someone.says("branch", "commit", "plain")
            assert "undid the commit of plain" in someone.says("branch", "undo")
            assert "br" in someone.stored()
        someone.says("branch", "commit", "br")
        assert someone.files()["a"][3] == b"new\n"
        assert someone.files()["d/b"] == (UID, UID, 0o100644, b"b\n")
        assert "undid the commit of br" in someone.says("branch", "undo")
        assert someone.files() == before, step


def test_without_subordinate_ids(someone: Someone) -> None:
    (someone.host.root / "etc/subuid").write_text("someone:200000:1000\n")
    done = someone.tries("id -u; touch ~/x; ! chown 1 ~/x")
    assert done.stdout == "0\n"
    assert (
        "unionfs: the command has no ids but uid 0, so chown and apt-get fail in it: /etc/subuid has no "
        "65,535 ids of this user.\n" in done.stderr
    )
    someone.says("branch", "commit", "--only", "home", "br")
    assert (someone.home / "x").stat().st_uid == UID


def test_ids_that_are_gone(someone: Someone) -> None:
    """The layer's owners mean something else then."""
    someone.tries("touch ~/x; chown 1 ~/x")
    (someone.host.root / "etc/subuid").write_text("someone:500000:65536\n")
    for words in (("diff", "br"), ("commit", "br"), ("discard", "br")):
        assert "subordinate ids of this user cannot be made: newuidmap" in someone.refused("branch", *words)
    assert someone.stored() == ["br"]


DOWNLOADS = ("var/cache/apt/archives", "var/lib/apt/lists")


def test_downloads_of_apt(someone: Someone) -> None:
    """Where only the user _apt may look for files, the command has an empty directory."""
    for name in DOWNLOADS:
        partial = someone.host.root / name / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "secret").write_text("secret\n")
        os.chown(partial, 42, 0)
        partial.chmod(0o700)
    done = someone.tries(
        f"cd /; for d in {' '.join(DOWNLOADS)}; do ls -A $d/partial; chown 42:0 $d/partial; "
        "touch $d/partial/x; mv $d/partial/x $d/moved; touch $d/partial/y; done"
    )
    assert done.stdout == ""
    assert someone.says("branch", "diff", "--all", "br").splitlines() == [
        f"A {name}/moved" for name in DOWNLOADS
    ]
    # On top of it, and in a branch that changes nothing else.
    words = ["try", "--from", "br", "-n", "two", "--", "ls", "-A", f"/{DOWNLOADS[0]}/partial"]
    done = someone.calls(*words)
    assert (done.returncode, done.stdout) == (0, "y\n"), done.stderr
    assert someone.stored() == ["br"]
    done = someone.calls("try", "-n", "none", "-D", "/", "--", "touch", f"/{DOWNLOADS[0]}/partial/x")
    assert done.returncode == 0, done.stderr
    assert someone.stored() == ["br"]
    for name in DOWNLOADS:
        assert os.listdir(someone.host.root / name / "partial") == ["secret"]


def make_repository(host: System, package: Path) -> str:
    """A repository of one package; returns apt's options for it."""
    place = host.root / "srv/repository"
    place.mkdir()
    shutil.copy(package, place)
    data = package.read_bytes()
    (place / "Packages").write_text(
        f"{CONTROL}Filename: ./probe.deb\nSize: {len(data)}\nSHA256: {sha256(data).hexdigest()}\n"
    )
    (host.root / "srv/list").write_text("deb [trusted=yes] copy:/srv/repository ./\n")
    return "-q -o Dir::Etc::sourcelist=/srv/list -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0"


@pytest.mark.slow
def test_a_package_is_downloaded(someone: Someone, area: Path) -> None:
    """`apt-get update` and `install`, whose downloads belong to the user _apt."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("apt-get or dpkg-deb is not installed")
    options = make_repository(someone.host, make_package(area))
    done = someone.tries(f"apt-get {options} update; apt-get {options} -y install probe; probe")
    assert done.stdout.endswith("works\n")
    assert "partial" not in done.stderr
    lines = someone.says("branch", "diff", "--all", "br").splitlines()
    assert "A usr/bin/probe  (mode 4755, owner 0:0)" in lines
    assert any(line.startswith("A var/lib/apt/lists/_srv_repository_") for line in lines)
    assert not any("partial" in line for line in lines)
    someone.says("branch", "discard", "br")


@pytest.mark.slow
def test_a_package_is_installed(someone: Someone, area: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("apt-get or dpkg-deb is not installed")
    shutil.copy(make_package(area), someone.home)
    with system(area / "direct") as direct:
        shutil.copy(someone.home / "probe.deb", direct.root / "srv")
        done = direct.call("apt-get", "-q", "-y", "install", "/srv/probe.deb")
        assert done.returncode == 0, done
        someone.tries("apt-get -q -y install ~/probe.deb; test $(stat -c %U /var/lib/probe/state) = daemon")
        layer = someone.home / ".local/share/unionfs/branches/br/upper"
        for path in ("usr/bin/probe", "etc/probe.conf", "usr/share/probe/data", "etc/services"):
            expected, found = look(direct.root, path), look(layer, path)
            assert expected is not None
            assert found is not None
            assert (found[0], found[4]) == (expected[0], expected[4]), path
    lines = someone.says("branch", "diff", "br").splitlines()
    assert "A usr/bin/probe  (mode 4755, owner 0:0)" in lines
    someone.says("branch", "discard", "br")
    assert someone.stored() == []
