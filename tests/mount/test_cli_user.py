"""The command line of an ordinary user: fusermount3 mounts, and its limits hold."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import UNIONFS, Place, gone, listed, refused, succeed, wait_for
from tests.mount.user_calls import UID, Host
from tests.support import turns


def test_mount_change_and_umount(host: Host, place: Place) -> None:
    pid = host.mount()
    succeed(host.run("sh", "-c", f"echo changed > {place.merged}/base; rm {place.merged}/deep"))
    assert (place.upper / "base").read_text() == "changed\n"
    assert host.unionfs("diff", place.merged).stdout == "C /base\nD /deep\n"
    assert host.options() >= {"rw", "nosuid", "nodev", f"user_id={UID}"}
    assert "allow_other" not in host.options()
    assert listed(host.unionfs("inspect", "--json", place.merged))["settings"]["userxattr"] is True
    succeed(host.unionfs("umount", place.merged))
    assert gone(pid)
    assert os.listdir(host.runtime / "unionfs") in ([], ["unionfs.log"])
    assert stat.S_IMODE((host.runtime / "unionfs").stat().st_mode) == 0o700


@pytest.mark.parametrize("missing", ["mtab", "helper", "bit"])
def test_umount_without_a_usable_helper(host: Host, place: Place, missing: str) -> None:
    """The sentence says what fusermount3 lacks, and with that the mount goes."""
    host.mount()
    helper = Path(os.path.realpath(shutil.which("fusermount3") or "/usr/bin/fusermount3"))
    copy = place.root / "copy"
    if missing == "mtab":
        at = Path("/etc")
        shutil.copytree(at, copy, symlinks=True, ignore=lambda path, _: ["mtab"] if path == "/etc" else [])
        cause, cure = "fusermount3 needs /etc/mtab", "ln -s /proc/self/mounts /etc/mtab"
    elif missing == "helper":
        at = helper.parent
        copy.mkdir()
        for program in ("python3", Path(sys.executable).resolve().name, "env", "setpriv", "sh", "umount"):
            if (at / program).exists():
                shutil.copy(at / program, copy)
        cause, cure = "fusermount3 is missing", "install the package fuse3"
    else:
        at = helper
        shutil.copy(helper, copy)
        copy.chmod(0o755)
        cause, cure = "is not setuid root", "chmod 4755"
    host.root("mount", "--bind", copy, at)
    done = host.unionfs("umount", place.merged)
    assert done.returncode == 1
    assert done.stderr.startswith(f"unionfs: {place.merged} cannot be unmounted: ")
    assert cause in done.stderr
    assert cure in done.stderr
    host.root("umount", "-l", at)
    succeed(host.unionfs("umount", place.merged))


def test_directories_are_renamed(host: Host, place: Place) -> None:
    """By redirects in user.* xattrs, which the next mount follows, as does `unionfs diff` of the layers."""
    (place.lower / "d/sub").mkdir(parents=True)
    (place.lower / "d/sub/f").write_text("f")
    (place.lower / "closed").mkdir()
    for path in ("d", "d/sub", "d/sub/f", "closed"):
        os.chown(place.lower / path, UID, UID)
    (place.lower / "closed").chmod(0o555)
    host.mount()
    succeed(host.run("sh", "-c", f"cd {place.merged} && mv d e && mkdir d && mv e/sub d && mv closed shut"))
    succeed(host.unionfs("umount", place.merged))
    assert os.getxattr(place.upper / "d/sub", "user.overlay.redirect") == b"/d/sub"
    assert stat.S_IMODE((place.upper / "shut").stat().st_mode) == 0o555
    host.mount()
    assert host.run("cat", place.merged / "d/sub/f").stdout == "f"
    diff = host.unionfs("diff", place.merged).stdout
    assert {"A /e", "D /closed", "A /shut"} <= set(diff.splitlines())
    by_root = host.root("env", f"PYTHONPATH={cli_calls.REPOSITORY}", *UNIONFS, "diff", place.merged)
    assert by_root.stdout == diff
    succeed(host.unionfs("umount", place.merged))
    layers = ("--upper", place.upper, "--lower", place.lower, "--lower", place.lower2)
    assert host.unionfs("diff", *layers).stdout == diff
    assert succeed(host.unionfs("check", *layers)) == ""


def test_read_only_directories_are_replaced(host: Host, place: Place) -> None:
    """A directory of the user's without write permission, which holds whiteouts, is removed or replaced."""
    for name in ("one", "two"):
        (place.lower / name).mkdir()
        (place.lower / name / "f").write_text("f")
        for path in (name, f"{name}/f"):
            os.chown(place.lower / path, UID, UID)
    host.mount()
    script = (
        "rm one/f two/f && chmod 555 one two && rmdir one && mkdir new && mv -T new two && mv two one && ls"
    )
    done = host.run("sh", "-c", f"cd {place.merged} && {script}")
    assert done.stderr == ""
    assert done.stdout.split() == ["base", "deep", "one"]
    succeed(host.unionfs("umount", place.merged))
    assert os.listdir(place.work / "work") == []


def test_directories_are_not_renamed_where_others_look(host: Host, place: Place) -> None:
    (place.lower / "d").mkdir()
    os.chown(place.lower / "d", UID, UID)
    conf = place.root / "fuse.conf"
    conf.write_text("user_allow_other\n")
    host.root("mount", "--bind", conf, "/etc/fuse.conf")
    done = host.unionfs("mount", *place.layers, "-o", "allow_other,redirect_dir=on", place.merged)
    refused(done, "redirect_dir=on conflicts", "allow_other")
    host.mount("-o", "allow_other")
    rename = f"import os; os.rename('{place.merged}/d', '{place.merged}/e')"
    assert "Errno 18" in host.run(host.command[0], "-c", rename).stderr


def test_dev_and_suid_of_mount_fuse_are_taken_in_silence(host: Host) -> None:
    host.mount("-o", "rw,dev,suid,exec,async")
    assert {"nodev", "nosuid"} <= host.options()


def test_limits_of_the_shell(host: Host, place: Place) -> None:
    """Soft limits are raised to the hard ones; a hard one stays, and the log says so."""
    (place.lower / "base").write_bytes(bytes(3_000_000))
    command = " ".join([*host.command, "mount", *map(str, place.layers), str(place.merged)])
    succeed(host.run("sh", "-c", f"ulimit -St 1; ulimit -Sf 1000; ulimit -Sn 64; exec {command}"))
    succeed(host.run("sh", "-c", f"echo more >> {place.merged}/base"))
    assert (place.upper / "base").stat().st_size == 3_000_005
    succeed(host.unionfs("umount", place.merged))
    (place.upper / "base").unlink()
    succeed(host.run("sh", "-c", f"ulimit -f 1000; exec {command}"))
    assert "limits of the mounting process stay (file size " in (
        host.runtime / "unionfs/unionfs.log"
    ).read_text()
    done = host.run("dd", "if=/dev/zero", f"of={place.merged}/base", "count=1", "conv=notrunc,fsync")
    assert "File too large" in done.stderr
    assert host.run("cat", place.merged / "deep").stdout == "deep\n"


@pytest.mark.parametrize("command", [["fusermount3", "-u"], ["kill"]])
def test_other_ends(host: Host, place: Place, command: list[str]) -> None:
    pid = host.mount()
    succeed(host.run(*command, str(pid) if command == ["kill"] else place.merged))
    assert wait_for(lambda: gone(pid))
    assert str(place.merged) not in host.root("cat", "/proc/mounts").stdout


def test_signal_to_a_busy_mount(host: Host, place: Place) -> None:
    pid = host.mount()
    user = subprocess.Popen(
        ["nsenter", "-t", str(host.holder.pid), "-m", "setpriv", "--reuid", str(UID), "--regid", str(UID),
         "--clear-groups", "sh", "-c", f"cd {place.merged}; echo; exec sleep 60"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert user.stdout is not None
        user.stdout.readline()
        refused(host.unionfs("umount", place.merged), "is busy", "--lazy", "cwd")
        os.kill(pid, signal.SIGTERM)
        assert wait_for(lambda: str(place.merged) not in host.root("cat", "/proc/mounts").stdout)
        assert not gone(pid)
    finally:
        user.kill()
        user.communicate()
    assert wait_for(lambda: gone(pid))


def test_crash(host: Host, place: Place) -> None:
    pid = host.mount()
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    succeed(host.unionfs("umount", place.merged))
    assert str(place.merged) not in host.root("cat", "/proc/mounts").stdout


def test_allow_other_needs_the_hosts_consent(host: Host, place: Place) -> None:
    for text in ("", "# user_allow_other\n"):
        conf = place.root / "fuse.conf"
        conf.write_text(text)
        host.root("mount", "--bind", conf, "/etc/fuse.conf")
        for option in ("allow_other", "allow_root"):
            done = host.unionfs("mount", *place.layers, "-o", option, place.merged)
            refused(done, f"option {option}", "user_allow_other", "/etc/fuse.conf")
    conf.write_text("user_allow_other\n")
    host.mount("-o", "allow_other")
    assert "allow_other" in host.options()


def test_mountpoint_inside_a_lower(host: Host, place: Place) -> None:
    (place.lower / "sub").mkdir()
    os.chown(place.lower / "sub", UID, UID)
    refused(host.unionfs("mount", *place.layers, place.lower / "sub"), "inside the lower", "mount as root")


def test_what_the_user_may_not_touch(host: Host, place: Place) -> None:
    place.merged.chmod(0o755)
    os.chown(place.merged, 0, 0)
    refused(host.unionfs("mount", *place.layers, place.merged), "mountpoint ", "cannot be written")
    os.chown(place.merged, UID, UID)
    os.chown(place.upper, 0, 0)
    refused(host.unionfs("mount", *place.layers, place.merged), f"upper {place.upper} cannot be written")
    os.chown(place.upper, UID, UID)
    place.lower.chmod(0o700)
    os.chown(place.lower, 0, 0)
    refused(host.unionfs("mount", *place.layers, place.merged), f"lower {place.lower} cannot be read")


def test_fuse_device_closed_to_the_user(host: Host, place: Place) -> None:
    host.device.chmod(0o600)
    refused(host.unionfs("mount", *place.layers, place.merged), "/dev/fuse cannot be opened", "chmod 666")
    done = host.unionfs("doctor")
    assert done.returncode == 1
    assert "chmod 666 /dev/fuse" in done.stdout


def test_doctor(host: Host) -> None:
    done = host.unionfs("doctor")
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""


def test_umount_of_somebody_elses_mount(host: Host, place: Place) -> None:
    host.root("env", f"PYTHONPATH={cli_calls.REPOSITORY}", *UNIONFS, "mount", *place.layers, place.merged)
    done = host.unionfs("umount", place.merged)
    refused(done, "cannot be unmounted", "as root")
    host.root("umount", place.merged)


def test_root_sees_and_ends_a_users_mount(host: Host, place: Place) -> None:
    """With the runtime directory at logind's path, root finds the mounts of users."""
    pid = host.mount()
    done = host.root("env", f"PYTHONPATH={cli_calls.REPOSITORY}", *UNIONFS, "umount", place.merged)
    assert done.stderr == ""
    assert wait_for(lambda: gone(pid))


def test_runtime_directory_of_somebody_else(host: Host, place: Place) -> None:
    """A directory that others can write is not trusted."""
    (host.runtime / "unionfs").mkdir(mode=0o777)
    (host.runtime / "unionfs").chmod(0o777)
    fallback = Path(f"/tmp/unionfs-{UID}")
    with turns.only_one(fallback.name):
        if fallback.exists():
            pytest.skip(f"{fallback} is in use")
        fallback.symlink_to(host.runtime)
        try:
            refused(host.unionfs("mount", *place.layers, place.merged), "runtime files", str(fallback))
        finally:
            fallback.unlink()


def test_in_a_user_namespace(host: Host, place: Place) -> None:
    """Like podman without root: uid 0 of a namespace opens /dev/fuse and mounts without a helper."""
    command = " ".join(host.command)
    script = (
        f"{command} mount {' '.join(map(str, place.layers))} {place.merged} && rm {place.merged}/deep && "
        f"echo new > {place.merged}/new && {command} diff {place.merged} && "
        f"grep {place.merged} /proc/mounts && {command} umount {place.merged}"
    )
    done = host.run("unshare", "-r", "-m", "sh", "-c", script)
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("D /deep\nA /new\n")
    assert (place.upper / "new").read_text() == "new\n"


def test_check_and_convert(host: Host, place: Place) -> None:
    """With user.overlay.* markers, of an upper that the user's mount wrote; then for fuse-overlayfs."""
    host.mount()
    change = f"rm {place.merged}/deep; echo x > {place.merged}/base; mkdir {place.merged}/new"
    succeed(host.run("sh", "-c", change))
    succeed(host.unionfs("umount", place.merged))
    layers = ("-u", place.upper, "-w", place.work, "-l", place.lower, "-l", place.lower2)
    assert succeed(host.unionfs("check", *layers)) == ""
    succeed(host.run("setfattr", "-n", "user.overlay.opaque", "-v", "?", place.upper / "new"))
    assert "neither y nor x" in host.unionfs("check", *layers).stdout
    assert host.unionfs("check", *layers, "--repair").returncode == 3
    succeed(host.unionfs("convert", "-u", place.upper, "--to", "fuse-overlayfs"))
    assert (place.upper / ".wh.deep").exists()
    host.mount()
    assert sorted(os.listdir(place.lower)) == ["base"]
    assert host.run("ls", place.merged).stdout.split() == ["base", "new"]
    succeed(host.unionfs("umount", place.merged))


def test_unreadable_files_that_are_empty(host: Host, place: Place) -> None:
    """They are copied up without being read, as by overlayfs, where all is shown as the user's; others are
    not."""
    for name, text in (("written", ""), ("chmod", ""), ("cut", ""), ("touched", ""), ("full", "secret\n")):
        (place.lower / name).write_text(text)
        (place.lower / name).chmod(0o640)
    before = (place.lower / "chmod").stat()
    host.mount("-o", f"squash_to_uid={UID},squash_to_gid={os.stat(place.upper).st_gid}")
    script = "echo mine >> written; chmod 0604 chmod; truncate -s 3 cut; touch -d @7 touched; cat written"
    assert succeed(host.run("sh", "-ec", f"cd {place.merged}; {script}")) == "mine\n"
    for script in ("echo x | dd of=full oflag=append conv=notrunc,fsync", "chmod 0600 full", "cat full"):
        done = host.run("sh", "-ec", f"cd {place.merged}; {script}")
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
    succeed(host.unionfs("umount", place.merged))
    assert sorted(os.listdir(place.upper)) == ["chmod", "cut", "touched", "written"]
    modes = {name: stat.S_IMODE((place.upper / name).stat().st_mode) for name in os.listdir(place.upper)}
    assert modes == {"chmod": 0o604, "cut": 0o640, "touched": 0o640, "written": 0o640}
    assert (place.upper / "chmod").stat().st_mtime_ns == before.st_mtime_ns
    assert (place.upper / "cut").read_bytes() == b"\0\0\0"
    assert (place.upper / "touched").stat().st_mtime == 7


def test_what_belongs_to_others(host: Host, place: Place) -> None:
    """It cannot be copied up, and so root's sticky directory takes no file; the log says why, once."""
    (place.lower / "tmp").mkdir()
    (place.lower / "tmp").chmod(0o1777)
    for name in ("plain", "with-xattr"):
        (place.lower / name).write_text("root's\n")
        (place.lower / name).chmod(0o666)
    os.setxattr(place.lower / "with-xattr", "user.a", b"b")
    host.mount()
    for name in ("tmp/new", "plain", "with-xattr"):
        # With --io cached an existing file is copied up by the write, whose error the kernel reports later.
        write = f"dd of={place.merged}/{name} oflag=append conv=notrunc,fsync"
        done = host.run("sh", "-c", f"echo mine | {write}")
        assert done.returncode != 0
        assert "Operation not permitted" in done.stderr
    assert os.listdir(place.upper) == []
    assert (place.lower / "plain").read_text() == "root's\n"
    log = listed(host.unionfs("inspect", "--json", place.merged))["log"]
    options = f"squash_to_uid={UID},squash_to_gid={os.stat(place.upper).st_gid}"
    if log != "syslog":
        assert Path(log).read_text().count(options) == 1
    succeed(host.unionfs("umount", place.merged))

    host.mount("-o", options)
    for name in ("tmp/new", "plain", "with-xattr"):
        succeed(host.run("sh", "-c", f"echo mine >> {place.merged}/{name}"))
    status = (place.upper / "tmp").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (UID, 0o1777)
    assert (place.upper / "plain").read_text() == "root's\nmine\n"
    succeed(host.unionfs("umount", place.merged))
    assert options in host.unionfs("doctor").stdout.replace("\n", "")
