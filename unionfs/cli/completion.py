"""`unionfs completion`: what a shell needs to complete commands, options and names of volumes."""

from __future__ import annotations

import click

_SHELLS = ("bash", "zsh", "fish")


@click.command(
    short_help="Print the completion script for a shell.",
    epilog="""\b
Examples:
  unionfs completion bash > /etc/bash_completion.d/unionfs
  unionfs completion zsh > "${fpath[1]}/_unionfs"
  unionfs completion fish > ~/.config/fish/completions/unionfs.fish
""",
)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes subcommands, options, files and names of volumes."""
    from click.shell_completion import get_completion_class

    from unionfs.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    source = found(cli, {}, "unionfs", "_UNIONFS_COMPLETE")
    # click asks the bash in PATH for its version before it prints, and the target may have another one.
    print(source.source_template % source.source_vars())
