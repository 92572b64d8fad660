"""A running `unionfs web`, and clients of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.mount.cli_calls import REPOSITORY, wait_for
from tests.support.patience import patient
from unionfs.sys.process import children_of

WEB = (sys.executable, "-m", "unionfs", "web")


class Server:
    """The command as a process. `url` is what it has printed."""

    def __init__(self, root: Path, *words: str | Path, command: Sequence[str] = WEB) -> None:
        self.process = subprocess.Popen(
            [*command, "--root", str(root), "--seconds", "0.5", *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read())
        parts = urlsplit(self.url)
        self.base = f"{parts.scheme}://{parts.netloc}"

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.end()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it; returns the exit code and what it wrote to stderr."""
        self.process.send_signal(number)
        _, told = self.process.communicate(timeout=patient(30))
        return self.process.returncode, told

    def children(self) -> list[int]:
        return children_of(self.process.pid)


class Client:
    """What a browser does, with the cookie. `path` leads to the pages."""

    def __init__(self, server: Server, **extra: Any) -> None:
        self.http = httpx.Client(base_url=server.base, timeout=patient(60), **extra)
        answer = self.http.get(server.url.removeprefix(server.base))
        assert answer.status_code == 200
        (cookie,) = self.http.cookies.jar
        self.path = cookie.path

    def get(self, page: str = "", **extra: Any) -> httpx.Response:
        return self.http.get(f"{self.path}/{page}", **extra)

    def text(self, page: str = "") -> str:
        """The page must be there."""
        answer = self.get(page)
        assert answer.status_code == 200, answer.text
        return answer.text

    def wait_for(self, text: str, page: str = "") -> str:
        """Return the page when it has the text."""
        assert wait_for(lambda: text in self.text(page), 30), self.text(page)
        return self.text(page)


class Markup(HTMLParser):
    """What the browser makes of a page: its tags, the names of their attributes, its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@contextmanager
def client(server: Server, **extra: Any) -> Iterator[Client]:
    found = Client(server, **extra)
    try:
        yield found
    finally:
        found.http.close()
