"""`run -p`: a port of the host that leads to a container in a network of its own."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import Done, refused, wait_for
from tests.mount.run_calls import PROGRAMS, Life, lives
from tests.security.container_calls import PYTHON, prison
from tests.support.patience import patient
from unionfs.containers import network
from unionfs.errors import UserError
from unionfs.settings.ports import Port, parse_ports

_SERVE = "while :; do nc -l -p 80 -e echo $NAME; done"
_ECHO_UDP = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 53))\n"
    "print('up', flush=True)\n"
    "while True: data, who = s.recvfrom(100); s.sendto(data[::-1], who)"
)
needs_slirp = pytest.mark.skipif(
    shutil.which("slirp4netns") is None or not os.path.exists("/dev/net/tun"),
    reason="slirp4netns or /dev/net/tun is missing",
)


@pytest.fixture
def box(root: None, area: Path, runtime: str) -> Iterator[Life]:
    with lives(Life, area, runtime) as found:
        (found.base / "bin/nc").symlink_to("busybox")
        yield found


def free_port() -> int:
    """A port that neither an outgoing connection nor, probably, another test takes meanwhile."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("0.0.0.0", port))
            return port


def ask(port: int, address: str = "127.0.0.1") -> str:
    """What a TCP server says; empty if there is none."""
    try:
        with socket.create_connection((address, port), timeout=patient(5)) as client:
            return client.makefile().read()
    except OSError:
        return ""


def ask_udp(port: int) -> bytes:
    """What a UDP server answers; by an address that is not loopback, which slirp4netns keeps apart."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this host has no route")
        address = asked.getsockname()[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(patient(1))
        client.sendto(b"abc", (address, port))
        try:
            return client.recv(100)
        except OSError:
            return b""


@needs_slirp
@pytest.mark.parametrize("user", [[], ["--user", "7:8"]])
def test_two_containers_with_the_same_port(box: Life, user: list[str]) -> None:
    """Also below 1024, for any user; the ports end with the container."""
    first, second = free_port(), free_port()
    for name, port in (("first", first), ("second", second)):
        box.ok(
            "run", "-d", "--name", name, "-p", f"127.0.0.1:{port}:80", "-e", f"NAME={name}", *user,
            "-l", box.base, "--", "sh", "-c", _SERVE,
        )  # fmt: skip
    for name, port in (("first", first), ("second", second)):
        assert wait_for(lambda name=name, port=port: ask(port) == f"{name}\n")  # type: ignore[misc]
        assert box.state(name)["ports"] == [f"127.0.0.1:{port}->80/tcp"]
    assert f"127.0.0.1:{first}->80/tcp" in box.ok("ps")
    assert box.ok("ps", "--filter", "name=first", "--format", "{{.Ports}}") == f"127.0.0.1:{first}->80/tcp\n"
    links = box.ok("exec", "first", "ls", "-l", "/proc/self/ns/net")
    assert os.readlink("/proc/self/ns/net") not in links
    refused(
        box.call("run", "--rm", "-p", f"{first}:80", "-l", box.base, "--", "true"),
        f"port {first}/tcp at 0.0.0.0 cannot be opened", "in use",
    )  # fmt: skip
    assert box.kept() == ["first", "second"]
    assert box.ok("stop", "-t", "0", "first") == "first\n"
    assert wait_for(lambda: ask(first) == "")
    assert box.state("first")["ports"] == []
    assert ask(second) == "second\n"


@needs_slirp
def test_udp(box: Life) -> None:
    port = free_port()
    words = ("-p", f"{port}:53/udp", "-l", box.base, *box.system(), "--", PYTHON, "-c", _ECHO_UDP)
    box.ok("run", "-d", "--name", "dns", *words)
    assert wait_for(lambda: box.said("dns", "up"))
    assert wait_for(lambda: ask_udp(port) == b"cba")
    assert box.state("dns")["ports"] == [f"0.0.0.0:{port}->53/udp"]


@needs_slirp
def test_the_host_s_loopback_is_out_of_reach(box: Life) -> None:
    """Not by the container's own loopback, nor by the address of its gateway."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        script = (
            "import socket\n"
            "for host in ('127.0.0.1', '10.0.2.2'):\n"
            f"    try: socket.create_connection((host, {port}), timeout=2); print('reached', host)\n"
            "    except OSError as error: print('refused')\n"
        )
        words = ("-p", f"{free_port()}:80", "-l", box.base, *box.system(), "--", PYTHON, "-c", script)
        assert box.ok("run", "--rm", *words) == "refused\nrefused\n"
        with pytest.raises(TimeoutError):
            server.accept()


@needs_slirp
def test_it_ends_with_its_runner(box: Life) -> None:
    port = free_port()
    words = ("-p", f"127.0.0.1:{port}:80", "-e", "NAME=up", "--", "sh", "-c", f"echo on; {_SERVE}")
    process = box.start("--rm", *words)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    assert wait_for(lambda: ask(port) == "up\n")
    process.kill()
    process.communicate(timeout=patient(20))
    assert wait_for(lambda: ask(port) == "")
    assert wait_for(box.is_over)


@pytest.mark.parametrize("program", ["pasta", "slirp4netns"])
def test_without_root(root: None, area: Path, runtime: str, program: str) -> None:
    path = shutil.which(program)
    if path is None or not os.path.exists("/dev/net/tun"):
        pytest.skip(f"{program} or /dev/net/tun is missing")
    port = free_port()
    with prison(area, "user", runtime) as inmate:
        assert inmate.host is not None
        tun = area / "tun"
        os.mknod(tun, 0o20666, os.makedev(10, 200))
        os.chmod(tun, 0o666)
        inmate.host.root("mount", "--bind", tun, "/dev/net/tun")
        programs = area / "programs"
        programs.mkdir()
        for name in (program, PROGRAMS[runtime], "fusermount3"):
            (programs / name).symlink_to(path if name == program else shutil.which(name) or "")
        inmate.path = str(programs)
        (inmate.box.base / "bin/nc").symlink_to("busybox")
        root = ("--root", inmate.box.root)
        done = inmate.call(
            "-d", "--name", "web", "-p", f"127.0.0.1:{port}:80", "-e", "NAME=user", "--", "sh", "-c", _SERVE
        )
        if (runtime, program) == ("crun", "slirp4netns"):
            assert (done.returncode, "needs pasta" in done.stderr) == (125, True), done
            return
        try:
            assert done.returncode == 0, done
            assert wait_for(lambda: ask(port) == "user\n")
            shown = inmate.unionfs("exec", *root, "web", "cat", "/etc/resolv.conf").stdout
            assert shown == f"nameserver {getattr(network, program.capitalize()).nameserver}\n"
        finally:
            inmate.unionfs("rm", *root, "-f", "web")
    assert wait_for(lambda: ask(port) == "")


def test_without_a_program(box: Life) -> None:
    """The host's network, and a sentence that says so."""
    programs = box.area / "programs"
    programs.mkdir()
    for name in (*PROGRAMS.values(), "fusermount3", "env"):
        if (path := shutil.which(name)) is not None:
            (programs / name).symlink_to(path)
    words = ("-p", "8080:80", "-l", box.base, "--", "ls", "-l", "/proc/self/ns/net")
    done = box.call("run", "--rm", *words, PATH=str(programs))
    assert done.returncode == 0, done
    assert os.readlink("/proc/self/ns/net") in done.stdout
    assert done.stderr.startswith("unionfs: -p needs pasta or slirp4netns")
    assert done.stderr.count("\n") == 1
    done = box.call("run", "-d", "--name", "web", *words, PATH=str(programs))
    assert (done.returncode, done.stdout) == (0, "web\n")
    assert done.stderr.startswith("unionfs: -p needs pasta or slirp4netns")


def test_with_another_network(box: Life) -> None:
    words = ("-p", "8080:80", "-l", box.base, "--", "ls", "-l", "/proc/self/ns/net")
    refused(box.call("run", "--rm", "--net", "none", *words), "--net none has no network")
    done: Done = box.call("run", "--rm", "--net", "host", *words)
    assert done.returncode == 0
    assert os.readlink("/proc/self/ns/net") in done.stdout
    assert done.stderr == "unionfs: with --net host the ports of the command are the host's; -p is ignored.\n"


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("8080:80", Port("0.0.0.0", 8080, 80)),
        ("127.0.0.1:1:65535/udp", Port("127.0.0.1", 1, 65535, "udp")),
        ("5:6/tcp", Port("0.0.0.0", 5, 6, "tcp")),
    ],
)
def test_spelling(text: str, port: Port) -> None:
    assert parse_ports([text]) == (port,)


@pytest.mark.parametrize(
    "texts",
    [
        ["80"], [""], ["0:80"], ["80:65536"], ["80:80/sctp"], ["80:80/"], ["::1:80:80"], ["host:80:80"],
        ["8000-8001:80-81"], ["80:"], [":80"], ["1:80:"], ["٣:4"], ["+1:2"], ["5:6", "5:7"],
        ["127.0.0.1:5:6", "5:7"], ["5:6/udp", "127.0.0.1:5:7/udp"],
    ],
)  # fmt: skip
def test_bad_spelling(texts: list[str]) -> None:
    with pytest.raises(UserError, match="-p"):
        parse_ports(texts)


def test_sentences() -> None:
    with pytest.raises(UserError, match=r"^-p x:80: invalid port x; write a number from 1 to 65535\.$"):
        parse_ports(["x:80"])
    with pytest.raises(UserError, match=r"^-p h:8:80: invalid IPv4 address h; write "):
        parse_ports(["h:8:80"])
