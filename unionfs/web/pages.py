"""The pages: their addresses, and what goes into the templates."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route

from unionfs import __version__
from unionfs.errors import UserError
from unionfs.settings.words import in_table, moment, shown_bytes
from unionfs.web import facts
from unionfs.web.children import Children
from unionfs.web.history import Followed, History
from unionfs.web.plots import Series, plot, rate, seconds, sparkline

_ON_A_PAGE: Final = 200
_SLOW_SECONDS: Final = 15.0
_STATIC: Final = {
    "style.css": "text/css; charset=utf-8", "refresh.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}  # fmt: skip


def templates() -> Environment:
    """Return the templates, which escape everything."""
    found = Environment(
        loader=PackageLoader("unionfs.web"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {
        "text": facts.text_of,
        "bytes": _known(shown_bytes),
        "rate": _known(rate),
        "seconds": _known(seconds),
        "count": _known(lambda value: f"{value:.0f}"),
        "moment": _known(lambda value: in_table(moment(value))),
        "spark": sparkline,
    }
    return found


def _known(shown: Any) -> Any:
    """Return a filter that shows unknown values, which are None, as `-`."""
    return lambda value: "-" if value is None else shown(value)


class Pages:
    """The ASGI application below a path."""

    def __init__(
        self, history: History, children: Children, root: str, path: str, sample_seconds: float
    ) -> None:
        self.path = path
        self._history = history
        self._children = children
        self._root = root
        self._sample_seconds = sample_seconds
        self._templates = templates()
        self._static = {
            name: (resources.files("unionfs.web") / "static" / name).read_bytes() for name in _STATIC
        }
        routes = [
            Route("/", self._overview),
            Route("/mounts/{name}", self._mount),
            Route("/mounts/{name}/diff", self._diff),
            Route("/volumes", self._volumes),
            Route("/containers", self._containers),
            Route("/branches", self._branches),
            Route("/static/{name}", self._file),
        ]
        self.app = Starlette(
            routes=[Mount(path, routes=routes)],
            exception_handlers={HTTPException: self._no_page, UserError: self._failed},
        )

    def _page(
        self, template: str, *, status: int = 200, refresh: float | None = None, **values: Any
    ) -> Response:
        """`refresh`: after how many seconds the browser asks again."""
        text = self._templates.get_template(template).render(
            base=self.path, version=__version__, refresh=refresh, now=time.time(), **values
        )
        return HTMLResponse(text, status)

    async def _no_page(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return self._message("There is no such page", "The links above lead to all pages.", status)

    async def _failed(self, request: Request, error: Exception) -> Response:
        return self._message("This cannot be shown", str(error), 503)

    def _message(self, title: str, sentence: str, status: int) -> Response:
        return self._page("message.html", status=status, title=title, sentence=sentence)

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _STATIC:
            raise HTTPException(404)
        return Response(self._static[name], media_type=_STATIC[name])

    async def _overview(self, request: Request) -> Response:
        sums = self._history.sums
        plots = [
            plot("Requests a second", "rate", Series("all mounts", sums("requests"))),
            plot("Through the daemons, a second", "bytes", Series("read", sums("read")),
                 Series("written", sums("written"))),
            plot("Memory of the daemons", "bytes", Series("all", sums("memory"))),
        ]  # fmt: skip
        return self._page(
            "overview.html", refresh=self._sample_seconds, plots=plots, mounts=self._history.mounts,
            dead=self._history.dead, failure=self._history.failure,
        )  # fmt: skip

    def _followed(self, request: Request) -> tuple[str, Followed] | None:
        name = request.path_params["name"]
        found = self._history.mounts.get(name)
        return None if found is None else (name, found)

    def _gone(self) -> Response:
        sentence = "It is not mounted any more, or not yet known; the overview shows what is."
        return self._message("There is no such mount", sentence, 404)

    async def _mount(self, request: Request) -> Response:
        if (found := self._followed(request)) is None:
            return self._gone()
        name, followed = found
        course = followed.points
        plots = [
            plot("Requests a second", "rate", Series("requests", course("requests"))),
            plot("Latency", "seconds", Series("p50", course("p50")), Series("p99", course("p99"))),
            plot("Through the daemon, a second", "bytes", Series("read", course("read")),
                 Series("written", course("written"))),
            plot("Copy-ups since the mount", "count", Series("copy-ups", course("copy_ups"))),
            plot("Memory of the daemon", "bytes", Series("memory", course("memory"))),
            plot("Free space of the upper's filesystem", "bytes", Series("free", course("upper_free"))),
        ]  # fmt: skip
        settings = await self._children.ask(partial(facts.settings_of, name))
        return self._page(
            "mount.html", refresh=self._sample_seconds, name=name, facts=followed.facts, plots=plots,
            tables=followed.tables, settings=settings, failure=self._history.failure,
        )  # fmt: skip

    async def _diff(self, request: Request) -> Response:
        if (found := self._followed(request)) is None:
            return self._gone()
        name, followed = found
        page = request.query_params.get("page", "1")
        if not (page.isascii() and page.isdecimal() and 0 < len(page) < 8 and int(page)):
            return self._message("There is no such page", "Pages are numbered from 1.", 400)
        first = (int(page) - 1) * _ON_A_PAGE
        changes = await self._children.ask(partial(facts.changes, name, first, _ON_A_PAGE))
        return self._page(
            "diff.html", name=name, facts=followed.facts, changes=changes, page=int(page), first=first,
            pages=max(1, -(-changes["total"] // _ON_A_PAGE)),
        )  # fmt: skip

    async def _volumes(self, request: Request) -> Response:
        return await self._list(request, "volumes.html", facts.volumes)

    async def _containers(self, request: Request) -> Response:
        return await self._list(request, "containers.html", facts.containers)

    async def _branches(self, request: Request) -> Response:
        found = await self._children.ask(partial(facts.branches, self._root))
        return self._page("branches.html", refresh=_SLOW_SECONDS, found=found)

    async def _list(self, request: Request, template: str, read: Any) -> Response:
        """Things with a size, which is measured only when asked for: that reads all of their directories."""
        measured = "sizes" in request.query_params
        found: Mapping[str, Any] = await self._children.ask(partial(read, self._root, measured=measured))
        refresh = None if measured else _SLOW_SECONDS
        return self._page(template, refresh=refresh, found=found, measured=measured)
