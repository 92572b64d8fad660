"""The content of the lower: trees, files, a database, sources; each created when a workload first needs it.

Everything is generated from the same seeds in every run, and nothing comes from a network.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import random
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.perf.processes import CommandFailed, run


@dataclass(frozen=True)
class Sizes:
    """The sizes of everything. The defaults are those of a whole run."""

    megabytes: int = 256
    """Of fio's file."""
    copy_up_megabytes: int = 1024
    """Of the copy-up workload's file."""
    entries: int = 100_000
    """Of the large tree for the memory per inode."""
    small_files: int = 5000
    tree_directories: int = 200
    tree_files: int = 2800
    repository_files: int = 3000
    names: int = 100_000
    """In one directory."""
    lowers: int = 500
    """The kernel's maximum (OVL_MAX_STACK of fs/overlayfs/super.c)."""
    sources: int = 120
    """C files."""
    transactions: int = 300
    rows: int = 100_000
    packages: int = 40
    """Of npm."""

    @property
    def tree_entries(self) -> int:
        """Files and directories of the tree."""
        return self.tree_directories + self.tree_files


#: For --quick.
QUICK = Sizes(
    megabytes=32, copy_up_megabytes=256, entries=20_000, small_files=1000, tree_directories=60,
    tree_files=840, repository_files=900, names=20_000, lowers=500, sources=30, transactions=100,
    rows=20_000, packages=10,
)  # fmt: skip

#: The word that grep looks for; it is in every tenth file of the tree.
WORD = "quagga"
#: Names that are looked up in the large directory, and created in it.
NAMES_USED = 1000
#: Rows that are read by their key.
ROWS_READ = 2000
#: What the Python program imports; their requirements come along.
IMPORTED = ("trio", "rich", "click", "jinja2")
#: Files of one npm package.
PACKAGE_FILES = 25
#: Files that each of the many lowers has under its own name, and those that all of them have.
SHARED_NAMES = 4

#: Git without user settings, and without writing a refreshed index.
GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_OPTIONAL_LOCKS": "0",
    "GIT_AUTHOR_NAME": "perf", "GIT_AUTHOR_EMAIL": "perf@localhost",
    "GIT_COMMITTER_NAME": "perf", "GIT_COMMITTER_EMAIL": "perf@localhost",
}  # fmt: skip
_LONG_AGO = 1_500_000_000


def make(part: str, path: Path, sizes: Sizes) -> None:
    """Create a part at `path`, which does not exist yet. Raises CommandFailed and OSError."""
    _MAKERS[part](path, sizes)


def bytes_needed(part: str, sizes: Sizes) -> int:
    """The approximate space of a part on its filesystem."""
    many = {"many": sizes.entries, "names": sizes.names}
    if part in many:
        return many[part] * 1024
    return {"big": sizes.megabytes << 20, "huge": sizes.copy_up_megabytes << 20}.get(part, 48 << 20)


def _random_file(path: Path, megabytes: int) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(block)


def _big(path: Path, sizes: Sizes) -> None:
    _random_file(path, sizes.megabytes)


def _huge(path: Path, sizes: Sizes) -> None:
    _random_file(path, sizes.copy_up_megabytes)


def _many(path: Path, sizes: Sizes) -> None:
    path.mkdir()
    for number in range(sizes.entries):
        directory = path / f"d{number // 100:05}"
        if number % 100 == 0:
            directory.mkdir()
        os.mknod(f"{directory}/file{number:07}")


def _names(path: Path, sizes: Sizes) -> None:
    path.mkdir()
    for number in range(sizes.names):
        os.mknod(f"{path}/name{number:07}")


def _lowers(path: Path, sizes: Sizes) -> None:
    """The stacked directories: each has its own name, and names that all have."""
    for number in range(sizes.lowers):
        shared = path / f"l{number}" / "shared"
        shared.mkdir(parents=True)
        os.mknod(f"{shared.parent}/name{number:07}")
        for name in range(SHARED_NAMES):
            os.mknod(f"{shared}/file{name}")


def _small(path: Path, sizes: Sizes) -> None:
    for number in range(sizes.small_files):
        # small_files.c builds the same names.
        file = path / f"{number // 100:02}" / f"f{number:04}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 1023 + b"\n")


def _text(dice: random.Random, number: int) -> str:
    words = [f"word{dice.randrange(2000)}" for _ in range(dice.randrange(50, 800))]
    if number % 10 == 0:
        words[len(words) // 2] = WORD
    return "\n".join(" ".join(words[at : at + 12]) for at in range(0, len(words), 12)) + "\n"


def _files(path: Path, directories: int, files: int) -> None:
    """`files` text files of a few KiB in `directories` directories; the same every time."""
    dice = random.Random(1)
    places = [path]
    while len(places) < directories:
        parent = places[(len(places) - 1) // 6]
        places.append(parent / f"dir{len(places):03}")
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        file = places[number % directories] / f"file{number:04}.txt"
        file.write_text(_text(dice, number))
        file.chmod(0o644)
        # Git rereads a file that is as young as its index.
        os.utime(file, (_LONG_AGO, _LONG_AGO))


def _tree(path: Path, sizes: Sizes) -> None:
    _files(path, sizes.tree_directories, sizes.tree_files)


def _repo(path: Path, sizes: Sizes) -> None:
    _files(path, sizes.tree_directories, sizes.repository_files)
    for words in (
        ("init", "-q", "."),
        # Device and inode numbers and ctime differ between mounts. All contestants must do the same work:
        # request all attributes, and not read unchanged files.
        ("config", "core.checkStat", "minimal"),
        ("config", "core.trustctime", "false"),
        ("add", "-A"),
        ("commit", "-q", "-m", "all"),
        ("gc", "-q"),
    ):
        run(["git", *words], cwd=path, environment=GIT_ENVIRONMENT)


def _database(path: Path, sizes: Sizes) -> None:
    path.mkdir()
    lines = [
        "PRAGMA journal_mode=DELETE;",
        "CREATE TABLE rows(id INTEGER PRIMARY KEY, name TEXT, payload TEXT);",
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {sizes.rows})"
        " INSERT INTO rows SELECT i, 'name' || (i * 7919 % 100003), hex(zeroblob(60)) FROM n;",
        "CREATE INDEX by_name ON rows(name);",
    ]
    (path / "make.sql").write_text("\n".join(lines))
    run(["sqlite3", "-batch", str(path / "rows.db"), f".read {path / 'make.sql'}"])
    dice = random.Random(2)
    keys = [dice.randrange(1, sizes.rows) for _ in range(ROWS_READ)]
    (path / "read.sql").write_text(
        "".join(f"SELECT id, name FROM rows WHERE id={key};\n" for key in keys)
        + "SELECT count(*), sum(length(payload)) FROM rows;\n"
    )
    (path / "write.sql").write_text(
        "PRAGMA synchronous=FULL;\nCREATE TABLE rows(id INTEGER PRIMARY KEY, payload TEXT);\n"
        + "INSERT INTO rows(payload) VALUES(hex(zeroblob(60)));\n" * sizes.transactions
        + "SELECT count(*) FROM rows;\n"
    )


def _sources(path: Path, sizes: Sizes) -> None:
    """A C program of many small files, each with a header, and a Makefile."""
    (path / "include").mkdir(parents=True)
    count = sizes.sources
    for number in range(count):
        (path / "include" / f"part{number:03}.h").write_text(
            f"#ifndef PART{number}\n#define PART{number}\n#include <stddef.h>\n"
            f"int part{number:03}(const char *text, size_t length);\n#endif\n"
        )
        others = sorted({(number + step) % count for step in (1, 7, 31)} - {number})
        includes = "".join(f'#include "part{each:03}.h"\n' for each in (number, *others))
        calls = "".join(f"    sum += length > {each} ? {each} : text[0];\n" for each in others)
        (path / f"part{number:03}.c").write_text(
            f"#include <stdio.h>\n#include <string.h>\n{includes}\n"
            f"int part{number:03}(const char *text, size_t length) {{\n    int sum = {number};\n{calls}"
            f"    for (size_t at = 0; at < length; at++) sum = sum * 31 + text[at];\n    return sum;\n}}\n"
        )
    includes = "".join(f'#include "part{number:03}.h"\n' for number in range(count))
    calls = "".join(f'    sum += part{number:03}("perf", 4);\n' for number in range(count))
    (path / "main.c").write_text(
        f"#include <stdio.h>\n{includes}\nint main(void) {{\n    int sum = 0;\n{calls}"
        '    printf("%d\\n", sum);\n}\n'
    )
    (path / "Makefile").write_text(
        "objects = $(patsubst %.c,%.o,$(wildcard *.c))\n"
        "program: $(objects)\n\t$(CC) -o $@ $^\n"
        "%.o: %.c\n\t$(CC) -Iinclude -c -o $@ $<\n"
    )


def _site(path: Path, _sizes: Sizes) -> None:
    """The packages of IMPORTED with their requirements, as installed in this environment."""
    path.mkdir()
    todo, seen = list(IMPORTED), set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform or Python
            continue
        for requirement in found.requires or ():
            if "extra ==" not in requirement and (word := re.match(r"[\w.-]+", requirement)):
                todo.append(word[0])
        for file in found.files or ():
            source = Path(str(found.locate_file(file)))
            if ".." not in file.parts and source.is_file():
                target = path / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
    if not (path / "trio").is_dir():
        raise CommandFailed("trio is not installed as a package, so there is nothing to import")
    # Packages with and without compiled modules must not differ; a .pyc is validated by its source's mtime,
    # which copying preserves.
    run([sys.executable, "-m", "compileall", "-q", "-x", r"tests?/", str(path)])


def _npm(path: Path, sizes: Sizes) -> None:
    """A project and its dependencies, each a tarball as by `npm pack`."""
    (path / "packages").mkdir(parents=True)
    dependencies = {}
    for number in range(sizes.packages):
        name = f"perf-package-{number:02}"
        manifest = {"name": name, "version": "1.0.0", "main": "index.js", "license": "MIT"}
        files = {"package.json": json.dumps(manifest), "index.js": f"module.exports = {number};\n"}
        for each in range(PACKAGE_FILES - len(files)):
            files[f"lib/part{each}.js"] = f"exports.part = {each};\n" * (20 + each)
        tarball = path / "packages" / f"{name}-1.0.0.tgz"
        with tarfile.open(tarball, "w:gz", compresslevel=1) as archive:
            for inner, text in files.items():
                data = text.encode()
                entry = tarfile.TarInfo(f"package/{inner}")
                entry.size, entry.mode, entry.mtime = len(data), 0o644, _LONG_AGO
                archive.addfile(entry, io.BytesIO(data))
        dependencies[name] = f"file:packages/{tarball.name}"
    project = {"name": "perf", "version": "1.0.0", "private": True, "dependencies": dependencies}
    (path / "package.json").write_text(json.dumps(project))


_MAKERS: dict[str, Callable[[Path, Sizes], None]] = {
    "big": _big, "huge": _huge, "many": _many, "names": _names, "lowers": _lowers, "small": _small,
    "tree": _tree, "repo": _repo, "database": _database, "sources": _sources, "site": _site, "npm": _npm,
}  # fmt: skip
