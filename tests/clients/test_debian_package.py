"""The Debian package in a whole Debian: installed, used, upgraded under mounts in use, removed and purged."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import debian
from tests.clients.support import run
from tests.support import areas
from tests.support.worker import REPOSITORY
from unionfs.sys.process import children_of

pytestmark = [
    pytest.mark.slow, pytest.mark.usefixtures("root"), pytest.mark.timeout(2400), pytest.mark.watchdog(2300),
]  # fmt: skip

APT = "apt-get -q -y -o Dpkg::Use-Pty=0 --no-install-recommends"
# What the package depends on, what reads its man pages and completions, and the other `unionfs`.
OTHERS = "fuse3 libseccomp2 python3 bubblewrap man-db bash-completion zsh fish procps unionfs-fuse"

_ROOM = """
mount --make-rprivate /
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
mknod -m 666 "$0/fuse" c 10 229
mount --bind "$0/fuse" "$0/dev/fuse"
mount -t tmpfs -o mode=755 run "$0/run"
cd "$0"
pivot_root . mnt
umount -l mnt
exec chroot . sh -c 'echo; exec env --ignore-signal=CHLD sleep infinity'
"""


class Machine:
    """A Debian whose processes and mounts stay until it ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "-m", "-p", "-f", "--kill-child",
             "sh", "-ec", _ROOM, root],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"\n"
        self._init = str(children_of(self._holder.pid)[0])

    def _command(self, script: str) -> list[str]:
        return ["nsenter", "-t", self._init, "-m", "-p", "-r", "-w", "bash", "-ec", f"cd /root; {script}"]

    def __call__(self, script: str, timeout: float = 600) -> str:
        """The output of a script, stderr too; it must succeed."""
        return run(*self._command(script), env=self._environment(), timeout=timeout)

    def fails(self, script: str) -> str:
        """The output of a script, which must fail."""
        done = subprocess.run(
            self._command(script), env={**os.environ, **self._environment()}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode != 0, done.stdout
        return done.stdout

    def _environment(self) -> dict[str, str]:
        return {
            "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root", "LC_ALL": "C.UTF-8", "TMPDIR": "/tmp",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "",
        }  # fmt: skip

    def files(self) -> set[str]:
        """All paths of the system, but for what dpkg, apt and man-db write about packages."""
        listed = self("find / -xdev -not -path '/tmp/*' -not -path '/root/*'").splitlines()
        noise = re.compile(r"/var/(lib/(dpkg|apt)|cache|log)(/|$)|.*/__pycache__(/|$)")
        return {path for path in listed if not noise.match(path)}

    def processes(self) -> list[str]:
        """The command lines of processes that run the package."""
        listed = self("ps -eo args").splitlines()
        return [line for line in listed if "unionfs" in line and "ps -eo" not in line]

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()


@pytest.fixture(scope="module")
def package() -> Path:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed: this is no Debian or Ubuntu")
    printed = run(REPOSITORY / "scripts/deb", timeout=1500)
    return REPOSITORY / printed.splitlines()[-1]


@pytest.fixture(scope="module")
def machine(package: Path) -> Iterator[Machine]:
    try:
        tree = debian.tree()
    except debian.Unavailable as reason:
        pytest.skip(str(reason))
    with areas.area() as place:
        root = place / "root"
        run("cp", "-a", "--reflink=auto", tree, root)
        debian.install_host_settings(root)
        shutil.copyfile(package, root / "tmp/unionfs.deb")
        _later_version(package, root / "tmp/later.deb", place)
        made = Machine(root)
        try:
            made(f"apt-get -qq update && {APT} install {OTHERS} && apt-get clean")
            made("useradd -m -s /bin/bash somebody; ln -s /proc/self/mounts /etc/mtab")
            yield made
        finally:
            made.close()
            shutil.rmtree(root)


def _later_version(package: Path, target: Path, place: Path) -> None:
    """The same package as another version."""
    unpacked = place / "later"
    run("dpkg-deb", "-R", package, unpacked)
    control = unpacked / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: \S+", "Version: 99.0-1", control.read_text()))
    (init,) = unpacked.glob("usr/lib/unionfs/lib/*/site-packages/unionfs/__init__.py")
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "99.0"', init.read_text()))
    (unpacked / "DEBIAN/md5sums").unlink()
    run("dpkg-deb", "-b", unpacked, target)
    shutil.rmtree(unpacked)


def test_the_same_source_gives_the_same_package(package: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(package.read_bytes()).digest()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = {"TMPDIR": str(elsewhere), "TZ": "Asia/Tokyo"}
    run("sh", "-c", "umask 077; exec scripts/deb", cwd=REPOSITORY, env=other, timeout=1500)
    assert hashlib.sha256(package.read_bytes()).digest() == digest


def test_a_wrong_call_of_the_script_builds_nothing() -> None:
    for arguments in (["--revision"], ["--revision", "x"], ["--revison", "2"], ["x"]):
        done = subprocess.run([REPOSITORY / "scripts/deb", *arguments], capture_output=True, text=True)
        assert done.returncode == 1, arguments
        assert re.fullmatch(r"deb: (invalid revision|unknown argument) .*\n", done.stderr), done.stderr


def test_the_life_of_the_package(machine: Machine) -> None:
    before = machine.files()
    assert "/usr/bin/unionfs" in before  # that of unionfs-fuse

    refused = machine.fails("dpkg -i /tmp/unionfs.deb")
    assert "unionfs-fuse" in refused
    assert "conflict" in refused
    planned = machine(f"{APT} -s install /tmp/unionfs.deb")
    assert "\nRemv unionfs-fuse " in planned
    machine(f"{APT} install /tmp/unionfs.deb")
    before = {path for path in before if "unionfs" not in path}

    _use(machine)
    _read(machine)
    _upgrade(machine)

    text = machine(f"{APT} remove unionfs")
    assert "these mounts stay until they are unmounted with umount(8):\n  /srv/outliving\n" in text
    assert machine("cat /srv/outliving/kept") == "kept\n"
    machine("umount /srv/outliving; until ! pgrep -f [t]akeover; do sleep 0.1; done")
    assert machine.processes() == []
    text = machine(f"{APT} purge unionfs")
    assert "still in /var/lib/unionfs" in text
    own = ("/srv/", "/home/", "/var/lib/unionfs/")
    assert {path for path in machine.files() - before if not path.startswith(own)} == {"/var/lib/unionfs"}
    assert machine("cat /var/lib/unionfs/volumes/mine/_data/file") == "data\n"
    assert "unionfs" not in machine("ls /run /etc")


def _use(machine: Machine) -> None:
    """Mount by all names, as root and as a user."""
    machine("mkdir -p /srv/{lower,upper,work,merged} && echo below > /srv/lower/file")
    assert machine("unionfs --version").startswith("unionfs 0.")
    machine("unionfs mount -l /srv/lower -u /srv/upper -w /srv/work /srv/merged")
    machine("echo above > /srv/merged/file")
    assert machine("cat /srv/lower/file /srv/merged/file; unionfs diff /srv/merged") == (
        "below\nabove\nC /file\n"
    )
    machine("unionfs umount /srv/merged")
    options = "lowerdir=/srv/lower,upperdir=/srv/upper,workdir=/srv/work"
    machine(f"mount -t fuse.unionfs none /srv/merged -o {options}; test -s /srv/merged/file")
    machine("umount /srv/merged")
    machine(f"echo 'none /srv/merged fuse.unionfs {options} 0 0' >> /etc/fstab; mount /srv/merged")
    assert machine("findmnt -no FSTYPE /srv/merged; cat /srv/merged/file") == "fuse.unionfs\nabove\n"
    machine("umount /srv/merged; unionfs volume create mine")
    machine("echo data > /var/lib/unionfs/volumes/mine/_data/file")
    assert machine("unionfs run --rm -l / -v mine:/mine -- cat /mine/file") == "data\n"
    machine("su - somebody -c 'mkdir -p union/{l,u,w,m} && cd union && echo x > l/x && "
            "unionfs mount -l l -u u -w w m && echo y > m/x && cat m/x && unionfs umount m'")  # fmt: skip
    # Modules in the environment of a user are not those of the package.
    machine("mkdir -p /root/bad && echo 'raise SystemExit(9)' > /root/bad/click.py && "
            "cd /root/bad && PYTHONPATH=/root/bad unionfs ls")  # fmt: skip


def _read(machine: Machine) -> None:
    """The man pages, completions and units."""
    pages = ["1/unionfs.1", "1/unionfs-mount.1", "1/unionfs-run.1", "1/unionfs-volume-backup.1",
             "8/mount.fuse.unionfs.8"]  # fmt: skip
    names = " ".join(page[2:-2] for page in pages)
    assert machine(f"man -w {names}").split() == [f"/usr/share/man/man{page}.gz" for page in pages]
    assert "SYNOPSIS" in machine("man unionfs-mount")
    assert machine(". /usr/share/bash-completion/bash_completion; _completion_loader unionfs || [ $? = 124 ];"
                   "complete -p unionfs").startswith("complete ")  # fmt: skip
    assert machine("zsh -fc 'autoload -Uz compinit; compinit -D; echo $_comps[unionfs]'") == "_unionfs\n"
    assert "mount" in machine("fish -c 'complete -C \"unionfs mou\"'")
    for unit in ("unionfs@.service", "unionfs-plugin.service"):
        assert "ExecStart=/usr/bin/unionfs " in machine(f"cat $(dpkg -L unionfs | grep /{unit})")


def _upgrade(machine: Machine) -> None:
    """Two mounts are in use meanwhile."""
    machine("mkdir -p /srv/{plain,outliving} /srv/o/{u,w} /srv/p/{u,w}")
    machine("unionfs mount -l /srv/lower -u /srv/p/u -w /srv/p/w /srv/plain")
    machine("unionfs mount -o outlive -l /srv/lower -u /srv/o/u -w /srv/o/w /srv/outliving")
    machine("for d in plain outliving; do (exec >/srv/$d/written; while sleep 0.1; do echo line; done) "
            "</dev/null 2>/dev/null & echo $! >> writers; done")  # fmt: skip
    pids = "unionfs ls --format '{{.Mountpoint}} {{.Pid}}' | grep outliving"
    before = machine(pids)

    text = machine(f"{APT} install /tmp/later.deb")
    assert "these mounts go on with the version that mounted them" in text
    assert "\n  /srv/outliving\n" in text
    assert "\n  /srv/plain\n" in text
    assert machine("unionfs --version") == "unionfs 99.0\n"
    # The installed version's commands know the daemons of the former one, which go on.
    assert set(machine("unionfs ls -q").split()) == {"/srv/plain", "/srv/outliving"}
    machine("unionfs refresh /srv/plain; unionfs sync /srv/plain; unionfs stats /srv/plain")
    machine("unionfs snapshot create /srv/plain one; echo new > /srv/plain/new; unionfs diff /srv/plain")
    assert "was replaced by" in machine("unionfs upgrade --all")
    assert machine(pids) != before
    machine("lines() { wc -l < /srv/outliving/written; }; n=$(lines); "
            "until [ $(lines) -gt $n ]; do sleep 0.1; done")  # fmt: skip
    machine("echo kept > /srv/outliving/kept; kill $(cat writers)")
    machine("until unionfs umount /srv/plain; do sleep 0.2; done")
    assert machine("cat /srv/p/u/new") == "new\n"
