"""`unionfs completion`: what a shell needs to complete commands, options and names of volumes."""

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
    """Print the script with which SHELL completes subcommands, options, files and names of volumes."""
    found = get_completion_class(shell)
    assert found is not None
    source = found(context.find_root().command, {}, "unionfs", "_UNIONFS_COMPLETE")
    # click asks the bash in PATH for its version before it prints, and the target may have another one.
    print(source.source_template % source.source_vars())
