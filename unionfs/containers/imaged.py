"""`unionfs run --image`: the command, environment, user and working directory of an image's configuration.

The rules are docker's (moby, daemon/create.go and runconfig/opts; OCI image-spec, config.md): the given words
replace Cmd and follow Entrypoint; given variables replace those of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from unionfs.containers.run import Wish
from unionfs.containers.store import Container
from unionfs.errors import UserError, quoted
from unionfs.images.documents import Runtime, decode_config
from unionfs.images.rules import Rules
from unionfs.images.store import Image, shown
from unionfs.images.using import image_layers
from unionfs.storage.archive.progress import Progress
from unionfs.storage.root import storage_root
from unionfs.sys.capabilities import may_use_trusted_xattrs


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller wants of an image."""

    image: str | None
    command: Sequence[str]
    entrypoint: str | None = None
    workdir: str | None = None
    user: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def wished(wish: Wish, given: Given, notes: list[str], progress: Progress) -> Iterator[Wish]:
    """The wish with what the image says, whose layers stay during the context.

    A kept container remembers its image. Raises UserError.
    """
    root = storage_root(wish.root)
    known = None
    if given.image is None and wish.name is not None and not wish.lowers:
        known = Container(root, wish.name).image()
    reference = given.image or known
    if reference is None:
        if not given.command:
            raise UserError("no command is given, and without --image there is none to take; name one.")
        yield replace(
            wish, command=_words(None, given), workdir=given.workdir or "/", user=given.user,
            environment=given.environment,
        )  # fmt: skip
        return
    userxattr = not may_use_trusted_xattrs()
    with image_layers(
        reference, root, userxattr=userxattr, rules=Rules(), notes=notes, progress=progress
    ) as (image, paths):
        yield _completed(wish, given, image, [] if known else paths)


def _completed(wish: Wish, given: Given, image: Image, paths: Sequence[str]) -> Wish:
    runtime = decode_config(image.config).config or Runtime()
    command = _words(runtime, given)
    if not command:
        raise UserError(f"image {shown(image)} names no command, and none is given; append one.")
    return replace(
        wish,
        command=command,
        lowers=[*wish.lowers, *paths],
        image=image.id,
        workdir=given.workdir or _workdir(image, runtime),
        user=given.user if given.user is not None else runtime.user or None,
        environment={**_variables(runtime), **given.environment},
    )


def _words(runtime: Runtime | None, given: Given) -> list[str]:
    if given.entrypoint is not None:
        start = [given.entrypoint] if given.entrypoint else []
        return [*start, *given.command]
    if runtime is None:
        return list(given.command)
    return [*(runtime.entrypoint or ()), *(given.command or runtime.cmd or ())]


def _workdir(image: Image, runtime: Runtime) -> str:
    if not runtime.working_dir:
        return "/"
    if not runtime.working_dir.startswith("/") or "\0" in runtime.working_dir:
        raise UserError(
            f"image {shown(image)} has the working directory {quoted(runtime.working_dir)}, which is not "
            "absolute; give another by --workdir."
        )
    return runtime.working_dir


def _variables(runtime: Runtime) -> dict[str, str]:
    found = {}
    for word in runtime.env or ():
        name, equals, value = word.partition("=")
        if name and equals and "\0" not in word:
            found[name] = value
    return found
