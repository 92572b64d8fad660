"""A container cannot type into the terminal of its caller: TIOCSTI, ioctl_tty(2)."""

from __future__ import annotations

import pytest

from tests.mount.run_calls import Terminal
from tests.security.container_calls import PYTHON, Prison

_TYPE = """
import fcntl, os, termios
done = 0
names = ['/dev/tty', '/dev/console', '/proc/1/fd/0', '/proc/1/fd/1', '/proc/1/fd/2']
for place in [*range(20), *names]:
    try:
        fd = place if isinstance(place, int) else os.open(place, os.O_RDWR)
        for letter in b'touch /tmp/owned\\n':
            fcntl.ioctl(fd, termios.TIOCSTI, bytes([letter]))
        done += 1
    except OSError:
        pass
"""
_REDIRECTIONS = ("", "</dev/null", ">/dev/null", "2>/dev/null", "</dev/null >/dev/null", ">/dev/null 2>&1",
                 "| cat", "</dev/null >/dev/null 2>&1", "</dev/null 2>&1 | cat", "& wait")  # fmt: skip


@pytest.mark.parametrize("redirection", _REDIRECTIONS)
@pytest.mark.parametrize("filtered", [True, False])
def test_typing_into_the_callers_terminal(inside: Prison, redirection: str, filtered: bool) -> None:
    """The calling shell would read the typed text, whichever files it redirects."""
    box = inside.box
    options = [*box.system(), *([] if filtered else ["--security-opt", "seccomp=unconfined"])]
    shell = f'"$@" {redirection}; echo waits; read -t 0.3 typed; echo "typed<$typed>"'
    terminal = Terminal(box, "--rm", *options, "--", PYTHON, "-c", _TYPE, shell=shell)
    terminal.wait_for(b"waits")
    shown = terminal.wait_for(b">")
    assert shown.strip().endswith(b"typed<"), shown
    assert terminal.end() == 0
