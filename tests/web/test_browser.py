"""The pages of `unionfs web` in a real Chromium, by Playwright: light, dark, on a phone, without scripts.

With UNIONFS_TEST_PICTURES=DIR the pictures of all pages are written there.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.mount.cli_calls import Place, succeed, unionfs
from tests.support.patience import patient
from tests.web.browsing import Server

pytestmark = pytest.mark.slow
SECONDS = patient(30) * 1000
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}, "is_mobile": True,
              "has_touch": True},
}  # fmt: skip


@pytest.fixture
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Browser, **look: Any) -> Iterator[Page]:
    """A page in a context of its own. Its console stays empty: no error, no refused content."""
    context = browser.new_context(**look)
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(f"{message.text} {message.location}"))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
    yield page
    context.close()
    assert told == []


def walk(page: Page, server: Server, see: Callable[[str], object]) -> None:
    """Go through all pages as a user does, by links; `see` gets their names."""
    page.goto(server.url)
    page.wait_for_selector("tbody a")
    assert "token" not in page.url
    see("overview")
    page.click("tbody a >> nth=0")
    page.wait_for_selector("figure")
    see("mount")
    page.click("text=Changes in the upper")
    page.wait_for_selector(".changes")
    see("diff")
    for name in ("Volumes", "Containers", "Branches", "Mounts"):
        page.click(f"nav >> text={name}")
        expect(page.locator("h1")).to_have_text(name)
        expect(page.locator("nav [aria-current]")).to_have_text(name)
        see(name.lower())


@pytest.fixture
def busy(place: Place, tmp_path: Path) -> Place:
    """A mount with changes of hostile names, and a storage root with volumes."""
    place.mount()
    names = "<img src=x onerror=alert(1)>", "x" * 250, "<script>alert(2)<", os.fsdecode(b"\xff"), "a\nb"
    for name in names:
        (place.merged / name).touch()
    for words in (["--label", "<b>=<i>", "orders"], ["v" * 100], []):
        succeed(unionfs("volume", "create", "--root", tmp_path / "root", *words))
    return place


@pytest.mark.parametrize("look", LOOKS)
def test_all_pages(busy: Place, server: Server, chromium: Browser, look: str) -> None:
    pictures = os.environ.get("UNIONFS_TEST_PICTURES")
    backgrounds = set()
    with page_of(chromium, **LOOKS[look]) as page:

        def see(name: str) -> None:
            width = LOOKS[look]["viewport"]["width"]
            assert page.evaluate("document.documentElement.scrollWidth") == width, name
            for box in page.locator("nav a, .button, h1").all():
                bounds = box.bounding_box()
                assert bounds is not None
                assert 0 <= bounds["x"] <= bounds["x"] + bounds["width"] <= width, name
            assert page.locator("main img, main b:not(figcaption b), main script").count() == 0
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            if pictures:
                page.screenshot(path=f"{pictures}/{look}-{name}.png", full_page=True)

        walk(page, server, see)
    (background,) = backgrounds
    light = sum(map(int, re.findall(r"\d+", background))) / 3
    assert (light < 64) == (look == "dark")


def test_without_scripts(busy: Place, server: Server, chromium: Browser) -> None:
    with page_of(chromium, java_script_enabled=False) as page:
        walk(page, server, lambda name: None)
        expect(page.locator("tbody")).to_contain_text(str(busy.merged))
        succeed(unionfs("umount", busy.merged))
        # The page is loaded again by itself.
        expect(page.locator("main")).not_to_contain_text(str(busy.merged), timeout=SECONDS)


def test_figures_come_without_loading_the_page(busy: Place, server: Server, chromium: Browser) -> None:
    with page_of(chromium) as page:
        page.goto(server.url)
        page.wait_for_selector("tbody a")
        page.evaluate("window.kept = true")
        expect(page.locator("tbody")).to_contain_text(str(busy.merged))
        succeed(unionfs("umount", busy.merged))
        expect(page.locator("main")).not_to_contain_text(str(busy.merged), timeout=SECONDS)
        assert page.evaluate("window.kept") is True


def test_a_server_that_has_ended(server: Server, chromium: Browser) -> None:
    context = chromium.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("h1:has-text('Mounts')")
    server.end()
    expect(page.locator("#state")).to_contain_text("does not answer", timeout=SECONDS)


class Elsewhere:
    """Another web server on this host, whose pages another user or the internet has made."""

    def __init__(self, body: str) -> None:
        self.cookies: list[str] = []
        elsewhere = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                elsewhere.cookies.append(self.headers.get("Cookie", ""))
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def __enter__(self) -> Elsewhere:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def _signed_in(context: BrowserContext, server: Server) -> Page:
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("h1:has-text('Mounts')")
    return page


def test_another_server_of_this_host_gets_no_cookie(server: Server, chromium: Browser) -> None:
    context = chromium.new_context()
    page = _signed_in(context, server)
    assert len(context.cookies()) == 1
    assert page.evaluate("document.cookie") == ""
    with Elsewhere("hello") as elsewhere:
        for path in ("", "volumes", "static/style.css"):
            page.goto(f"http://127.0.0.1:{elsewhere.port}/{path}")
        assert set(elsewhere.cookies) == {""}


def test_a_link_on_another_site_works(server: Server, chromium: Browser) -> None:
    with Elsewhere(f'<a href="{server.url}">open</a>') as elsewhere, page_of(chromium) as page:
        page.goto(f"http://localhost:{elsewhere.port}/")
        page.click("text=open")
        page.wait_for_selector("h1:has-text('Mounts')")
        assert "token" not in page.url


def test_another_site_cannot_read_or_frame_the_pages(server: Server, chromium: Browser) -> None:
    context = chromium.new_context()
    address = _signed_in(context, server).url
    body = f'<iframe src="{address}"></iframe><iframe src="{server.url}"></iframe>'
    with Elsewhere(body) as elsewhere:
        for name in ("localhost", "127.0.0.1"):
            page = context.new_page()
            page.goto(f"http://{name}:{elsewhere.port}/")
            page.wait_for_load_state("networkidle")
            for frame in page.frames[1:]:
                assert frame.locator("h1:has-text('Mounts')").count() == 0
            read = page.evaluate(
                "async url => { try { return (await fetch(url, {credentials: 'include'})).status } "
                "catch (error) { return String(error) } }", address,
            )  # fmt: skip
            assert "Failed to fetch" in str(read)
