"""`unionfs web` as a command: bad input, its address, its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.mount.cli_calls import REPOSITORY, call, gone, refused, unionfs, wait_for
from tests.support.patience import patient
from tests.web.browsing import WEB, Server, client


@pytest.mark.parametrize(("words", "parts"), [
    (["--address", "nosuch.example"], ["nosuch.example", "not an IP address", "127.0.0.1"]),
    (["--address", ""], ["--address", "not an IP address"]),
    (["--address", "127.0.0.1:80"], ["127.0.0.1:80", "not an IP address"]),
    (["--address", "192.0.2.1"], ["cannot listen", "192.0.2.1", "cannot assign"]),
    (["--port", "65536"], ["65536", "--help"]),
    (["--port", "-1"], ["-1", "--help"]),
    (["--port", "http"], ["http", "--help"]),
    (["--seconds", "0"], ["--seconds", "--help"]),
    (["--socket", "/dev/null"], ["/dev/null", "not a socket"]),
    (["--socket", "x" * 200], ["107 bytes", "shorter"]),
    (["--socket", "/run/x.sock", "--port", "1"], ["--socket", "--port", "--help"]),
    (["--root", ""], ["--root", "name one"]),
    (["more"], ["more", "--help"]),
])  # fmt: skip
def test_bad_input(words: list[str], parts: list[str]) -> None:
    refused(unionfs("web", *words), *parts)


def test_a_port_in_use(server: Server, tmp_path: Path) -> None:
    port = str(httpx.URL(server.base).port)
    refused(unionfs("web", "--port", port, "--root", tmp_path), port, "in use", "--port")


def test_an_address_that_cannot_be_printed(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*WEB, "--port", "0", "--root", str(tmp_path)], stdout=full, stderr=subprocess.PIPE, text=True,
            cwd="/", env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("unionfs: no space left on device")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["hypercorn", "starlette", "jinja2"])
def test_without_the_extra(missing: str) -> None:
    script = (
        f"import sys; sys.modules['{missing}'] = None; sys.argv = ['unionfs', 'web', '--port', '0']\n"
        "from unionfs.cli.main import main; main()"
    )
    refused(call((sys.executable, "-c", script)), missing, "pip install 'unionfs[web]'")


def test_ipv6(tmp_path: Path) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6")
    with Server(tmp_path / "root", "--port", "0", "--address", "::1") as server, client(server) as browser:
        assert server.base.startswith("http://[::1]:")
        assert "Mounts" in browser.text()


def test_another_address_is_told(tmp_path: Path) -> None:
    with Server(tmp_path / "root", "--port", "0", "--address", "0.0.0.0") as server, client(server):
        assert server.base.startswith("http://127.0.0.1:")
        assert "not encrypted" in server.end()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("connected", [False, True])
def test_the_end(server: Server, number: signal.Signals, connected: bool) -> None:
    (sampler,) = server.children()
    url = httpx.URL(server.base)
    with socket.socket() as idle:
        if connected:  # a connection that never asks does not keep it
            idle.connect((url.host, url.port))
            idle.sendall(b"GET / HTTP/1.1\r\n")
        assert server.end(number) == (0, "")
    assert gone(sampler)
    with pytest.raises(ConnectionRefusedError), socket.create_connection((url.host, url.port)):
        pass


def test_the_end_by_sigkill(server: Server) -> None:
    (sampler,) = server.children()
    server.process.kill()
    server.process.wait()
    assert wait_for(lambda: gone(sampler))


def test_a_killed_sampler(server: Server, tmp_path: Path) -> None:
    """The pages say so, and what needs no figures is still shown."""
    with client(server) as browser:
        os.kill(server.children()[0], signal.SIGKILL)
        assert "start the server again" in browser.wait_for("No new figures")
        assert "No volumes" in browser.text("volumes")


def test_nothing_of_a_request_is_logged(server: Server) -> None:
    with client(server) as browser:
        browser.get("nosuch")
    httpx.get(f"{server.base}/?token=wrong", timeout=patient(60))
    assert server.end() == (0, "")


def test_no_child_is_left(server: Server) -> None:
    with client(server) as browser:
        for page in ("volumes", "containers", "branches", "volumes?sizes"):
            browser.text(page)
    assert wait_for(lambda: len(server.children()) == 1)
