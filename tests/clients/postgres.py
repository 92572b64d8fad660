"""A PostgreSQL cluster and its user: initialised natively, then run on any copy or view of it."""

from __future__ import annotations

import pwd
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.rooms import Room
from tests.support.patience import patient

_SECONDS = patient(300.0)
_SCALE = 2
_CLIENTS, _TRANSACTIONS = 3, 150
#: Small buffers and segments: pages are evicted, files made and renamed, while the workload runs.
_SETTINGS = {
    "listen_addresses": "''", "shared_buffers": "1MB", "max_wal_size": "8MB", "min_wal_size": "2MB",
    "checkpoint_timeout": "30s", "fsync": "on", "autovacuum_naptime": "1s", "max_connections": "20",
}  # fmt: skip
#: pgbench's own transaction without the time, so that the result depends on the random numbers alone.
_TRANSACTION = """\
\\set aid random(1, 100000 * :scale)
\\set bid random(1, 1 * :scale)
\\set tid random(1, 10 * :scale)
\\set delta random(-5000, 5000)
begin;
update pgbench_accounts set abalance = abalance + :delta where aid = :aid;
update pgbench_tellers set tbalance = tbalance + :delta where tid = :tid;
update pgbench_branches set bbalance = bbalance + :delta where bid = :bid;
insert into pgbench_history (tid, bid, aid, delta) values (:tid, :bid, :aid, :delta);
commit;
"""
_TABLES = """\
create extension amcheck;
create table documents (id int primary key, body text, large bytea);
create index documents_body on documents using btree (md5(body));
create index documents_words on documents using gin (to_tsvector('simple', body));
insert into documents
    select n, repeat('word' || n || ' ', n % 900), decode(repeat(md5(n::text), n % 400), 'hex')
    from generate_series(1, 3000) n;
create table acknowledged (id serial primary key, filler text);
"""
_CHANGES = """\
update documents set body = body || ' changed' where id % 7 = 0;
delete from documents where id % 11 = 0;
update documents set large = null where id % 13 = 0;
vacuum full documents;
create index concurrently documents_size on documents (length(body));
alter table documents add column added int default 5;
truncate table pgbench_branches;
insert into pgbench_branches select n, 0, null from generate_series(1, 2) n;
reindex table pgbench_accounts;
cluster pgbench_tellers using pgbench_tellers_pkey;
checkpoint;
"""
_INSERT = "insert into acknowledged (filler) values (repeat('x', 500)) returning id;\n"
#: Every table in an order of its own, since the places of rows depend on who came first.
_CONTENT = """\
copy (select * from pgbench_accounts order by aid) to stdout;
copy (select * from pgbench_tellers order by tid) to stdout;
copy (select * from pgbench_branches order by bid) to stdout;
copy (select tid, bid, aid, delta from pgbench_history order by 1, 2, 3, 4) to stdout;
copy (select * from documents order by id) to stdout;
"""


@dataclass(frozen=True)
class Owner:
    """The user who owns a cluster and runs its server."""

    uid: int
    gid: int


def programs() -> Path:
    """The directory of the server's programs, or a skip."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or not (found[-1] / "pg_amcheck").exists():
        pytest.skip("PostgreSQL 14 or later is not installed; scripts/test --clients installs it")
    return found[-1]


def system_user() -> Owner:
    """The user of Debian's package."""
    account = pwd.getpwnam("postgres")
    return Owner(account.pw_uid, account.pw_gid)


class Cluster:
    """The cluster in the directory ``data`` of a room; ``sockets`` is a directory of its user's."""

    def __init__(self, room: Room, owner: Owner, data: Path, sockets: Path) -> None:
        self._room, self._owner, self._bin = room, owner, programs()
        self.data, self._sockets = data, sockets

    def call(
        self, program: str, *words: str | Path, script: str = ""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one of PostgreSQL's programs as the cluster's user, whatever its exit code."""
        return subprocess.run(
            self.command(program, *words), env=self.environment(), input=script.encode(),
            capture_output=True, timeout=_SECONDS,
        )  # fmt: skip

    def command(self, program: str, *words: str | Path) -> list[str]:
        """The command line for that."""
        user = ("--reuid", str(self._owner.uid), "--regid", str(self._owner.gid), "--clear-groups")
        return self._room.command("setpriv", *user, "--", self._bin / program, *words, root=True)

    def environment(self) -> dict[str, str]:
        """The environment for that."""
        more = {"PGHOST": str(self._sockets), "PGDATABASE": "postgres", "PGUSER": "postgres"}
        return {**self._room.environment(), **more, "HOME": str(self._sockets)}

    def run(self, program: str, *words: str | Path, script: str = "") -> bytes:
        """The output of one of PostgreSQL's programs, which must succeed."""
        done = self.call(program, *words, script=script)
        log = self._sockets / "log"
        said = log.read_text()[-3000:] if log.exists() else ""
        assert done.returncode == 0, (program, words, done.stdout[-2000:], done.stderr[-2000:], said)
        return done.stdout

    def sql(self, script: str) -> bytes:
        """The output of a script."""
        return self.run("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", script=script)

    def make(self) -> None:
        """Initialise it with page checksums and small segments, and fill it."""
        self.run(
            "initdb", "-D", self.data, "-k", "-A", "trust", "-U", "postgres", "--no-sync", "--no-locale",
            "-E", "UTF8", "--wal-segsize=1",
        )  # fmt: skip
        with self._room.path(self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{key} = {value}\n" for key, value in _SETTINGS.items())
        with self.running():
            self.run("pgbench", "-i", "-q", "-s", str(_SCALE))
            self.sql(_TABLES)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The server runs, and is shut down at the end."""
        options = f"-k {self._sockets}"
        # Not through pipes: the server keeps what pg_ctl had.
        words = ("-w", "-D", self.data, "-o", options, "-l", self._sockets / "log", "start")
        done = subprocess.run(
            self.command("pg_ctl", *words), env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, (self._sockets / "log").read_text()[-4000:]
        how = "immediate"
        try:
            yield
            how = "fast"
        finally:
            if self.call("pg_ctl", "-D", self.data, "status").returncode == 0:
                self.run("pg_ctl", "-w", "-D", self.data, "-m", how, "stop")

    def work(self) -> None:
        """Changes whose result does not depend on the order in which the clients come."""
        self.sql(_CHANGES)
        self.run(
            "pgbench", "-n", "-f", self._file("transaction", _TRANSACTION), "-s", str(_SCALE),
            "-c", str(_CLIENTS), "-t", str(_TRANSACTIONS), "--random-seed=7",
        )  # fmt: skip

    def _file(self, name: str, text: str) -> Path:
        path = self._sockets / name
        path.write_text(text)
        path.chmod(0o644)
        return path

    def insert(self, count: int) -> int:
        """Insert rows, one transaction each; the last one that the client was told of."""
        told = self.run("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", script=_INSERT * count)
        return int(told.splitlines()[-1])

    def kill_at_work(self) -> int:
        """Kill all processes of the server while a client inserts rows; the last one that it was told of."""
        script = self._file("inserts", _INSERT * 5000)
        with subprocess.Popen(
            self.command("psql", "-X", "-q", "-A", "-t", "-f", script), env=self.environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as client:  # fmt: skip
            assert client.stdout is not None
            told = [int(client.stdout.readline()) for _ in range(100)]
            # Of an ordinary user's mount root sees nothing.
            server = self._room.call("cat", self.data / "postmaster.pid").stdout.split()[0]
            children = f"$(cat /proc/{server}/task/{server}/children)"
            # One of them may end by itself meanwhile.
            end = f"of={children}; kill -9 {server}; for pid in $of; do kill -9 $pid || true; done"
            self._room.as_root("sh", "-ec", end)
            told += [int(line) for line in client.stdout.read().splitlines()]
        assert client.returncode != 0
        return told[-1]

    def content(self) -> bytes:
        """The schema and the rows of all tables whose content `work` determines."""
        schema = self.run("pg_dump", "--schema-only")
        # PostgreSQL 15.14 and later put a random word around a dump.
        random = (b"\\restrict", b"\\unrestrict")
        lines = [line for line in schema.splitlines() if not line.startswith(random)]
        return b"\n".join(lines) + self.sql(_CONTENT)

    def check(self) -> None:
        """Tables against indexes, and all rows of indexes in their tables."""
        assert self.run("pg_amcheck", "--all", "--heapallindexed", "--parent-check") == b""

    def check_pages(self) -> None:
        """The checksum of each page; the server must not run."""
        found = self.run("pg_checksums", "--check", "-D", self.data)
        assert b"Bad checksums:  0\n" in found, found
