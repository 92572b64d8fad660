"""Databases of packages on copied-up files, in containers and on plain mounts: the same bytes as on ext4."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients import databases
from tests.clients.engines import OURS, Store, busybox_tar, need
from tests.clients.rooms import room
from tests.clients.support import run, union_over

pytestmark = [pytest.mark.usefixtures("root"), pytest.mark.timeout(900), pytest.mark.watchdog(850)]

JOURNALS = ("delete", "wal")
SMALL = 40
"""Small files that are overwritten by shorter content."""


@pytest.fixture(autouse=True)
def _program() -> None:
    need("sqlite3")


def sqlite(path: Path, script: str) -> str:
    done = subprocess.run(["sqlite3", path], input=script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare(area: Path, session: str, megabytes: float, seeds: range) -> None:
    """Run the same workloads on a lower's database through the union and on a copy of it, natively."""
    packages = databases.make_database(area / "lower/db/packages", megabytes)
    native = area / "native"
    shutil.copy(area / "lower/db/packages", native)
    with union_over(area / "lower", area, session) as merged:
        database = merged / "db/packages"
        for seed in seeds:
            for journal in JOURNALS:
                script = databases.workload(seed, packages, journal)
                expected = sqlite(native, script)
                assert "ok" in expected.splitlines()
                assert sqlite(database, script) == expected
                assert database.read_bytes() == native.read_bytes(), (seed, journal)
    assert (area / "upper/db/packages").read_bytes() == native.read_bytes()


def test_the_bytes_are_those_on_ext4(area: Path, session: str) -> None:
    compare(area, session, 4, range(1))


@pytest.mark.slow
def test_twenty_runs_of_a_large_one(area: Path, session: str) -> None:
    compare(area, session, 90, range(20))


def test_shorter_content(area: Path, session: str) -> None:
    """Small files of a lower, read and mapped, then overwritten by shorter ones, keep no byte of the old."""
    (area / "lower").mkdir()
    for number in range(SMALL):
        (area / "lower" / f"f{number}").write_bytes(bytes([65 + number % 26]) * (number * 211 + 9))
    with union_over(area / "lower", area, session) as merged:
        for number in range(SMALL):
            path = merged / f"f{number}"
            assert len(path.read_bytes()) == number * 211 + 9
            short = f"short {number}\n".encode()[: number + 1]
            if number % 2:
                path.write_bytes(short)
            else:
                with path.open("r+b") as file:
                    file.write(short)
                    file.truncate()
            assert path.read_bytes() == short
    assert (area / "upper/f39").read_bytes() == b"short 39\n"


@pytest.mark.clients
@pytest.mark.parametrize("io", ["hybrid", "passthrough", "cached"])
@pytest.mark.parametrize("rootless", [False, True], ids=["root", "rootless"])
def test_in_a_container(area: Path, rootless: bool, io: str) -> None:
    """A workload with each journal, three writers at once, and shorter content for files of the image."""
    if rootless and io != "cached":
        pytest.skip("passthrough needs root")
    tree = area / "tree"
    tree.mkdir()
    packages = databases.make_database(tree / "db/packages", 20)
    databases.program_tree(tree)
    subprocess.run(["tar", "-x", "-C", tree], input=busybox_tar(), check=True)
    native = area / "native"
    shutil.copy(tree / "db/packages", native)
    for number, journal in enumerate(JOURNALS):
        script = databases.workload(number, packages, journal)
        (tree / f"db/{journal}.sql").write_text(script)
        sqlite(native, script)
    names = ("one", "two", "three")
    for name in names:
        (tree / f"db/{name}.sql").write_text(databases.writer(name, 60))
    (tree / "small").mkdir()
    for number in range(SMALL):
        (tree / f"small/{number}").write_bytes(b"old " * (number * 53 + 4))
    run("tar", "-cf", area / "image.tar", "-C", tree, ".")
    with room(area / "home", rootless=rootless) as one:
        store = Store(one, area / "home/store", OURS, extra=("-o", f"io={io}"))
        store.podman("import", "-", "image", data=(area / "image.tar").read_bytes())
        steps = " && ".join(f"/bin/sqlite3 /db/packages < /db/{journal}.sql" for journal in JOURNALS)
        writers = "; ".join(f"/bin/sqlite3 /db/packages < /db/{name}.sql & p{name}=$!" for name in names)
        waits = " && ".join(f"wait $p{name}" for name in names)
        shorter = "for f in /small/*; do cat $f > /dev/null; echo short > $f; done"
        out = store.podman(
            "run", "--name", "c", "image", "sh", "-c",
            f"{steps} && cp /db/packages /db/first && {shorter} && {{ {writers}; {waits}; }}",
        )  # fmt: skip
        assert out.splitlines().count("ok") == len(JOURNALS)
        for name in ("first", "packages"):
            copied = store.run("podman", "cp", f"c:/db/{name}", store.root / "tmp" / name)
            assert copied == ""
        store.podman("cp", "c:/small", store.root / "tmp/small")
    small = [path.read_bytes() for path in (store.root / "tmp/small").iterdir()]
    assert small == [b"short\n"] * SMALL
    first, last = store.root / "tmp/first", store.root / "tmp/packages"
    assert first.read_bytes() == native.read_bytes()
    check = "pragma integrity_check; select substr(path, 1, 4), count(*) from files where digest is not null "
    check += "and (path like '/one/%' or path like '/two/%' or path like '/three/%') group by 1 order by 1;"
    assert sqlite(last, check) == "ok\n/one|60\n/thr|60\n/two|60\n"
    assert sqlite(last, "select sum(length(name) - length(rtrim(name, '.'))) from packages;") == "180\n"
