"""Who may see the pages of `unionfs web`, and which headers a browser gets with them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.mount.cli_calls import Place
from tests.mount.user_calls import UID, Host
from tests.support.patience import patient
from tests.support.worker import Worker
from tests.web.browsing import Client, Markup, Server, client

SAFE = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def _closed(answer: httpx.Response) -> None:
    assert answer.status_code == 403
    assert "unionfs web" in answer.text
    assert "set-cookie" not in answer.headers


def test_nothing_without_a_token(server: Server, browser: Client, place: Place) -> None:
    place.mount()
    page = browser.wait_for(str(place.merged))
    name = page.partition("/mounts/")[2].partition('"')[0]
    paths = ["/", "/?token=", "/?token=x", "/?nosuch", f"{browser.path}/?token=x"]
    paths += [f"{browser.path}/{page}" for page in ("", "volumes", f"mounts/{name}", "static/style.css")]
    with httpx.Client(base_url=server.base, timeout=patient(60)) as stranger:
        for path in paths:
            answer = stranger.get(path)
            _closed(answer)
            assert str(place.merged) not in answer.text
            assert browser.path not in answer.text


@pytest.mark.parametrize("change", [
    lambda token: token[:-1], lambda token: f"{token}x", lambda token: f"{token}&token={token}",
    lambda token: token.swapcase(), lambda token: "%00", lambda token: "%ff%c3%a4",
])  # fmt: skip
def test_a_wrong_token(server: Server, change: object) -> None:
    assert callable(change)
    _, _, token = server.url.partition("token=")
    _closed(httpx.get(f"{server.base}/?token={change(token)}", timeout=patient(60)))


def test_the_token_buys_a_cookie(server: Server) -> None:
    answer = httpx.get(server.url, timeout=patient(60))
    assert answer.status_code == 200
    pair, *attributes = answer.headers["set-cookie"].split("; ")
    name, _, value = pair.partition("=")
    _, _, token = server.url.partition("token=")
    path = next(word.removeprefix("Path=") for word in attributes if word.startswith("Path="))
    assert sorted(attributes) == ["HttpOnly", f"Path={path}", "SameSite=Strict"]
    assert token not in (value, path)
    assert len(path) > 20
    assert token not in answer.text  # the address of the next page does not have it
    assert f"url={path}/" in answer.text
    for cookie in (f"{name}={value}x", f"{name}={token}", f"x{name}={value}", f"{name}=", "=;;,", "é"):
        headers = {"cookie": cookie.encode()}
        _closed(httpx.get(f"{server.base}{path}/", headers=headers, timeout=patient(60)))
    # Another server on this host may have set cookies that nobody can parse.
    headers = {"cookie": f'a="b; c=[; {name}={value}; d=\x80'.encode("latin-1")}
    assert httpx.get(f"{server.base}{path}/", headers=headers, timeout=patient(60)).status_code == 200
    # The cookie is for these pages only.
    for other in ("/", f"{path}x/", "/static/style.css", f"{path[:-1]}/"):
        _closed(httpx.get(f"{server.base}{other}", headers={"cookie": pair}, timeout=patient(60)))


def test_another_server_takes_no_cookie_of_this(server: Server, browser: Client, tmp_path: Path) -> None:
    with Server(tmp_path / "other", "--port", "0") as other, client(other) as stranger:
        cookie = "; ".join(f"{one.name}={one.value}" for one in browser.http.cookies.jar)
        _closed(httpx.get(f"{other.base}{stranger.path}/", headers={"cookie": cookie}, timeout=patient(60)))
        assert browser.path != stranger.path


@pytest.mark.parametrize("name", [
    "evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1",
    "127.1", "2130706433", "127.0.0.1:{port}@evil.example", "evil.example/127.0.0.1",
    "127.0.0.1 evil.example",
])  # fmt: skip
def test_another_host(browser: Client, name: str) -> None:
    """As after DNS rebinding; with the cookie, too."""
    port = browser.http.base_url.port
    answer = browser.get(headers={"host": name.format(port=port)})
    assert answer.status_code in (400, 421)
    assert "Mounts" not in answer.text


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "127.0.0.1:9", "localhost", "localhost:9", "[::1]:9", "10.1.2.3"]
)
def test_an_address_as_host(browser: Client, name: str) -> None:
    """An ssh tunnel has another port and, maybe, another address."""
    assert browser.get(headers={"host": name}).status_code == 200


def test_two_hosts_and_none(server: Server, browser: Client) -> None:
    parts = urlsplit(server.base)
    for head in ("HTTP/1.0\r\n", "HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n", "HTTP/1.1\r\n"):
        with socket.create_connection((parts.hostname, parts.port), timeout=patient(60)) as connection:
            connection.sendall(f"GET {browser.path}/ {head}\r\n".encode())
            answer = connection.makefile("rb").readline()
        assert answer.split()[1] in (b"400", b"421"), answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NOSUCH"])
def test_nothing_can_be_sent(browser: Client, method: str) -> None:
    for page in ("", "volumes", "mounts/1-1/diff", "nosuch"):
        answer = browser.http.request(method, f"{browser.path}/{page}", content=b"x=1")
        assert answer.status_code == 405
        assert answer.headers["allow"] == "GET, HEAD"


def test_head(browser: Client) -> None:
    whole, head = browser.get("volumes"), browser.http.head(f"{browser.path}/volumes")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


def test_every_answer_has_the_headers(server: Server, browser: Client) -> None:
    answers = [
        browser.get(page) for page in
        ("", "volumes", "containers", "branches", "mounts/1-1", "mounts/1-1/diff", "nosuch",
         "static/style.css", "static/refresh.js", "static/icon.svg", "static/../gate.py",
         "static/%2e%2e%2fgate.py")
    ]  # fmt: skip
    answers += [
        httpx.get(server.url, timeout=patient(60)), httpx.get(server.base, timeout=patient(60)),
        browser.get(headers={"host": "evil.example"}), browser.http.post("/"),
    ]  # fmt: skip
    assert {answer.status_code for answer in answers} == {200, 403, 404, 405, 421}
    for answer in answers:
        assert SAFE.items() <= dict(answer.headers).items(), answer.url
        rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["frame-ancestors"] == rules["form-action"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == "'self'"
        assert "server" not in answer.headers
    # Nothing comes from elsewhere, and nothing is in line.
    for answer in answers:
        if answer.headers["content-type"].startswith("text/html"):
            assert "http://" not in answer.text
            assert "https://" not in answer.text
            found = Markup(answer.text)
            assert "style" not in found.tags | found.attributes
            assert not any(name.startswith("on") for name in found.attributes)
            assert answer.text.count("<script") == answer.text.count("/static/refresh.js")


def test_a_websocket(server: Server, browser: Client) -> None:
    answer = browser.get(headers={
        "connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    })  # fmt: skip
    assert answer.status_code == 403


def test_a_unix_socket_is_for_this_user(root: None, tmp_path: Path, area: Path) -> None:
    area.chmod(0o755)
    path = area / "web.sock"
    with Server(tmp_path / "root", "--socket", path) as server:
        assert path.stat().st_mode & 0o777 == 0o600
        with client(server, transport=httpx.HTTPTransport(uds=str(path))) as browser:
            assert "Mounts" in browser.text()
        with Worker(1000, 1000, modules=["tests.web.test_access"]) as worker, pytest.raises(PermissionError):
            worker.call(connect, str(path))
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=patient(60)) as stranger:
            _closed(stranger.get("http://localhost/"))
        assert server.end()[0] == 0
    assert not path.exists()


def connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_an_ordinary_user_sees_only_his_own(place: Place, host: Host, tmp_path: Path, area: Path) -> None:
    others = area / "others"
    for name in ("", "lower", "upper", "work", "merged"):
        (others / name).mkdir()
    words = ("-l", others / "lower", "-u", others / "upper", "-w", others / "work", others / "merged")
    subprocess.run([sys.executable, "-m", "unionfs", "mount", *map(str, words)], check=True)
    host.mount()
    command = (
        "nsenter", "-t", str(host.holder.pid), "-m", "--wd=/",
        "setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--",
        "env", f"XDG_RUNTIME_DIR={host.runtime}", f"PYTHONPATH={os.pathsep.join(sys.path)}",
        *host.command, "web",
    )  # fmt: skip
    root = host.runtime / "root"
    with Server(root, "--port", "0", command=command) as server, client(server) as browser:
        page = browser.wait_for(str(place.merged))
        assert str(others) not in page
        name = page.partition("/mounts/")[2].partition('"')[0]
        assert str(place.upper) in browser.text(f"mounts/{name}")
        assert "changes nothing" in browser.text(f"mounts/{name}/diff")
