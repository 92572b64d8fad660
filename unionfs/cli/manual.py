"""The manual as man pages, made from the same source as --help: `python -m unionfs.cli.manual DIRECTORY`.

Writes man1/unionfs.1, one page for each command, man1/fuse-unionfs.1 and man8/mount.fuse.unionfs.8. Language:
man(7).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence

import click

from unionfs import __version__
from unionfs.cli.fuse_unionfs import HELP
from unionfs.cli.main import cli

_VERBATIM = "\b"
_MOUNT_EXAMPLE = """\
# /etc/fstab
none  /mnt  fuse.unionfs  lowerdir=/srv/base,upperdir=/srv/up,workdir=/srv/work  0 0
.sp
mount -t fuse.unionfs none /mnt -o lowerdir=/srv/top:/srv/base"""


def commands(group: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield every command below a group with its path of names, groups included."""
    if not isinstance(group, click.Group):
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        whole = f"{path} {name}".strip()
        yield whole, command
        yield from commands(command, whole)


def pages() -> dict[str, str]:
    """Return all pages by their path below a directory of man pages."""
    every = dict(commands(cli))
    found = {"man1/unionfs.1": _page("unionfs", "", cli, [f"unionfs-{name}" for name in _tops(every)])}
    for path, command in every.items():
        name = f"unionfs-{path.replace(' ', '-')}"
        above = "unionfs" if " " not in path else f"unionfs-{path.rpartition(' ')[0].replace(' ', '-')}"
        below = [f"{name}-{other.rpartition(' ')[2]}" for other in every if other.startswith(f"{path} ")]
        found[f"man1/{name}.1"] = _page(name, path, command, [above, *below])
    found["man8/mount.fuse.unionfs.8"] = _mount_page(every["mount"])
    found["man1/fuse-unionfs.1"] = _launcher_page()
    return found


def _tops(every: dict[str, click.Command]) -> list[str]:
    return [path for path in every if " " not in path]


def _page(name: str, path: str, command: click.Command, others: Sequence[str]) -> str:
    whole = f"unionfs {path}".strip()
    context = click.Context(command, info_name=whole)
    first, *rest = _blocks(command.help or "")
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        _head(name, 1),
        f".SH NAME\n{_text(name)} \\- {_text(first.rstrip('.'))}\n",
        f".SH SYNOPSIS\n.B {_text(whole)}\n{_text(usage)}\n",
        ".SH DESCRIPTION\n" + "".join(_block(block) for block in (first, *rest)),
    ]
    if isinstance(command, click.Group):
        parts.append(".SH COMMANDS\n" + "".join(
            _item(f"{whole} {other}", found.get_short_help_str(200))
            for other in command.list_commands(context)
            if (found := command.get_command(context, other)) is not None
        ))  # fmt: skip
    records = [record for parameter in command.get_params(context)
               if (record := parameter.get_help_record(context)) is not None]  # fmt: skip
    parts.append(".SH OPTIONS\n" + "".join(_item(*record) for record in records))
    if command.epilog:
        lines = [line.strip() for line in command.epilog.replace(_VERBATIM, "").splitlines()]
        lines = [re.sub(r"^Examples?: ?", "", line) for line in lines]
        parts.append(".SH EXAMPLES\n" + _verbatim([line for line in lines if line]))
    parts.append(_see_also(others))
    return "".join(parts)


def _mount_page(mount: click.Command) -> str:
    """The page of the type of filesystem, with what `unionfs mount` says of -o."""
    blocks = _blocks(mount.help or "")
    described = [block for block in blocks[1:] if not block.startswith(f"{_VERBATIM}\nStorage")]
    return "".join([
        _head("mount.fuse.unionfs", 8),
        ".SH NAME\nmount.fuse.unionfs \\- mount a union of directories\n",
        ".SH SYNOPSIS\n.B mount \\-t fuse.unionfs\nnone MOUNTPOINT \\-o lowerdir=DIR[:DIR...][,OPTION...]\n",
        ".SH DESCRIPTION\n"
        "mount(8) runs this helper for filesystems of the type fuse.unionfs, also from fstab(5). The first\n"
        "argument is what /proc/mounts shows as the source.\n",
        "".join(f".PP\n{_block(block)}" for block in described),
        f".SH EXAMPLES\n.nf\n{_MOUNT_EXAMPLE}\n.fi\n",
        _see_also(["unionfs-mount", "unionfs-umount"]),
    ])  # fmt: skip


def _launcher_page() -> str:
    """The page of `fuse-unionfs`, with the text of its --help."""
    usage, text, options, example = HELP.strip().split("\n\n")
    lines = [line[len("usage: ") :] for line in usage.splitlines()]
    return "".join([
        _head("fuse-unionfs", 1),
        ".SH NAME\nfuse\\-unionfs \\- mount a union, with the arguments of fuse\\-overlayfs\n",
        ".SH SYNOPSIS\n" + _verbatim(lines).removeprefix(".PP\n"),
        f".SH DESCRIPTION\n{_text(text)}\n",
        ".SH OPTIONS\n" + _verbatim(options.splitlines()),
        f".SH EXAMPLES\n{_text(example.removeprefix('Example: '))}\n",
        ".SH SEE ALSO\n.BR unionfs\\-mount (1)\n.BR mount.fuse.unionfs (8)\n",
    ])  # fmt: skip


def _head(name: str, section: int) -> str:
    return f'.TH "{name.upper()}" "{section}" "" "unionfs {__version__}" "unionfs"\n'


def _see_also(names: Sequence[str]) -> str:
    return ".SH SEE ALSO\n" + "".join(f".BR {_text(name)} (1)\n" for name in names)


def _blocks(text: str) -> list[str]:
    return [block for block in inspect.cleandoc(text).split("\n\n") if block.strip()]


def _block(block: str) -> str:
    """A paragraph, or lines as they are after click's mark for that."""
    pieces = []
    for piece in re.split(rf"(?m)^(?={_VERBATIM}$)", block):
        if piece.startswith(_VERBATIM):
            pieces.append(_verbatim(piece.splitlines()[1:]))
        elif piece.strip():
            pieces.append(f".PP\n{_text(' '.join(piece.split()))}\n")
    return "".join(pieces)


def _verbatim(lines: Sequence[str]) -> str:
    return ".PP\n.nf\n" + "".join(f"{_text(line)}\n" for line in lines) + ".fi\n"


def _item(term: str, text: str) -> str:
    return f".TP\n.B {_text(term)}\n{_text(' '.join(text.split()))}\n"


def _text(text: str) -> str:
    """Escape what roff would interpret."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace("^", "\\(ha").replace("~", "\\(ti")
    return f"\\&{text}" if text.startswith(".") else text


def main(directory: str) -> None:
    """Write all pages."""
    for path, page in pages().items():
        place = os.path.join(directory, path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "w", encoding="utf-8") as out:
            out.write(page)


if __name__ == "__main__":
    main(sys.argv[1])
