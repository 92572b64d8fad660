"""Typical uses of named volumes: databases whose union dies, uploads shared by two unions."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import call, succeed, unionfs, wait_for
from tests.support import areas
from tests.support.patience import patient
from tests.volumes.conftest import Store
from unionfs.daemon import live

pytestmark = pytest.mark.usefixtures("as_root")

Run = Callable[..., str]


def _mounts_volumes() -> bool:
    return "--volume" in unionfs("mount", "--help").stdout


@contextmanager
def _place(store: Store, area: Path, how: str) -> Iterator[Callable[[], tuple[Path, int]]]:
    """A function that mounts the named volume `data` in a union and returns its path and the daemon's pid."""
    (area / "lower").mkdir()
    (area / "merged").mkdir()
    if how == "driver":
        store.ok("create", "-d", "union", "-o", f"lower={area}/lower", "-o", "shared", "data")
    elif not _mounts_volumes():
        pytest.skip("this `unionfs mount` mounts no volumes")
    user = ""

    def up() -> tuple[Path, int]:
        nonlocal user
        if how == "driver":
            if user:
                areas.detach(area / "open")
                store.volumes().detach("data", user)
            user = "test"
            where = store.volumes().attach("data", user)
            # Other users may not enter the storage root; a container sees the volume elsewhere, too.
            (area / "open").mkdir(exist_ok=True)
            succeed(call(("mount", "--bind"), where, area / "open"))
            path = f"{area}/open"
        else:
            assert wait_for(lambda: not os.path.ismount(area / "merged"))
            for name in ("upper", "work"):
                (area / name).mkdir(exist_ok=True)
            words = ("-l", area / "lower", "-u", area / "upper", "-w", area / "work", "-v", "data:/data")
            succeed(unionfs("mount", *words, area / "merged", env={"UNIONFS_ROOT": str(store.root)}))
            path, where = f"{area}/merged/data", f"{area}/merged"
        daemon = next(entry for entry in live.live_mounts() if entry.settings.mountpoint == where)
        return Path(path), daemon.pid

    try:
        yield up
    finally:
        areas.detach(area / "merged")
        areas.detach(area / "open")
        if user:
            store.volumes().detach("data", user)


def _run_as(name: str, **environment: str) -> Run:
    def run(*words: str | Path, check: bool = True) -> str:
        account = pwd.getpwnam(name)
        done = subprocess.run(
            [
                "setpriv",
                "--reuid",
                str(account.pw_uid),
                "--regid",
                str(account.pw_gid),
                "--clear-groups",
                "--",
                *map(str, words),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            timeout=patient(170),
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
        )
        assert done.returncode == 0 or not check, (words, done.stdout, done.stderr)
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("how", ["driver", "mount"])
def test_postgresql(store: Store, area: Path, how: str) -> None:
    """initdb, pgbench, the daemon is killed, mounted again: the data is intact; also a pg_dump."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or not (found[-1] / "initdb").exists():
        pytest.skip("PostgreSQL is not installed")
    programs = found[-1]
    sockets = area / "sockets"
    sockets.mkdir()
    shutil.chown(sockets, "postgres")
    run = _run_as("postgres", PGHOST=str(sockets), PGPORT="54321", PGDATABASE="postgres", PGUSER="postgres")

    def control(data: Path, *words: str) -> None:
        options = f"-k {sockets} -p 54321 -c listen_addresses="
        run(programs / "pg_ctl", "-w", "-D", data / "pg", "-o", options, "-l", sockets / "log", *words)

    with _place(store, area, how) as up:
        data, daemon = up()
        shutil.chown(data, "postgres")
        run(programs / "initdb", "-D", data / "pg", "-A", "trust")
        control(data, "start")
        server = int((data / "pg/postmaster.pid").read_text().split()[0])
        run(programs / "pgbench", "-i", "-q", "-s", "1")
        run(programs / "pgbench", "-c", "2", "-t", "200")
        count = run(programs / "psql", "-Atc", "select count(*) from pgbench_history")
        assert count == "400\n"
        (area / "dump.sql").write_text(run(programs / "pg_dump", "-t", "pgbench_history"))
        os.kill(daemon, signal.SIGKILL)
        os.kill(server, signal.SIGQUIT)  # immediate shutdown: its storage is gone
        assert wait_for(lambda: not os.path.exists(f"/proc/{server}") or "Z" in _state(server), 60)
        data, daemon = up()
        assert daemon != server
        (data / "pg/postmaster.pid").unlink(missing_ok=True)
        control(data, "start")
        try:
            assert run(programs / "psql", "-Atc", "select count(*) from pgbench_history") == count
            run(programs / "psql", "-c", "drop table pgbench_history")
            run(programs / "psql", "-q", "-f", _readable(area / "dump.sql"))
            assert run(programs / "psql", "-Atc", "select count(*) from pgbench_history") == count
            # a backup of the running volume contains a database that recovers
            store.ok("backup", "data", "-o", area / "b.tar.zst")
        finally:
            control(data, "stop", "-m", "immediate")


def _readable(path: Path) -> Path:
    path.chmod(0o644)
    return path


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["driver", "mount"])
def test_mariadb(store: Store, area: Path, how: str) -> None:
    """The same with MariaDB."""
    if shutil.which("mariadbd", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("MariaDB is not installed")
    run = _run_as("mysql")
    sockets = area / "sockets"
    sockets.mkdir()
    shutil.chown(sockets, "mysql")
    client = ("mariadb", "--no-defaults", "-S", sockets / "s", "-u", "root", "-N", "-B", "-e")
    servers: list[subprocess.Popen[bytes]] = []

    def start(data: Path) -> subprocess.Popen[bytes]:
        server = subprocess.Popen(
            [
                "/usr/sbin/mariadbd",
                "--no-defaults",
                "--user=mysql",
                f"--datadir={data}/db",
                f"--socket={sockets}/s",
                "--skip-networking",
                "--skip-grant-tables",
                f"--pid-file={sockets}/pid",
                f"--log-error={sockets}/log",
            ],
            cwd="/",
        )
        servers.append(server)
        assert wait_for(lambda: run(*client, "select 1", check=False) == "1\n", 60)
        return server

    with _place(store, area, how) as up:
        try:
            data, daemon = up()
            shutil.chown(data, "mysql")
            run(
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={data}/db",
                "--auth-root-authentication-method=normal",
            )
            server = start(data)
            run(*client, "create database shop; create table shop.t (n int) engine=innodb")
            for number in range(50):
                run(*client, f"insert into shop.t values ({number})")
            os.kill(daemon, signal.SIGKILL)
            server.kill()
            server.wait()
            data, _ = up()
            start(data)
            assert run(*client, "select count(*), sum(n) from shop.t") == "50\t1225\n"
        finally:
            for server in servers:
                server.kill()
                server.wait()


def test_uploads_that_two_unions_share(store: Store, area: Path) -> None:
    """An api writes, a worker reads; the worker may not write."""
    if not _mounts_volumes():
        pytest.skip("this `unionfs mount` mounts no volumes")
    for name in ("api", "worker"):
        for part in ("lower", "upper", "work", "merged"):
            (area / name / part).mkdir(parents=True)
    environment = {"UNIONFS_ROOT": str(store.root)}

    def mount(name: str, volume: str) -> Path:
        place = area / name
        words = ("-l", place / "lower", "-u", place / "upper", "-w", place / "work", "-v", volume)
        succeed(unionfs("mount", *words, place / "merged", env=environment))
        return place / "merged/srv/uploads"

    api, worker = mount("api", "uploads:/srv/uploads"), mount("worker", "uploads:/srv/uploads:ro")
    try:
        (api / "picture").write_text("pixels")
        assert (worker / "picture").read_text() == "pixels"
        with pytest.raises(OSError, match="Read-only"):
            (worker / "other").touch()
        done = store("rm", "uploads")
        assert done.returncode == 1
        assert f"the mount {area}/api/merged" in done.stderr
        assert f"the mount {area}/worker/merged" in done.stderr
        store.ok("backup", "uploads", "-o", area / "b.tar")
    finally:
        for name in ("api", "worker"):
            unionfs("umount", area / name / "merged", env=environment)
    assert store.volumes().users("uploads") == []
    store.ok("rm", "uploads")
