"""A workload like that of a package manager's database, as SQL for sqlite3(1): the same bytes on each run."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

from tests.clients.support import run

_TABLES = """
create table packages (id integer primary key, name text unique, blob blob);
create table files (path text, package integer, digest blob);
create index files_path on files (path);
create index files_package on files (package);
"""


def make_database(path: Path, megabytes: float) -> int:
    """Create a database of about this size, with a seed of its own; returns the number of packages."""
    rng = random.Random(7)
    packages = max(20, int(megabytes * 25))
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path)
    db.executescript(_TABLES)
    for number in range(packages):
        db.execute("insert into packages values (?, ?, ?)", (number, f"p{number}", rng.randbytes(30_000)))
        rows = [(f"/usr/{number}/{n}", number, rng.randbytes(32)) for n in range(60)]
        db.executemany("insert into files values (?, ?, ?)", rows)
    db.commit()
    db.close()
    return packages


def workload(seed: int, packages: int, journal: str, *, steps: int = 60) -> str:
    """Changes at random places; ends with a check, and with everything in the database file."""
    rng = random.Random(seed)
    out = [f"pragma journal_mode={journal};", "pragma mmap_size=268435456;", "pragma cache_size=50;"]
    for step in range(steps):
        number = rng.randrange(packages)
        out.append("begin immediate;")
        match rng.randrange(4):
            case 0:
                blob = rng.randbytes(rng.choice((10, 5_000, 40_000))).hex()
                out.append(f"update packages set blob = x'{blob}' where id = {number};")
            case 1:
                out.append(f"delete from files where package = {number};")
            case 2:
                out += [
                    f"insert into files values ('/new/{step}/{n}', {number}, x'{rng.randbytes(32).hex()}');"
                    for n in range(20)
                ]
            case _:
                digest = rng.randbytes(32).hex()
                out.append(f"update files set digest = x'{digest}' where package = {number};")
        out.append("rollback;" if rng.random() < 0.1 else "commit;")
        if step % 20 == 0:
            out.append("select count(*), sum(length(blob)) from packages;")
    return "\n".join([*out, "pragma integrity_check;", "pragma wal_checkpoint(truncate);", ""])


def writer(name: str, rounds: int) -> str:
    """The SQL of one of several processes at once; each has rows of its own."""
    out = [".timeout 60000"]
    for number in range(rounds):
        out += [
            "begin immediate;",
            f"insert into files values ('/{name}/{number}', {number}, zeroblob({number * 37 % 4000}));",
            f"update packages set name = name || '.' where id = {number % 20};",
            "commit;",
        ]
    return "\n".join([*out, ""])


def program_tree(root: Path) -> None:
    """Put sqlite3(1) and the libraries it needs into a tree."""
    program = Path(shutil.which("sqlite3") or "")
    for line in run("ldd", program).splitlines():
        for word in line.split():
            if word.startswith("/"):
                there = root / word.lstrip("/")
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, there)
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy(program, root / "bin/sqlite3")
