"""Real programs on a branch, committed: the tree is the one that they make directly."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.branches.branching import Branching, Tree, differing, tree
from tests.clients.test_python import make_wheel

MAKEFILE = """
prefix = out
install: all
\tinstall -d -m 0755 $(prefix)/bin $(prefix)/share
\tinstall -m 0755 hello $(prefix)/bin/hello
\tln -sf hello $(prefix)/bin/hi
\tinstall -m 0644 *.c $(prefix)/share
all: hello
hello: $(patsubst %.c,%.o,$(wildcard *.c))
\t$(CC) -o $@ $^
"""


def make_npm_package(base: Path) -> None:
    """A package of npm with 40 files and a program, as a tar archive."""
    values = {"name": "probe", "version": "1.0.0", "bin": {"probe": "./cli.js"}, "main": "index.js"}
    program = "#!/usr/bin/env node\nconsole.log(6)\n"
    files = {"package/package.json": json.dumps(values), "package/cli.js": program}
    files |= {f"package/lib/{number}/index.js": f"module.exports = {number}\n" for number in range(40)}
    with tarfile.open(base / "probe-1.0.0.tgz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(text), 500_000_000
            archive.addfile(member, io.BytesIO(text.encode()))
    (base / "package.json").write_text('{"name": "site", "version": "1.0.0", "private": true}\n')


@pytest.fixture
def project(branching: Branching) -> Branching:
    """A repository with two branches, 500 files, a program's source and a wheel."""
    base = branching.base
    (base / "tree").mkdir()
    for number in range(500):
        directory = base / "tree" / str(number % 10)
        directory.mkdir(exist_ok=True)
        (directory / f"{number}.txt").write_text(f"old {number}\n")
    (base / "main.c").write_text('int other(void); int main(void) { return other(); }\n')
    (base / "other.c").write_text("int other(void) { return 0; }\n")
    (base / "Makefile").write_text(MAKEFILE)
    make_wheel(base, "probe")
    make_npm_package(base)
    script = """
    export GIT_AUTHOR_DATE=2001-01-01T00:00:00Z GIT_COMMITTER_DATE=2001-01-01T00:00:00Z
    git init -q -b main .; git config user.name n; git config user.email e@example.org; git config gc.auto 0
    git add .; git commit -qm one; git checkout -qb next; git rm -qr tree/3; git mv tree/4 tree/four
    echo next > tree/5/5.txt; git commit -qam two; git checkout -q main
    """
    subprocess.run(["sh", "-ec", script], cwd=base, check=True)
    return branching


def comparable(root: Path) -> Tree:
    """Without what has times or the path in its content."""
    skipped = (b".git/index", b"logs/HEAD", b"hello", b".o", b"/RECORD", b"/direct_url.json")
    return {path: entry for path, entry in tree(root, times=False).items() if not path.endswith(skipped)}


@pytest.mark.slow
def test_they_make_what_they_make_directly(project: Branching, area: Path) -> None:
    pip = f"{sys.executable} -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check"
    scripts = {
        "git": "git checkout -q next",
        "edit": "for f in tree/*/*.txt; do sed -i s/old/new/ $f; done",
        "make": "make -s install",
        "pip": f"{pip} --target site probe-1.0-py3-none-any.whl",
        "rm": "rm -rf tree/[0-4]",
    }
    if shutil.which("npm") is not None:
        npm = "npm install --silent --offline --no-audit --no-fund --cache kept"
        scripts["npm"] = f"{npm} ./probe-1.0.0.tgz; node_modules/.bin/probe; rm -r kept"
    if shutil.which("make") is None or shutil.which("gcc") is None:
        pytest.skip("make or gcc is not installed")
    direct = area / "direct"
    shutil.copytree(project.base, direct, symlinks=True)
    for name, script in scripts.items():
        # The Python may be in /tmp, which is another one for the command.
        words = ["try", "-q", "--rw", sys.prefix, "--commit", "-n", name]
        done = project.unionfs(*words, "--", "sh", "-ec", script)
        assert (done.returncode, done.stderr) == (0, ""), (name, done)
        subprocess.run(["sh", "-ec", script], cwd=direct, check=True, stdout=subprocess.DEVNULL)
        assert differing(comparable(direct), comparable(project.base)) == {}, name
    assert subprocess.run([project.base / "out/bin/hi"], check=False).returncode == 0
    subprocess.run(["git", "fsck", "--strict"], cwd=project.base, check=True, capture_output=True)
    subprocess.run(["git", "checkout", "-q", "-f", "main"], cwd=project.base, check=True)
    status = subprocess.run(["git", "status", "--short"], cwd=project.base, capture_output=True, text=True)
    assert {line[:2] for line in status.stdout.splitlines()} <= {"??"}
