"""Common to all commands: errors as one sentence and an exit code, and tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from unionfs.cli.completing import complete_directories
from unionfs.errors import UserError, reason_at
from unionfs.settings.words import printable
from unionfs.sys.manager import journal_prefix
from unionfs.sys.process import open_standard_files

if TYPE_CHECKING:
    from rich.table import Table

_F = TypeVar("_F", bound=Callable[..., Any])


def root_option(command: _F) -> _F:
    """Add `--root`, the same for every command."""
    return click.option(
        "--root", metavar="DIR", shell_complete=complete_directories,
        help="The storage root.  [UNIONFS_ROOT; /var/lib/unionfs, or ~/.local/share/unionfs]",
    )(command)  # fmt: skip


class CodedError(Exception):
    """Ends a command with ``code`` in place of 1; the error that ended it is the cause."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(command: click.Command, arguments: Sequence[str], program: str) -> int:
    """Run a command and return the exit code. A user's mistake never shows a traceback."""
    prepare_streams()
    try:
        result = command.main(list(arguments), prog_name=program, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "")
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except CodedError as error:
        return failed(program, error.__cause__, error.code)
    except (click.ClickException, UserError, KeyboardInterrupt, click.Abort, OSError) as error:
        return failed(program, error)
    return result if isinstance(result, int) else 0


def failed(program: str, error: BaseException | None, code: int = 1) -> int:
    """Report the error that ended a command, in one sentence. Returns the exit code."""
    match error:
        case click.ClickException():
            return complain(program, _usage(error, program), code)
        case UserError():
            return complain(program, str(error), code)
        case BrokenPipeError():
            # The reader (`head`) has ended; the interpreter would report that again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return code
        case OSError():
            return complain(program, f"{reason_at(error)}; check the path and the permissions.", code)
    return complain(program, "interrupted.", 130)


def leave(code: int) -> NoReturn:
    """End the process at once: finalizing the interpreter takes longer than many commands."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def prepare_streams() -> None:
    """Let stdout and stderr accept every file name, and open standard files that the caller has closed."""
    open_standard_files()
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # File names are bytes; those that are not UTF-8 are printed unchanged.
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]


def complain(program: str, sentence: str, code: int = 1) -> int:
    """Print an error as `PROGRAM: SENTENCE` and return the exit code."""
    with suppress(OSError):
        print(f"{journal_prefix(sys.stderr)}{program}: {sentence}", file=sys.stderr)
    return code


def tell(*sentences: str) -> None:
    """Print sentences on stderr that are not errors."""
    for sentence in sentences:
        print(f"unionfs: {sentence}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print a value as JSON, in which control characters are escaped."""
    # For start-up time: few calls print JSON.
    import json

    print(json.dumps(value, indent=2))


def confirm(warning: str) -> None:
    """Ask whether to go on with a removal. Raises UserError unless the answer is yes."""
    click.echo(f"WARNING! {warning}", err=True)
    try:
        agreed = click.confirm("Are you sure you want to continue?", err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        raise UserError("nothing was removed; answer y, or use --force.")


def for_each(names: Iterable[str], action: Callable[[str], bool]) -> int:
    """Print the names for which `action` returns True. Reports errors, and goes on. Returns the exit code."""
    code = 0
    for name in dict.fromkeys(names):
        try:
            if action(name):
                print(name, flush=True)
        except UserError as error:
            code = complain("unionfs", str(error))
    return code


def _usage(error: click.ClickException, program: str) -> str:
    """Turn click's message into one sentence that refers to the help."""
    context = getattr(error, "ctx", None)
    path = program if context is None else context.command_path
    text = " ".join(error.format_message().split()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; see `{path} --help`."


def on_terminal() -> bool:
    try:
        return sys.stdout.isatty()
    except ValueError:
        return False


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on a terminal, else columns separated by two spaces."""
    if on_terminal():
        # For start-up time: only a terminal needs it.
        from rich.console import Console

        Console(highlight=False).print(terminal_table(headings, rows))
        return
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def terminal_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table in the common style for terminals."""
    # For start-up time: only a terminal needs it.
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell, keep="\n"), overflow="fold") for cell in row))
    return table
