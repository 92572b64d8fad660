"""Common uses of such mounts: a database, a C build, the start of a Python program, npm install."""

from __future__ import annotations

import shutil
import sys

from benchmarks.perf.area import Area
from benchmarks.perf.parts import IMPORTED, PACKAGE_FILES, ROWS_READ
from benchmarks.perf.workloads.base import Turn, Workload, timed

_IMPORT = f"import sys; sys.path.insert(0, 'site'); import {', '.join(IMPORTED)}"


def _no_npm(_area: Area) -> str | None:
    return None if shutil.which("npm") else "npm is not installed (apt-get install npm)"


def _npm_environment(turn: Turn) -> dict[str, str]:
    # Its cache is outside the union, as in real builds.
    return {
        "HOME": str(turn.area.root), "npm_config_cache": str(turn.area.root / "npm-cache"),
        "npm_config_update_notifier": "false", "npm_config_audit": "false", "npm_config_fund": "false",
        "npm_config_globalconfig": "/dev/null",
    }  # fmt: skip


def programs() -> tuple[Workload, ...]:
    """The group programs."""
    return (
        timed("sqlite-write", "programs", "SQLite: transactions of one row, each with fsync, a new database",
              lambda turn: ["sqlite3", "-batch", "new.db", f".read {turn.area.need('database')}/write.sql"],
              lambda sizes: sizes.transactions, lower=("database",), operation="transaction",
              lines=lambda sizes: 1, quick=True),
        timed("sqlite-read", "programs", "SQLite: rows by their key, and one pass over all, in the lower",
              lambda turn: ["sqlite3", "-batch", "-readonly", "database/rows.db", ".read database/read.sql"],
              lambda sizes: ROWS_READ, lower=("database",), operation="row", writes=False,
              lines=lambda sizes: ROWS_READ + 1, quick=True),
        timed("c-build", "programs", "make -j2 of a C program of many files",
              lambda turn: ["make", "-s", "-j2", "-C", "sources"],
              lambda sizes: sizes.sources, lower=("sources",), operation="source", check="./sources/program",
              quick=True),
        timed("python-imports", "programs", f"a Python that imports {', '.join(IMPORTED)} from the lower",
              lambda turn: [sys.executable, "-I", "-S", "-B", "-c", _IMPORT],
              lambda sizes: 1, lower=("site",), operation="start", writes=False, quick=True),
        timed("npm-install", "programs", f"npm install --offline, {PACKAGE_FILES} files per package",
              lambda turn: ["npm", "install", "--offline", "--ignore-scripts", "--silent", "--prefix", "npm"],
              lambda sizes: sizes.packages * PACKAGE_FILES, lower=("npm",), operation="file",
              environment=_npm_environment, check="[ -s npm/node_modules/perf-package-00/lib/part0.js ]",
              unless=_no_npm, quick=True),
    )  # fmt: skip
