"""`--watch-lower` where it reaches limits: ordinary users, few watches, filesystems that report nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Done, Place, listed, refused, succeed, unionfs, wait_for
from tests.mount.user_calls import Host


@pytest.mark.parametrize("words", [("--session", "direct"), ("--session", "pyfuse3")], ids=" ".join)
def test_an_ordinary_user(host: Host, place: Place, words: tuple[str, str]) -> None:
    """Changes by that user and by others, in directories of that user and of others."""
    (place.lower / "theirs").mkdir()
    (place.lower / "theirs/file").write_text("old\n")
    host.mount(*words, "--watch-lower")
    succeed(host.run("sh", "-c", f"cd {place.merged}; cat base theirs/file; ls -lR"))
    assert host.run("cat", place.merged / "new").returncode == 1
    (place.lower / "base").write_text("changed by root\n")
    (place.lower / "theirs/file").write_text("new, and longer\n")
    succeed(host.run("sh", "-c", f"echo new > {place.lower}/new"))
    texts = {"base": "changed by root\n", "theirs/file": "new, and longer\n", "new": "new\n"}
    for name, text in texts.items():
        assert wait_for(lambda name=name, text=text: host.run("cat", place.merged / name).stdout == text)
    (place.lower / "base").chmod(0o600)
    (place.lower / "base").unlink()
    assert wait_for(lambda: host.run("cat", place.merged / "base").returncode == 1)


def test_a_directory_that_the_user_may_not_read(host: Host, place: Place) -> None:
    """It cannot be watched, which is logged once; the others are."""
    for name in ("closed", "closed2", "open"):
        (place.lower / name).mkdir()
        (place.lower / name / "file").write_text("old\n")
    for name in ("closed", "closed2"):
        (place.lower / name).chmod(0o711)
    host.mount("--watch-lower")
    files = [place.merged / name / "file" for name in ("closed", "closed2", "open")]
    assert host.run("cat", *files).stdout == "old\n" * 3
    for name in ("closed", "closed2", "open"):
        (place.lower / name / "file").write_text("new, and longer\n")
    assert wait_for(lambda: host.run("cat", files[2]).stdout == "new, and longer\n")
    succeed(host.unionfs("refresh", place.merged))
    assert host.run("cat", *files).stdout == "new, and longer\n" * 3
    found = listed(host.unionfs("inspect", "--json", place.merged))
    # The refresh cannot list them, so the kernel looks them up again; as new nodes, if it forgot them before.
    assert found["figures"]["watches_refused"] in (2, 3, 4)
    log = host.runtime / "unionfs/unionfs.log"
    if log.exists():  # else it is in syslog
        (line,) = [line for line in log.read_text().splitlines() if "cannot be watched" in line]
        assert "'closed'" in line
        assert "unionfs refresh" in line


def _with_watches(place: Place, count: int, script: str) -> Done:
    """Mount where the user may have so many watches, run a script, and unmount."""
    program = " ".join(cli_calls.UNIONFS)
    whole = (
        f"echo {count} > /proc/sys/user/max_inotify_watches || exit 77; "
        f'{program} mount --watch-lower "$@" || exit; {script}; {program} umount {place.merged}'
    )
    layers = map(str, (*place.layers, place.merged))
    done = cli_calls.call(("unshare", "-Urm", "sh", "-c", whole, "sh", *layers))
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip(f"no user namespaces with limits here: {done.stderr.strip()}")
    return done


def test_too_few_watches_for_the_root(place: Place) -> None:
    done = _with_watches(place, 1, "true")
    refused(done, "cannot be watched", "max_user_watches", "leave --watch-lower out")
    assert cli_calls.mounts_at(place.merged) == []


def test_too_few_watches_for_all(place: Place) -> None:
    """What is watched shows; the rest after a refresh."""
    for number in range(5):
        (place.lower / f"d{number}").mkdir()
        (place.lower / f"d{number}/f").write_text("old\n")
    program = " ".join(cli_calls.UNIONFS)
    script = (
        f"cd {place.merged}; cat d0/f d1/f d2/f d3/f d4/f; "
        f"for n in 0 1 2 3 4; do echo changed > {place.lower}/d$n/f; done; "
        "for n in $(seq 500); do grep -q changed d0/f && break; sleep 0.01; done; grep -c changed d?/f; "
        f"{program} refresh .; cat d?/f; {program} inspect . | grep ^watch; cd /"
    )
    done = _with_watches(place, 4, script)
    assert done.returncode == 0, done.stderr
    old, lines = done.stdout[:20], done.stdout[20:].splitlines()
    assert old == "old\n" * 5
    assert lines[0] == "d0/f:1"
    assert lines[5:10] == ["changed"] * 5
    shown = dict(line.split() for line in lines[10:])
    assert shown["watch_lower"] == "yes"
    assert shown["watches"] == "4"
    assert int(shown["watches_refused"]) >= 3


def test_a_lower_on_fuse(place: Place) -> None:
    place.mount()
    top = place.root / "top"
    top.mkdir()
    before = place.snapshot()
    words = ("mount", "-l", place.merged, "--watch-lower", top)
    refused(unionfs(*words), f"lower {place.merged} is on FUSE", "unionfs refresh", "--watch-lower out")
    assert place.snapshot() == before
    succeed(unionfs("mount", "-l", place.merged, top))
    succeed(unionfs("umount", top))


@pytest.mark.parametrize("word", ["--watch-lower", "-owatch_lower"])
def test_the_option(place: Place, word: str) -> None:
    place.mount(word)
    (place.lower / "base").write_text("changed\n")
    assert wait_for(lambda: (place.merged / "base").read_text() == "changed\n")
    found = listed(unionfs("inspect", "--json", place.merged))
    assert found["settings"]["watch_lower"] is True
    assert found["figures"]["watches"] == 2  # one root a lower


def test_an_image_is_not_watched(place: Place) -> None:
    image = place.root / "image.ext4"
    done = cli_calls.call(("mkfs.ext4", "-q", "-d", str(place.lower2), str(image), "4m"))
    if done.returncode != 0:
        pytest.skip(f"no image: {done.stderr}")
    words = ("-l", place.lower, "-l", image, "-u", place.upper, "-w", place.work, "--watch-lower")
    succeed(unionfs("mount", *words, place.merged))
    assert (place.merged / "deep").read_text() == "deep\n"
    assert listed(unionfs("inspect", "--json", place.merged))["figures"]["watches"] == 1


def test_without_an_upper_and_in_many_lowers(root: None, area: Path, place: Place) -> None:
    """Where the daemon remembers which lower has which name."""
    lowers = []
    for number in range(12):
        lower = area / f"l{number}"
        (lower / "d").mkdir(parents=True)
        (lower / f"d/f{number}").write_text(f"{number}\n")
        lowers += ["-l", str(lower)]
    succeed(unionfs("mount", *lowers, "--watch-lower", place.merged))
    for _ in range(6):
        assert not (place.merged / "d/new").exists()
        assert len(os.listdir(place.merged / "d")) == 12
    for number in (11, 4, 0):
        (area / f"l{number}/d/new").write_text(f"in {number}\n")
        assert wait_for(lambda number=number: _text(place.merged / "d/new") == f"in {number}\n")
    for number in (0, 4):
        (area / f"l{number}/d/new").unlink()
    assert wait_for(lambda: _text(place.merged / "d/new") == "in 11\n")
    (area / "l11/d/new").unlink()
    assert wait_for(lambda: _text(place.merged / "d/new") is None)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
