"""SQLite in WAL mode: shared memory maps, locks between processes, and a crash in the middle."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clients.support import run, union_over

pytestmark = pytest.mark.usefixtures("root")

WRITER = """
import sqlite3, sys, time
path, who, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
db = sqlite3.connect(path, timeout=60, isolation_level=None)
while True:
    try:
        assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
        break
    except sqlite3.OperationalError as error:
        # Of two that switch at once, one is told so at once, on every filesystem: no timeout counts here.
        if "locked" not in str(error):
            raise
        time.sleep(0.01)
for number in range(rounds):
    db.execute("begin immediate")
    total = db.execute("select total from counter").fetchone()[0]
    db.execute("update counter set total = ?", (total + 1,))
    db.execute("insert into entries values (?, ?, randomblob(300))", (who, number))
    db.execute("commit")
    print(number, flush=True)
"""


def start_writer(database: Path, who: str, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(database), who, str(rounds)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def make_database(path: Path) -> None:
    path.parent.mkdir(parents=True)
    db = sqlite3.connect(path)
    db.executescript(
        "create table counter (total integer); insert into counter values (0);"
        "create table entries (who text, number integer, data blob); create index i on entries (who, number);"
    )
    db.executemany("insert into entries values ('lower', ?, randomblob(900))", [(n,) for n in range(500)])
    db.commit()
    db.close()


def test_two_writers_and_a_reader(area: Path, session: str) -> None:
    rounds = 150
    make_database(area / "lower/data/base.db")
    with union_over(area / "lower", area, session) as merged:
        database = merged / "data/base.db"
        # this connection saw the database before it was copied up
        reader = sqlite3.connect(database, timeout=60)
        assert reader.execute("select count(*) from entries").fetchone() == (500,)
        writers = [start_writer(database, who, rounds) for who in ("one", "two")]
        seen = [0]
        while any(writer.poll() is None for writer in writers):
            total, entries = reader.execute(
                "select (select total from counter), (select count(*) from entries where who != 'lower')"
            ).fetchone()
            assert total == entries, "a transaction was seen in part"
            assert total >= seen[-1], "a transaction was lost again"
            seen.append(total)
            time.sleep(0.01)
        for writer in writers:
            output, _ = writer.communicate(timeout=60)
            assert writer.returncode == 0, output
        assert reader.execute("select total from counter").fetchone() == (2 * rounds,)
        assert len(set(seen)) > 3, "the reader never saw the writers at work"
        reader.close()
        assert run("sqlite3", database, "pragma integrity_check").strip() == "ok"
        dump = run("sqlite3", database, ".dump")
        assert not (merged / "data/base.db-wal").exists()
    assert run("sqlite3", area / "upper/data/base.db", ".dump") == dump


def test_a_writer_that_is_killed(area: Path, session: str) -> None:
    make_database(area / "lower/data/base.db")
    with union_over(area / "lower", area, session) as merged:
        database = merged / "data/base.db"
        writer = start_writer(database, "killed", 100_000)
        assert writer.stdout is not None
        done = [int(writer.stdout.readline()) for _ in range(20)][-1]
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with sqlite3.connect(database, timeout=60) as db:
            total, entries = db.execute(
                "select (select total from counter), (select count(*) from entries where who = 'killed')"
            ).fetchone()
            assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        db.close()
        assert total == entries > done
