"""What the pages of `unionfs web` show, of real mounts, volumes, containers and branches."""

from __future__ import annotations

import html
import os
import re
import signal
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place, stopped, succeed, unionfs
from tests.mount.run_calls import Containers
from tests.web.browsing import Client, Markup, Server, client


def _name(page: str, mountpoint: Path | str) -> str:
    """The name of a mount in addresses."""
    text = html.escape(str(mountpoint), quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    found = re.search(r'/mounts/([0-9]+-[0-9]+)">' + re.escape(text) + "<", page)
    assert found is not None, page
    return found[1]


def _cells(page: str, mountpoint: Path) -> dict[str, str]:
    """The row of a mount in the overview, by heading."""
    row = page.partition(f">{mountpoint}<")[2].partition("</tr>")[0]
    return dict(re.findall(r'data-label="([^"]*)">([^<]*)<', row))


def test_the_figures_of_a_mount(place: Place, session: str, browser: Client) -> None:
    place.mount(*cli_calls.session_words(session))
    (place.merged / "base").write_text("changed")
    page = browser.wait_for(str(place.merged))
    assert _cells(page, place.merged)["Copy-ups"] == "1"
    assert re.fullmatch(r"[0-9.]+ MiB", _cells(page, place.merged)["Memory"])
    assert re.fullmatch(r"[0-9.]+ [MGT]iB", _cells(page, place.merged)["Upper free"])

    def busy() -> bool:
        for number in range(50):
            (place.merged / f"d{number}").mkdir()
            (place.merged / f"d{number}").rmdir()
        rate = _cells(browser.text(), place.merged)["Requests/s"]
        return rate not in ("-", "0") and _cells(browser.text(), place.merged)["p99"] != "-"

    assert cli_calls.wait_for(busy, 30)
    inside = browser.text(f"mounts/{_name(page, place.merged)}")
    for text in ("Requests a second", "Latency", "Copy-ups since", str(place.upper), str(place.lower)):
        assert text in inside
    assert inside.count("<svg") == 6
    assert "<polyline" in inside
    assert "mkdir" in inside.lower()


def test_a_mount_goes(place: Place, browser: Client) -> None:
    place.mount()
    name = _name(browser.wait_for(str(place.merged)), place.merged)
    succeed(unionfs("umount", place.merged))
    assert cli_calls.wait_for(lambda: str(place.merged) not in browser.text(), 30)
    for page in (f"mounts/{name}", f"mounts/{name}/diff", "mounts/x", "mounts/%00", f"mounts/{'9' * 5000}"):
        answer = browser.get(page)
        assert answer.status_code == 404
        assert "There is no such" in answer.text


def test_a_daemon_that_does_not_answer_and_one_that_died(place: Place, browser: Client) -> None:
    pid = place.mount()
    browser.wait_for(str(place.merged))
    with stopped(pid):
        name = _name(browser.wait_for("does not answer"), place.merged)
        # The overview may have said so of another mount of this machine.
        assert cli_calls.wait_for(lambda: "does not answer" in browser.text(f"mounts/{name}"), 30)
        assert _cells(browser.text(), place.merged)["Requests/s"] == "-"
    os.kill(pid, signal.SIGKILL)
    page = browser.wait_for("has died")
    assert "unionfs cleanup" in page


def test_the_diff_is_that_of_the_command(place: Place, browser: Client, session: str) -> None:
    place.mount(*cli_calls.session_words(session))
    (place.merged / "base").write_text("changed")
    (place.merged / "deep").unlink()
    (place.merged / "new").mkdir()
    (place.merged / "new" / "file").touch()
    name = _name(browser.wait_for(str(place.merged)), place.merged)
    page = browser.text(f"mounts/{name}/diff")
    shown = re.findall(r'<td class="kind ([ACD])">\w+</td><td><code>([^<]*)</code>', page)
    assert "\n".join(" ".join(pair) for pair in shown) + "\n" == succeed(unionfs("diff", place.merged))
    assert len(shown) == 4


def test_the_diff_has_pages(place: Place, browser: Client) -> None:
    place.mount()
    for number in range(450):
        (place.merged / f"f{number:04}").touch()
    name = _name(browser.wait_for(str(place.merged)), place.merged)
    seen: list[str] = []
    for page in ("", "?page=2", "?page=3"):
        text = browser.text(f"mounts/{name}/diff{page}")
        found = re.findall(r"<code>/(f\d+)</code>", text)
        assert len(found) <= 200
        seen += found
        assert ('rel="next"' in text) == (page != "?page=3")
        assert "of 450" in text
    assert seen == [f"f{number:04}" for number in range(450)]
    assert "only 3 pages" in browser.text(f"mounts/{name}/diff?page=4")
    for wrong in ("0", "-1", "x", "", "1e3", "9" * 30, "²", "%ff", "1%00"):
        answer = browser.get(f"mounts/{name}/diff?page={wrong}")
        assert answer.status_code == 400
        assert "numbered from 1" in answer.text


HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}{% raw %}", "line\nbreak",
    "a' onmouseover='b", "&lt;b&gt;&amp;", "\x1b[31mred", "right\u202eleft", "javascript:alert(1)",
    os.fsdecode(b"not\xff\xfeutf8"), "ümläut", "  two  spaces ",
)  # fmt: skip


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_names(place: Place, word: str, tmp_path: Path) -> None:
    """Of a mountpoint, a layer and files: shown as text, whatever they are."""
    word = word.replace("/", "\u2215")
    merged, lower = place.root / word, place.root / f"lower-{word}"
    merged.mkdir()
    lower.mkdir()
    layers = ("-l", lower, "-u", place.upper, "-w", place.work)
    succeed(unionfs("mount", *layers, merged))
    (merged / f"file {word}").touch()
    with Server(tmp_path / "root", "--port", "0") as server, client(server) as browser:
        assert cli_calls.wait_for(lambda: str(place.root) in browser.text(), 30)
        page = browser.text()
        found = re.search(r'/mounts/([0-9]+-[0-9]+)">' + re.escape(str(place.root)), page)
        assert found is not None, page
        pages = [page, browser.text(f"mounts/{found[1]}"), browser.text(f"mounts/{found[1]}/diff")]
    succeed(unionfs("umount", merged))
    for page in pages:
        seen = Markup(page.partition("<main>")[2].partition("</main>")[0])
        assert not seen.tags & {"script", "img", "noscript", "meta", "style"}
        assert not {name for name in seen.attributes if name.startswith("on") or name in ("src", "style")}
        assert not {"\x1b", "\u202e", "\udcff"} & set(page)
        assert (word if word.isprintable() else "\\") in seen.text
    assert "<code>/file " in pages[2]


def test_volumes(browser: Client, tmp_path: Path) -> None:
    assert "No volumes" in browser.text("volumes")
    root = tmp_path / "root"

    def volume(*words: str | Path) -> str:
        return succeed(unionfs("volume", words[0], "--root", root, *words[1:]))

    volume("create", "--label", "app=<b>shop</b>", "orders")
    volume("create", "-o", "type=nfs", "-o", "o=addr=10.0.0.5,password=secret", "-o", "device=:/srv", "media")
    (root / "volumes/orders/_data/file").write_bytes(b"x" * 40000)
    text = browser.text("volumes")
    assert "secret" not in text
    assert "app=&lt;b&gt;shop&lt;/b&gt;" in text
    for word in ("orders", "media", "local", str(root / "volumes/orders/_data")):
        assert word in text
    backed = r'data-label="Last backup or restore">([^<]*)<'
    assert re.findall(backed, text) == ["-", "-"]
    assert "KiB" not in text
    unionfs("volume", "backup", "--root", root, "orders", "-o", tmp_path / "orders.tar.zst")
    text = browser.text("volumes?sizes")
    assert re.findall(backed, text)[0] == "-"  # media
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.findall(backed, text)[1])
    assert "39.1 KiB" in text or "40.0 KiB" in text


def test_a_used_volume_and_a_damaged_one(place: Place, browser: Client, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("orders", "lost"):
        succeed(unionfs("volume", "create", "--root", root, name))
    succeed(unionfs("mount", *place.layers, "-v", "orders:/data", "--root", root, place.merged))
    (root / "volumes/lost/volume.json").write_text("{")
    text = browser.text("volumes")
    assert str(place.merged) in text.partition(">orders<")[2]
    # The same sentence as `volume ls` has.
    assert re.search("lost", text)


def test_containers(box: Containers) -> None:
    with Server(box.root, "--port", "0") as server, client(server) as browser:
        assert "No containers" in browser.text("containers")
        box.run("--name", "ended", "--", "sh", "-c", "echo '<i>' > /file; exit 3")
        with box.start("--name", "busy", "--", "sh", "-c", "sleep 1000") as process:
            page = browser.wait_for("badge running", "containers")
            succeed(unionfs("kill", "--root", box.root, "busy"))
            process.communicate()
        assert "Exited (3)" in page.partition(">ended<")[2]
        assert "&lt;i&gt;" in page
        assert str(box.base) in page
        assert "Changes" in browser.text("containers?sizes")


def test_branches(browser: Client, tmp_path: Path, root: None) -> None:
    assert "No branches" in browser.text("branches")
    base = tmp_path / "base <i>"
    base.mkdir()
    done = unionfs("branch", "create", "--no-mount", "--root", tmp_path / "root", "--base", base, "topic")
    assert done.returncode == 0, done.stderr
    text = browser.text("branches")
    assert "topic" in text
    assert html.escape(str(base)) in text


def test_a_storage_root_that_cannot_be_used(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("a file")
    with Server(root, "--port", "0") as server, client(server) as browser:
        assert "Mounts" in browser.text()
        for page in ("volumes", "branches"):
            answer = browser.get(page)
            assert answer.status_code == 503
            assert str(root) in answer.text
            assert "Traceback" not in answer.text
        assert server.end() == (0, "")
