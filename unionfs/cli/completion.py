"""`unionfs completion`: a shell's completion script for commands, options and volume names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_NO_SPACE = "    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=:] ]] && compopt -o nospace\n"
_SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog="""\b
Examples:
  unionfs completion bash > /etc/bash_completion.d/unionfs
  unionfs completion zsh > "${fpath[1]}/_unionfs"
  unionfs completion fish > ~/.config/fish/completions/unionfs.fish
""",
)
@click.pass_context
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL: subcommands, options, files and volume names."""
    found = get_completion_class(shell)
    assert found is not None
    source = found(context.find_root().command, {}, "unionfs", "_UNIONFS_COMPLETE")
    # Not source.source(): click checks the version of the bash in PATH, but the script may be for another.
    script = source.source_template % source.source_vars()
    if shell == "bash":
        # A space would end a word that goes on: after KEY= and NAME: follow values.
        script = script.replace("    return 0", f"{_NO_SPACE}\n    return 0")
    print(script)
