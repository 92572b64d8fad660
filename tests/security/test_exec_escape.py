"""`unionfs exec` into a container that attacks it: what enters brings nothing along that helps it out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import Done, wait_for
from tests.security.container_calls import PYTHON, Prison

_WAIT = "echo up; while :; do sleep 0.1; done"


class Cell:
    """A detached container `cell`, and calls of `unionfs exec`."""

    def __init__(self, prison: Prison) -> None:
        self.prison = prison
        self.root = ("--root", prison.box.root)

    def up(self, *options: str | Path, script: str = _WAIT) -> None:
        done = self.prison.call("-d", "--name", "cell", *options, "--", "/usr/bin/bash", "-c", script)
        assert done.returncode == 0, done
        assert wait_for(lambda: "up\n" in self.said())

    def said(self) -> str:
        return self.prison.unionfs("logs", *self.root, "cell").stdout

    def exec(self, *words: str | Path) -> Done:
        return self.prison.unionfs("exec", *self.root, *words)

    def end(self) -> None:
        self.prison.unionfs("rm", "-f", *self.root, "cell")

    @property
    def record(self) -> Path:
        return self.prison.box.root / "containers/cell/entrance.json"


@pytest.fixture
def cell(inmate: Prison) -> Iterator[Cell]:
    found = Cell(inmate)
    yield found
    found.end()


@pytest.fixture
def roots_cell(inside: Prison) -> Iterator[Cell]:
    found = Cell(inside)
    yield found
    found.end()


_HUNTER = """
import os, sys
known, held, seen = set(os.listdir('/proc')), [], set()
print('up', flush=True)
while not os.path.exists('/tmp/over'):
    for pid in set(os.listdir('/proc')) - known:
        if not pid.isdigit(): continue
        for name in ('exe', 'cwd', 'root', 'environ', 'mem', 'fd'):
            path = f'/proc/{pid}/{name}'
            try:
                if name == 'fd':
                    for fd in os.listdir(path):
                        seen.add('fd ' + os.readlink(f'{path}/{fd}').split('[')[0])
                elif name in ('environ', 'mem'):
                    with open(path, 'rb') as file:
                        if name == 'environ': seen.add('environ ' + str('PYTHONPATH' in str(file.read())))
                else:
                    held.append((name, os.readlink(path), os.open(path, os.O_PATH)))
            except PermissionError: seen.add('denied ' + name)
            except OSError: pass
        with_exe = [entry for entry in held if entry[0] == 'exe']
for name, target, fd in held:
    path = f'/proc/self/fd/{fd}'
    if name == 'exe':
        for deed in ('write', 'chmod'):
            try:
                if deed == 'write': os.close(os.open(path, os.O_WRONLY))
                else: os.chmod(path, os.stat(path).st_mode & 0o7777)
                if not target.startswith('/bin/busybox'): seen.add(f'{deed} done {target}')
            except OSError as error: pass
    else:
        for up in ('.', '../../../../../../..'):
            if os.path.lexists(f'{path}/{up}/MARK'): seen.add(f'{name} outside')
with open('/tmp/seen', 'w') as file: print(*sorted(seen), sep='\\n', file=file)
"""


@pytest.mark.parametrize("options", [[], ["--cap-add", "SYS_PTRACE"]])
def test_what_enters_is_hunted(cell: Cell, options: list[str]) -> None:
    """A process of the container looks at each new one, before it has become the command."""
    if options and not cell.prison.is_root:
        pytest.skip("an ordinary user's container has no capabilities")
    mark = Path(tempfile.mkdtemp(prefix="mark-", dir="/tmp"))  # shared with other runs' PID namespaces
    try:
        hunter = _HUNTER.replace("MARK", f"tmp/{mark.name}").replace("'", "'\\''")
        cell.up(*options, script=f"{PYTHON} -c '{hunter}'; cat /tmp/seen; echo end; {_WAIT}")
        for _ in range(12):
            assert cell.exec("cell", "true").returncode == 0
        assert cell.exec("cell", "touch", "/tmp/over").returncode == 0
        assert wait_for(lambda: "end\n" in cell.said())
    finally:
        mark.rmdir()
    seen = set(cell.said().partition("up\n")[2].splitlines()) - {"end", "up"}
    assert not [line for line in seen if "done" in line or "outside" in line], seen
    assert "environ True" not in seen
    files = {line[3:] for line in seen if line.startswith("fd ")}
    own = ("/proc/", "/dev/", "/lib", "/usr/", "/etc/", "/tmp/over")  # what the commands themselves open
    assert not [name for name in files if name.startswith("/") and not name.startswith(own)], files
    # It was there to be seen.
    assert seen & {"denied exe", "fd pipe:"}, seen


def test_open_files_of_the_caller(cell: Cell) -> None:
    cell.up()
    script = "ls -l /proc/self/fd | grep -o '[0-9]* -> .*'; readlink /proc/self/cwd /proc/self/root"
    done = cell.exec("cell", "/usr/bin/bash", "-c", f"exec 2>&1; {script}")
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["/", "/"]
    for line in lines[:-2]:
        number, _, target = line.split(" ", 2)
        assert int(number) <= 2 or target.startswith("/proc/"), line
        assert target.startswith(("pipe:", "/proc/")), line


def test_a_workdir_that_is_an_open_file(cell: Cell) -> None:
    cell.up(script=f"ln -s /proc/self/fd /tmp/link; {_WAIT}")
    outside = cell.prison.area / "outside"
    outside.mkdir()
    own = [f"/proc/self/fd/{number}" for number in range(3, 24)]
    others = [f"{place}/{number}" for place in ("/tmp/link", "/proc/1/fd") for number in range(3, 7)]
    for path in own + others:
        done = cell.exec("-w", path, "cell", "/usr/bin/bash", "-c", f"ls -d {'../' * 9}{outside}")
        assert done.returncode == 126, done
        assert done.stdout == ""
    for path in ("/proc/self/cwd", "/proc/1/root", "/proc/self/root", "/proc/1/cwd"):
        done = cell.exec("-w", path, "cell", "/usr/bin/bash", "-c", f"ls -d {'../' * 9}{outside}; ls data")
        assert str(outside) not in done.stdout
        assert done.returncode == 126 or done.stdout == "seed\n", done


@pytest.mark.parametrize(
    "what",
    ["touch /dev/null", "mkfifo /dev/null", "ln -s /etc/passwd /dev/null", "mknod -m 666 /dev/null c 1 5"],
)
def test_another_null_device(roots_cell: Cell, what: str) -> None:
    roots_cell.up("--privileged", script=f"mount -t tmpfs none /dev && {what}; ls /dev; {_WAIT}")
    done = roots_cell.exec("-d", "cell", "/usr/bin/bash", "-c", "echo written; true")
    assert done.returncode == 125, done
    assert "the container's /dev/null is not that device" in done.stderr


def test_modules_of_the_container(roots_cell: Cell) -> None:
    """The interpreter that enters must not import from the container's tree."""
    base = roots_cell.prison.box.base
    evil = "open('/hacked', 'w').write('x')\n"
    library = Path(os.__file__).parent
    repository = Path(__file__).resolve().parents[2]
    for place in (base / str(library)[1:], base / str(repository)[1:] / "unionfs"):
        if str(place).startswith(f"{base}/usr"):
            place = base / "opt/evil"  # the host's /usr is mounted over it
        place.mkdir(parents=True, exist_ok=True)
        for name in sys.stdlib_module_names:
            (place / f"{name}.py").write_text(evil)
    roots_cell.prison.box.system = list  # type: ignore[method-assign]
    roots_cell.prison.call("-d", "--name", "cell", "--", "/bin/sh", "-c", _WAIT)
    assert wait_for(lambda: "up\n" in roots_cell.said())
    calls = ("cell", "true"), ("-w", "/none", "cell", "true"), ("-d", "cell", "true"), ("cell", "nosuch")
    for words in calls:
        roots_cell.exec("-e", "PYTHONPATH=/opt/evil", "-e", "PYTHONHOME=/opt/evil", *words)
    assert "hacked" not in roots_cell.exec("cell", "ls", "/").stdout.split()


def test_a_record_of_another_process(roots_cell: Cell) -> None:
    """The process that is joined is the one that was recorded, and its root is the container's."""
    roots_cell.up()
    record = json.loads(roots_cell.record.read_text())
    for change, part in (
        ({"root": [record["root"][0], record["root"][1] + 1]}, "cannot be entered"),
        ({"started": record["started"] + 1}, "cannot be entered"),
        ({"init": os.getpid()}, "cannot be entered"),
    ):
        roots_cell.record.write_text(json.dumps({**record, **change}))
        done = roots_cell.exec("cell", "true")
        assert done.returncode == 125
        assert part in done.stderr
        assert done.stderr.count("\n") == 1
    roots_cell.record.write_text(json.dumps(record))
    assert roots_cell.exec("cell", "true").returncode == 0


def test_only_its_owner_enters(cell: Cell) -> None:
    """Neither root a container of a user, whose record that user could forge, nor the other way round."""
    cell.up()
    if cell.prison.host is None:
        return
    other = Prison.__new__(Prison)
    other.__dict__.update(cell.prison.__dict__, host=None)
    done = other.unionfs("exec", *cell.root, "cell", "true")
    assert done.returncode == 125
    assert "belongs to uid" in done.stderr


def test_what_the_filter_and_the_bounding_set_refuse(cell: Cell) -> None:
    cell.up()
    for deed in ("unshare -U true", "unshare -m true", "mount -t tmpfs none /tmp", "nsenter -t 1 -m true"):
        done = cell.exec("cell", "/usr/bin/bash", "-c", deed)
        assert done.returncode != 0, deed
        assert any(word in done.stderr for word in ("not permitted", "denied", "superuser")), done


def test_signals_stay_inside(cell: Cell) -> None:
    cell.up()
    for target in ("0", "-1"):
        done = cell.exec("cell", "/usr/bin/bash", "-c", f"kill -KILL -- {target}; sleep 60")
        assert done.returncode in (137, 0), done


def test_a_key_of_the_host(cell: Cell) -> None:
    cell.up()
    mine = os.popen("keyctl show @s 2>/dev/null").read()
    if not mine:
        pytest.skip("keyctl is not installed, or there are no keyrings")
    done = cell.exec("cell", "/usr/bin/bash", "-c", "cat /proc/keys; keyctl add user unionfs-x y @s; true")
    assert "unionfs-x" not in os.popen("keyctl show @s").read()
    assert done.returncode == 0
