"""Real programs on a union with storage: vite's live reload, nginx with a file of the host, a Debian."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import debian, node
from tests.mount import cli_calls
from tests.mount.cli_calls import refused, wait_for
from tests.support import areas, mounting
from tests.support.storage import Storage, storage
from unionfs.daemon import live

SYSTEM = [path for path in ("/usr", "/lib", "/lib64", "/bin", "/etc/alternatives") if os.path.isdir(path)]


@contextmanager
def running(arguments: list[str | Path], log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a separate process group, its output in a file; ended by SIGTERM."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/",
            env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY), **more}, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    except BaseException as error:
        error.add_note(log.read_text(errors="replace")[-4000:])
        raise
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def fetched(url: str) -> str | None:
    """The content of a URL, None while no server answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
            return text
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


# -- vite ---------------------------------------------------------------------------------------------


def make_site(site: Path) -> None:
    """A page whose module accepts a hot update of its import."""
    (site / "src").mkdir(parents=True)
    (site / "package.json").write_text('{"name": "site", "private": true, "scripts": {"dev": "vite"}}')
    (site / "vite.config.js").write_text(
        'export default { cacheDir: (process.env.TMPDIR || "/tmp") + "/vite-cache" }\n'
    )
    (site / "index.html").write_text('<script type="module" src="/src/main.js"></script>\n')
    (site / "src/main.js").write_text(
        'import { text } from "./text.js"\ndocument.body.textContent = text\n'
        'if (import.meta.hot) import.meta.hot.accept("./text.js", (now) => {})\n'
    )
    (site / "src/text.js").write_text('export const text = "before"\n')


def watch_a_change(port: int, site: Path) -> None:
    """The actions of a browser: load the page and its modules, wait for the update, load the new module."""
    url = f"http://localhost:{port}"
    assert wait_for(lambda: fetched(url) is not None, 40), "vite does not answer"
    assert "/src/main.js" in (fetched(url) or "")
    assert "text.js" in (fetched(f"{url}/src/main.js") or "")
    assert "before" in (fetched(f"{url}/src/text.js") or "")
    browser = node.HotUpdates(port)
    try:
        browser.wait_for("connected")
        # The ways of editors to save: written in place; and beside it, then renamed over it.
        for number, text in enumerate(("in place", "renamed")):
            if number:
                # chokidar, vite's watcher, drops a second change of a file within 50 ms.
                time.sleep(0.2)
            beside = site / "src/text.js.new"
            beside.write_text(f'export const text = "{text}"\n')
            if text == "renamed":
                beside.rename(site / "src/text.js")
            else:
                (site / "src/text.js").write_text(beside.read_text())
            (update,) = browser.wait_for("update")["updates"]
            assert update["type"] == "js-update"
            assert update["acceptedPath"] == "/src/text.js"
            assert text in (fetched(f"{url}{update['acceptedPath']}?t={update['timestamp']}") or "")
    finally:
        browser.close()


@pytest.fixture
def modules() -> Path:
    try:
        return node.vite_modules()
    except node.Unavailable as reason:
        pytest.skip(str(reason))


def test_live_reload(modules: Path, root: None, area: Path) -> None:
    """vite runs in the merged tree; its sources are a bind mount, changed on the host."""
    with storage(area) as one:
        make_site(one.host / "site")
        one.mount("-v", f"{one.host}/site:/app", "-v", f"{modules}:/app/node_modules:ro")
        port = node.free_port()
        vite = ["node", "node_modules/vite/bin/vite.js", "--port", str(port), "--strictPort"]
        with running(
            ["env", "-C", one.merged / "app", *vite, "--host", "127.0.0.1"], area / "vite.log"
        ):
            watch_a_change(port, one.host / "site")
        assert wait_for(lambda: one.unionfs("umount", one.merged).returncode == 0)
        # node_modules' mountpoint was created in the host's directory, as in Docker.
        assert os.listdir(one.host / "site/node_modules") == []


def test_live_reload_in_a_container(modules: Path, root: None, area: Path) -> None:
    """`unionfs run -v ./site:/app ... -- npm run dev`."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    base, site = area / "base", area / "site"
    for name in ("tmp", "root"):
        (base / name).mkdir(parents=True)
    make_site(site)
    port = node.free_port()
    system = [f"--mount=type=bind,src={path},dst={path},readonly" for path in SYSTEM]
    command = [
        *mounting.command(), "run", "--rm", "--name", "vite", "--root", area / "storage", "-l", base, *system,
        "-v", f"{site}:/app", "-v", f"{modules}:/app/node_modules:ro", "--workdir", "/app", "--",
        "npm", "run", "dev", "--", "--port", str(port), "--strictPort", "--host", "127.0.0.1",
    ]  # fmt: skip
    with running(command, area / "vite.log") as process:
        watch_a_change(port, site)
        process.terminate()
        assert process.wait(20) in (0, 128 + signal.SIGTERM)
    assert areas.mounts_below(area) == []
    assert os.listdir(area / "storage/containers") == []
    # npm leaves vite running when it ends; it ends with the container.
    assert "unionfs:" not in (area / "vite.log").read_text()
    assert fetched(f"http://localhost:{port}") is None


# -- nginx --------------------------------------------------------------------------------------------

_NGINX = """
daemon off; worker_processes 1; pid {run}/nginx.pid; error_log {run}/error.log; user root;
events {{ }}
http {{
    access_log {run}/access.log;
    client_body_temp_path {run}/b; proxy_temp_path {run}/p; fastcgi_temp_path {run}/f;
    uwsgi_temp_path {run}/u; scgi_temp_path {run}/s;
    server {{ listen 127.0.0.1:{port}; root {www}; sendfile on; }}
}}
"""


def test_nginx_with_a_read_only_file(storing: Storage) -> None:
    """The page is in a lower, the configuration is one file of the host, the logs are on a tmpfs."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    merged, port = storing.merged, node.free_port()
    (storing.place.lower2 / "www").mkdir()
    (storing.place.lower2 / "www/index.html").write_text("from the lower\n")
    conf, page = storing.host / "nginx.conf", storing.host / "page.html"
    conf.write_text(_NGINX.format(run=merged / "run", port=port, www=merged / "www"))
    page.write_text("one file of the host\n")
    storing.mount(
        "-v", f"{conf}:/etc/nginx/nginx.conf:ro", "-v", f"{page}:/www/page.html:ro", "--tmpfs", "/run:size=4m"
    )
    with running([nginx, "-c", merged / "etc/nginx/nginx.conf"], storing.place.root / "nginx.log"):
        url = f"http://127.0.0.1:{port}"
        assert wait_for(lambda: fetched(f"{url}/index.html") is not None, 20)
        assert fetched(f"{url}/index.html") == "from the lower\n"
        assert fetched(f"{url}/page.html") == "one file of the host\n"
        page.write_text("changed on the host\n")
        assert fetched(f"{url}/page.html") == "changed on the host\n"
        (merged / "www/index.html").write_text("changed in the union\n")
        assert wait_for(lambda: fetched(f"{url}/index.html") == "changed in the union\n", 5)
        with pytest.raises(OSError, match="Read-only"):
            (merged / "www/page.html").write_text("not through the union")
        assert "GET /page.html" in (merged / "run/access.log").read_text()
        refused(storing.unionfs("umount", merged), "busy", "nginx")
    assert wait_for(lambda: storing.unionfs("umount", merged).returncode == 0)
    assert not (storing.place.upper / "run/access.log").exists()


# -- the tutorial -------------------------------------------------------------------------------------


@pytest.mark.clients
def test_ephemeral_and_persistent(root: None, area: Path) -> None:
    """Write in a container, remove it: the data is gone. With a volume it stays. On a whole Debian."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    try:
        tree = debian.tree()
    except debian.Unavailable as reason:
        pytest.skip(str(reason))

    def unionfs(*arguments: str | Path) -> str:
        done = cli_calls.unionfs(*arguments, env={"UNIONFS_ROOT": str(area / "storage")})
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    try:
        write = "echo important > /data/file && dpkg-query -W -f '${Package}\\n' bash"
        out = unionfs("run", "--name", "c1", "-l", tree, "--", "bash", "-c", f"mkdir /data; {write}")
        assert out == "bash\n"
        # The container can be reused; its data exists until its removal.
        assert unionfs("run", "--name", "c1", "--", "cat", "/data/file") == "important\n"
        unionfs("rm", "c1")
        gone = unionfs("run", "--name", "c1", "-l", tree, "--", "bash", "-c", "ls /data 2>&1 || true")
        assert "No such file" in gone
        unionfs("rm", "c1")
        # A volume outlives the containers, and is shared by them.
        unionfs("run", "--rm", "-l", tree, "-v", "app-data:/data", "--", "bash", "-c", write)
        out = unionfs("run", "--rm", "-l", tree, "-v", "app-data:/d:ro", "--", "cat", "/d/file")
        assert out == "important\n"
        done = cli_calls.unionfs(
            "run", "--rm", "-l", tree, "-v", "app-data:/d:ro", "--", "touch", "/d/x",
            env={"UNIONFS_ROOT": str(area / "storage")},
        )  # fmt: skip
        assert "Read-only file system" in done.stderr
        # Content of a tmpfs is in no container's upper and in no volume.
        unionfs("run", "--name", "c2", "-l", tree, "--tmpfs", "/secret", "--", "touch", "/secret/key")
        assert not list((area / "storage").rglob("key"))
    finally:
        daemons = [entry for entry in live.entries() if entry.settings.mountpoint.startswith(f"{area}/")]
        areas.detach(area)
        for entry in daemons:
            wait_for(lambda entry=entry: not entry.is_alive(), 5)
