"""`unionfs completion`: a shell's completion script for commands, options and volume names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

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
    print(source.source_template % source.source_vars())
