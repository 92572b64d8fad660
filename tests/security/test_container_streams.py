"""The caller's files at stdin, stdout, and stderr: a container can only read and write them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, Done
from tests.security.container_calls import Prison
from tests.support.patience import patient


def shell(inside: Prison, line: str, script: str) -> Done:
    """Run a shell line in the host's directory; `"$@"` is a container with a script."""
    words = [*UNIONFS, *map(str, inside.words("--rm", "--", "/usr/bin/bash", "-c", script))]
    return subprocess.run(
        ["bash", "-c", line, "bash", *words], cwd=inside.box.host, capture_output=True, text=True,
        timeout=patient(60), stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


_MORE = (
    "for n in 0 1 2; do f=/proc/self/fd/$n; (echo PWNED >>$f; chmod 4777 $f; chown 1001 $f; touch -d @0 $f; "
    "setfattr -n user.x -v x $f) 2>/dev/null; [ -f $f ] && head -c 100 $f 1<>$f; : <>$f; done; true"
)


@pytest.mark.parametrize("line", ['"$@" <file', '"$@" >>file', '"$@" 2>>file', '"$@" <>file 1>&0 2>&0'])
def test_a_file_of_the_host(inside: Prison, line: str) -> None:
    """Its content is only read, or appended to; its owner, mode, and attributes stay."""
    file = inside.box.host / "file"
    file.write_text("of the host\n")
    before = file.stat()
    shell(inside, line, _MORE)
    after = file.stat()
    assert (after.st_mode, after.st_uid, os.listxattr(file)) == (before.st_mode, before.st_uid, [])
    if line == '"$@" <file':
        assert file.read_text() == "of the host\n"
        assert after.st_mtime_ns == before.st_mtime_ns
    elif ">>" in line:
        assert file.read_text().startswith("of the host\n")


def test_a_device_of_the_host(inside: Prison) -> None:
    """The most common one is /dev/null."""
    script = "k=; for n in 0 1 2; do k+=$(stat -Lc %F. /proc/$$/fd/$n); done; echo $k >&2"
    done = shell(inside, '"$@" </dev/null >/dev/null', script)
    assert done.stderr == "fifo.fifo.fifo.\n"


def test_a_socket_of_the_host(inside: Prison) -> None:
    ours, theirs = socket.socketpair()
    words = [*UNIONFS, *map(str, inside.words("--rm", "--", "/usr/bin/bash", "-c"))]
    process = subprocess.Popen(
        [*words, "stat -Lc %F /proc/self/fd/0; cat"], stdin=theirs, stdout=theirs, cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    theirs.close()
    with ours, ours.makefile("rb") as lines:
        ours.sendall(b"echoed\n")
        assert [lines.readline(), lines.readline()] == [b"fifo\n", b"echoed\n"]
        ours.shutdown(socket.SHUT_WR)
        assert lines.read() == b""
    assert process.wait(patient(20)) == 0


def test_end_of_the_input_and_of_the_output(inside: Prison) -> None:
    assert shell(inside, 'printf "a\\nb" | "$@"', "cat; echo; cat").stdout == "a\nb\n"
    assert shell(inside, '"$@" </dev/null', "cat; exit 3").returncode == 3
    done = shell(inside, '"$@" | head -n 1; echo ${PIPESTATUS[0]}', "yes")
    assert done.stdout == "y\n141\n"
    # The reader ends while no output is written.
    done = shell(inside, '"$@" | :; echo ${PIPESTATUS[0]}', "sleep 0.5; echo x; sleep 0.1; echo y; sleep 5")
    assert done.stdout == "141\n"
    # Unread input blocks no process.
    begin = time.monotonic()
    assert shell(inside, '"$@" < <(exec sleep 20 >/dev/null 2>&1)', "exit 4").returncode == 4
    assert time.monotonic() - begin < patient(10)


def test_what_is_not_read_stays(inside: Prison) -> None:
    (inside.box.host / "lines").write_text("".join(f"{number}\n" for number in range(1, 5)))
    line = 'while read -r n; do echo "line $n"; "$@"; done <lines'
    assert shell(inside, line, "true").stdout == "line 1\nline 2\nline 3\nline 4\n"
    done = shell(inside, '{ "$@"; cat; } <lines', "read -r n; echo container $n")
    assert done.stdout == "container 1\n2\n3\n4\n"


def test_order_of_stdout_and_stderr(inside: Prison) -> None:
    script = "for n in $(seq 300); do echo $n; echo $n >&2; done"
    expected = "".join(f"{number}\n{number}\n" for number in range(1, 301))
    assert shell(inside, '"$@" 2>&1', script).stdout == expected
    shell(inside, '"$@" >both 2>&1', script)
    assert (inside.box.host / "both").read_text() == expected
    done = shell(inside, '"$@"', script)
    assert done.stdout == done.stderr == "".join(f"{number}\n" for number in range(1, 301))


def test_output_that_cannot_be_written(inside: Prison) -> None:
    done = shell(inside, '"$@" >/dev/full', "echo x")
    assert done.returncode == 125
    assert "the command's output cannot be written: no space left on device" in done.stderr


def test_a_slow_reader(inside: Prison) -> None:
    """All output arrives, however long after the command's end; a signal ends the wait."""
    line = '"$@" | { sleep 1; wc -c; }'
    assert shell(inside, line, "head -c 130000 /dev/zero").stdout == "130000\n"
    words = [*UNIONFS, *map(str, inside.words("--rm", "--", "/usr/bin/bash", "-c"))]
    process = subprocess.Popen(
        [*words, "head -c 130000 /dev/zero; echo over >&2"], cwd="/", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == b"over\n"
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(patient(20))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("line", ['"$@" <big | cmp - big', 'cat big | "$@" | cmp - big'])
def test_much_data(inside: Prison, line: str) -> None:
    (inside.box.host / "big").write_bytes(os.urandom(1 << 20) * 200)
    begin = time.monotonic()
    done = shell(inside, f"{line} && echo same", "cat")
    assert (done.stdout, done.stderr) == ("same\n", "")
    assert time.monotonic() - begin < patient(20)
