"""Storage without root: the daemon serves it, and it behaves like a bind mount of the host."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, refused, succeed, wait_for
from tests.mount.user_calls import UID, Host
from tests.support import acl

CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


@pytest.fixture
def host(host: Host, place: Place) -> Host:
    """An ordinary user with a directory `shared` on the host."""
    shared = place.root / "shared"
    (shared / "sub").mkdir(parents=True)
    (shared / "file").write_text("host\n")
    for path in (place.root, shared, *shared.rglob("*")):
        os.chown(path, UID, UID)
    return host


@pytest.fixture(params=["direct", "pyfuse3"])
def words(request: pytest.FixtureRequest, place: Place) -> list[str]:
    """Options of `mount` for each session available to a user."""
    return ["--session", request.param, "--root", str(place.root / "storage")]


def shell(host: Host, script: str) -> str:
    """The output of a user's script, which must succeed."""
    done = host.run("sh", "-ec", f"cd {host.place.root}; {script}")
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def fails(host: Host, script: str) -> str:
    """The message of a script that fails."""
    done = host.run("sh", "-c", f"cd {host.place.root}; {script}")
    assert done.returncode != 0, done.stdout
    return done.stderr


def test_a_directory_of_the_host(host: Host, place: Place, words: list[str]) -> None:
    host.mount(*words, "-v", f"{place.root}/shared:/srv/data")
    shell(host, "cat merged/srv/data/file; echo new > merged/srv/data/new; rm merged/srv/data/file")
    shell(host, "mkdir merged/srv/data/dir; mv merged/srv/data/new merged/srv/data/dir/moved")
    shared = place.root / "shared"
    assert (shared / "dir/moved").read_text() == "new\n"
    assert not (shared / "file").exists()
    # No copy-up: the upper contains only the target.
    assert sorted(str(p.relative_to(place.upper)) for p in place.upper.rglob("*")) == ["srv", "srv/data"]
    # Changes by the host are visible at once: content, new names, removed ones, and recreated ones.
    (shared / "dir/moved").write_text("changed on the host\n")
    (shared / "fresh").write_text("fresh\n")
    out = shell(host, "cat merged/srv/data/dir/moved merged/srv/data/fresh")
    assert out == "changed on the host\nfresh\n"
    (shared / "fresh").unlink()
    assert "No such file" in fails(host, "cat merged/srv/data/fresh")
    (shared / "fresh").mkdir()
    out = shell(host, "ls merged/srv/data; stat -c %F merged/srv/data/fresh")
    assert out == "dir\nfresh\nsub\ndirectory\n"
    # An open file shows the host's writes.
    os.chown(shared / "dir/moved", UID, UID)
    out = shell(
        host, "exec 3< merged/srv/data/dir/moved; cat <&3 > /dev/null; echo more >> shared/dir/moved; cat <&3"
    )
    assert out == "more\n"
    succeed(host.unionfs("umount", place.merged))


MEMORY = """
import os, stat, sys

shown, there = sys.argv[1:]

def kind(name):
    try:
        st = os.lstat(f"{shown}/{name}")
        return stat.filemode(st.st_mode), st.st_size if stat.S_ISREG(st.st_mode) else None
    except OSError as error:
        return error.errno

def swap(name):
    path = f"{there}/{name}"
    if os.path.isdir(path):
        os.rename(path, path + ".was")
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    else:
        os.rename(path, path + ".was")
        os.mkdir(path, 0o700)

for name in ("listed-d", "looked-d"):
    os.mkdir(f"{there}/{name}", 0o755)
for name in ("listed-f", "looked-f", "data"):
    with open(f"{there}/{name}", "wb") as file:
        file.write(b"content")

# READDIRPLUS, LOOKUP, CREATE and MKDIR let the kernel know a name
print(sorted((e.name, e.is_dir(), e.stat().st_size > 0) for e in os.scandir(shown) if "listed" in e.name))
print([kind(name) for name in ("looked-d", "looked-f", "absent")])
os.close(os.open(f"{shown}/made-f", os.O_CREAT | os.O_WRONLY))
os.mkdir(f"{shown}/made-d")
names = "listed-d", "listed-f", "looked-d", "looked-f", "made-f", "made-d"
for name in names:
    swap(name)
os.mkdir(f"{there}/absent", 0o711)
print([kind(name) for name in (*names, "absent")])

# attributes, data, and data that came without a new time of modification
held = open(f"{shown}/data", "rb")
print(kind("data"), held.read(), os.fstat(held.fileno()).st_size)
os.truncate(f"{there}/data", 3)
print(os.fstat(held.fileno()).st_size)
os.chmod(f"{there}/data", 0o640)
print(kind("data"), open(f"{shown}/data", "rb").read())
times = os.stat(f"{there}/data").st_atime_ns, os.stat(f"{there}/data").st_mtime_ns
with open(f"{there}/data", "rb+") as file:
    file.write(b"new")
os.utime(f"{there}/data", ns=times)
print(open(f"{shown}/data", "rb").read())
"""


def test_what_the_kernel_may_not_remember(host: Host, place: Place, words: list[str]) -> None:
    """Others change it at any time: entries, absent names, attributes and data are requested again; as on the
    host."""
    host.mount(*words, "-v", f"{place.root}/shared:/data")
    script = place.root / "memory.py"
    script.write_text(MEMORY)

    def printed(shown: str) -> str:
        shell(host, "rm -rf shared/*")
        return shell(host, f"{host.command[0]} {script} {shown} shared")

    assert printed("merged/data") == printed("shared")
    succeed(host.unionfs("umount", place.merged))


def test_read_only(host: Host, place: Place, words: list[str]) -> None:
    host.mount(*words, "-v", f"{place.root}/shared:/ro:ro", "-v", f"{place.root}/shared/file:/conf:ro")
    assert shell(host, "cat merged/ro/file merged/conf") == "host\nhost\n"
    for script in (
        "echo x > merged/ro/file", "echo x >> merged/ro/file", "touch merged/ro/new", "rm merged/ro/file",
        "mkdir merged/ro/d", "rmdir merged/ro/sub", "mv merged/ro/file merged/ro/other",
        "chmod 600 merged/ro/file", "ln merged/ro/file merged/ro/hard", "truncate -s 0 merged/ro/file",
        "echo x > merged/conf",
    ):  # fmt: skip
        assert "Read-only file system" in fails(host, script), script
    assert (place.root / "shared/file").read_text() == "host\n"
    shell(host, "echo x > merged/elsewhere")
    succeed(host.unionfs("umount", place.merged))


def test_a_single_file(host: Host, place: Place, words: list[str]) -> None:
    host.mount(*words, "-v", f"{place.root}/shared/file:/etc/app/conf")
    shell(host, "echo written > merged/etc/app/conf")
    assert (place.root / "shared/file").read_text() == "written\n"
    assert "busy" in fails(host, "rm merged/etc/app/conf")
    assert shell(host, "cat merged/etc/app/conf") == "written\n"
    succeed(host.unionfs("umount", place.merged))


def test_the_border(host: Host, place: Place, words: list[str]) -> None:
    """As between two filesystems: rename and link are EXDEV (mv copies), the mountpoint is busy."""
    host.mount(*words, "-v", f"{place.root}/shared:/data")
    shell(host, "mv merged/data/file merged/file; mv merged/deep merged/data/deep")
    assert (place.upper / "file").read_text() == "host\n"
    assert (place.root / "shared/deep").read_text() == "deep\n"
    assert "cross-device" in fails(host, "ln merged/file merged/data/hard").lower()
    assert "busy" in fails(host, "rmdir merged/data")
    assert "busy" in fails(host, "mv -T merged/data merged/other")
    succeed(host.unionfs("umount", place.merged))


def test_programs_in_it(host: Host, place: Place, words: list[str]) -> None:
    """tar, find, SQLite's locks and mmap on served storage; compared with the same on the host."""
    host.mount(*words, "-v", f"{place.root}/shared:/data")
    script = (
        "cd $DIR; for i in 1 2 3 4 5; do mkdir -p t/$i; seq 1 2000 > t/$i/f; ln -s ../1/f t/$i/l; done; "
        "tar cf a.tar t; mkdir x; tar xf a.tar -C x; diff -r t x/t; find x | sort; rm -r t x a.tar; "
        "python3 -c \"import sqlite3; c = sqlite3.connect('d.db'); c.execute('pragma journal_mode=wal'); "
        "c.execute('create table t(x)'); "
        "c.executemany('insert into t values(?)', [(i,) for i in range(500)]); "
        "c.commit(); print(c.execute('select sum(x) from t').fetchall())\"; rm d.db*; "
        "python3 -c \"import mmap; f = open('m', 'wb+'); f.truncate(8192); m = mmap.mmap(f.fileno(), 8192); "
        "m[4096:4100] = b'mmap'; m.flush(); print(open('m', 'rb').read()[4096:4100])\"; rm m; ls"
    )
    here = shell(host, f"DIR=merged/data; {script}")
    assert here == shell(host, f"DIR=shared; {script}")
    succeed(host.unionfs("umount", place.merged))


def test_volumes_and_tmpfs(host: Host, place: Place, words: list[str]) -> None:
    (place.lower2 / "seed").mkdir()
    (place.lower2 / "seed/x").write_text("seed\n")
    for path in (place.lower2 / "seed", place.lower2 / "seed/x"):
        os.chown(path, UID, UID)
    host.mount(*words, "-v", "vol:/seed", "-v", "/anon", "--tmpfs", "/t:size=64k,mode=700")
    assert shell(host, "cat merged/seed/x; echo more > merged/seed/more; touch merged/anon/a") == "seed\n"
    volume = place.root / "storage/volumes/vol/_data"
    assert sorted(os.listdir(volume)) == ["more", "x"]
    assert "No space" in fails(host, "dd if=/dev/zero of=merged/t/big bs=1k count=200")
    assert shell(host, "stat -c %a merged/t") == "700\n"
    assert os.listdir(place.upper / "t") == []
    succeed(host.unionfs("umount", place.merged))
    host.mount(*words, "-v", "vol:/other", "--tmpfs", "/t")
    assert shell(host, "cat merged/other/more; ls merged/t") == "more\n"
    succeed(host.unionfs("umount", place.merged))


def test_an_upper_in_memory(host: Host, place: Place, words: list[str]) -> None:
    layers = ("-l", place.lower, "-l", place.lower2)
    succeed(host.unionfs("mount", *layers, "-u", "tmpfs:size=1m", *words, place.merged))
    shell(host, "echo changed > merged/base; rm merged/deep; mkdir merged/d")
    assert host.unionfs("diff", place.merged).stdout == "C /base\nA /d\nD /deep\n"
    assert "No space" in fails(host, "dd if=/dev/zero of=merged/big bs=64k count=32 conv=fsync")
    assert os.listdir(place.upper) == []
    assert " tmpfs " not in host.root("sh", "-c", f"grep {place.merged} /proc/mounts").stdout
    succeed(host.unionfs("umount", place.merged))


def test_killed(host: Host, place: Place, words: list[str]) -> None:
    """The union's mount is the only one to remove, and the guardian does it."""
    pid = host.mount(*words, "-v", f"{place.root}/shared:/data")
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: str(place.merged) not in host.root("cat", "/proc/mounts").stdout)
    assert (place.root / "shared/file").read_text() == "host\n"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["-v", "{root}/shared:/d:rslave"], ["propagation rslave", "only root"]),
        (["--mount", "type=bind,src={root}/shared,dst=/d,bind-nonrecursive"], ["bind-recursive", "root"]),
        (["-v", "/root/secret:/d"], ["bind source /root/secret", "permission denied"]),
        (["-v", "{root}/shared:/base/x"], ["target /base/x", "not a directory"]),
        (["-v", "{root}/shared:/new/a", "-v", "vol:/base"], ["target /base is a file"]),
        (["--tmpfs", "/t:huge=perhaps"], ["the tmpfs at /t", "huge"]),
    ],
)
def test_refused(host: Host, place: Place, options: list[str], parts: list[str]) -> None:
    options = [option.format(root=place.root) for option in options]
    root = str(place.root / "storage")
    done = host.unionfs("mount", *place.layers, *options, "--root", root, place.merged)
    refused(done, *parts)
    assert str(place.merged) not in host.root("cat", "/proc/mounts").stdout
    assert os.listdir(place.upper) == []


def test_a_read_only_union_has_no_writable_storage(host: Host, place: Place) -> None:
    (place.lower / "d").mkdir()
    os.chown(place.lower / "d", UID, UID)
    words = ["mount", "-l", place.lower, "-v", f"{place.root}/shared:/d"]
    refused(host.unionfs(*words, place.merged), "read-only like the union", "give the union an upper")
    words[-1] = f"{words[-1]}:ro"
    succeed(host.unionfs(*words, place.merged))
    assert shell(host, "cat merged/d/file") == "host\n"
    succeed(host.unionfs("umount", place.merged))


def test_run(host: Host, place: Place) -> None:
    """A command in a union of an ordinary user, with host directories as its system."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    system = [path for path in ("/usr", "/lib", "/lib64", "/bin") if os.path.exists(path)]
    binds = [f"--mount=type=bind,src={path},dst={path},readonly" for path in system]
    here: list[str | Path] = ["run", "--root", place.root / "storage", *binds]
    done = host.unionfs(
        *here, "-l", place.lower2, "--name", "mine", "-v", f"{place.root}/shared:/h", "--", "sh", "-c",
        "cat /deep /h/file; echo made > /made; echo x > /h/x; exit 3",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, "deep\nhost\n", "")
    assert (place.root / "shared/x").read_text() == "x\n"
    done = host.unionfs(*here, "--name", "mine", "--", "cat", "/made")
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")
    succeed(host.unionfs("rm", "--root", place.root / "storage", "mine"))
    assert os.listdir(place.root / "storage/containers") == []


def test_in_a_user_namespace(host: Host, place: Place) -> None:
    """Uid 0 of a namespace may make kernel mounts there, and gets them."""
    command, root = " ".join(host.command), place.root
    mount = f"{command} mount --root {root}/storage {' '.join(map(str, place.layers))}"
    script = (
        f"{mount} -v vol:/v -v {root}/shared:/ro:ro --tmpfs /t:size=64k {place.merged} && "
        f"grep -c ' {place.merged}/' /proc/self/mounts && cat {place.merged}/ro/file && "
        f"touch {place.merged}/v/x && ! touch {place.merged}/ro/x 2>/dev/null && "
        f"{command} umount {place.merged} && ! grep {place.merged} /proc/self/mounts"
    )
    done = host.run("unshare", "-r", "-m", "sh", "-c", script)
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\nhost\n", "")
    assert os.listdir(root / "storage/volumes/vol/_data") == ["x"]


def test_capabilities_and_default_acls_of_the_host(host: Host, place: Place, words: list[str]) -> None:
    """They are not cached, since others change them: a write removes capabilities that the host set after
    another write, and new files follow the directory's current default ACL.
    """
    host.mount(*words, "-v", f"{place.root}/shared:/srv/data")
    merged, shared = "merged/srv/data", place.root / "shared"
    shell(host, f"echo new > {merged}/new; echo more >> {merged}/new")
    for name in ("new", "file"):
        for change in ("echo x >> {}", "truncate -s 1 {}"):
            os.setxattr(shared / name, "security.capability", CAPABILITY)
            shell(host, change.format(f"{merged}/{name}"))
            assert "security.capability" not in os.listxattr(shared / name)
    found = []
    for step in ("none", "set", "gone"):
        if step == "set":
            os.setxattr(shared / "sub", acl.DEFAULT, acl.simple(7, 5, 0, users={1234: 6}))
        if step == "gone":
            os.removexattr(shared / "sub", acl.DEFAULT)
        for where in (f"{merged}/sub/{step}-union", f"shared/sub/{step}-host"):
            shell(host, f"umask 077; echo > {where}; mkdir {where}.d")
        found.append([
            [os.stat(shared / f"sub/{step}-{by}{kind}").st_mode for kind in ("", ".d")]
            for by in ("union", "host")
        ])  # fmt: skip
    if "pyfuse3" in words:  # which applies the umask before it queries ACLs
        del found[1]
    assert [union for union, _ in found] == [native for _, native in found]
