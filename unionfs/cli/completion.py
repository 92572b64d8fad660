"""`unionfs completion`: a shell's completion script for commands, options and what exists."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")

# Bash splits words at = and : too (COMP_WORDBREAKS), and replaces only what follows, which is $2. So words
# are joined again where no space was between them, and what was before $2 is taken off the answers. A space
# would end a word that goes on: after KEY= and NAME: follow values. Click completes --OPTION=VALUE as VALUE.
_BASH = r"""%(complete_func)s() {
    local IFS=$'\n' rest=$COMP_LINE word=$2 before response type value last
    local -a words=()
    for value in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if [[ ${#words[@]} -gt 0 && $rest != [[:space:]]* ]]; then
            words[-1]+=$value
        else
            words+=("$value")
            rest=${rest#"${rest%%%%[![:space:]]*}"}
        fi
        rest=${rest#"$value"}
    done
    [[ $word == [=:] ]] && word=
    last=${words[-1]}
    [[ $last == -*=* ]] && last=${last#*=}
    before=${last%%"$word"}

    response=$(COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) %(complete_var)s=bash_complete "$1")
    while IFS=',' read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$before"}") ;;
        esac
    done <<< "$response"

    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=:] ]] && compopt -o nospace
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

# What follows KEY= or NAME: is a path, and its answer is the path alone.
_ZSH_PATH = "compset -p $((${#${(Q)PREFIX}} - ${#key})); _path_files"
_FISH_PATH = "string join \\n -- $before(__fish_complete_"
# Of click's scripts for the other shells: what is replaced, and by what.
_CHANGES = {
    "zsh": (
        (
            "    for type key descr",
            "    [[ $PREFIX == -*=* ]] && compset -p $((${#${PREFIX%%=*}} + 1))\n    for type key descr",
        ),
        ("_path_files", _ZSH_PATH),
        (
            "compadd -U -V unsorted -a completions",
            "local -a open=(${(M)completions:#*[=:]}) whole=(${completions:#*[=:]})\n"
            "        compadd -U -i \"$IPREFIX\" -V unsorted -S '' -a open\n"
            "        compadd -U -i \"$IPREFIX\" -V unsorted -a whole",
        ),
    ),
    "fish": (
        ('string split ","', 'string split -m 1 ","'),  # there are commas in the values of -o
        (
            "        if test $metadata[1] =",
            "        set -l token (commandline -ct | string unescape)\n"
            '        set -l size (math (string length -- "$token") - (string length -- "$metadata[2]"))\n'
            '        set -l before (string sub -l $size -- "$token")\n'
            "        if test $metadata[1] =",
        ),
        ("echo $metadata[2]", 'echo (string match -r -- "^-[^=]*=" "$token"; or echo)$metadata[2]'),
        ("__fish_complete_directories $metadata[2]", f"{_FISH_PATH}directories $metadata[2])"),
        ("__fish_complete_path $metadata[2]", f"{_FISH_PATH}path $metadata[2])"),
    ),
}


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
    """Print the completion script for a shell: subcommands, options, paths, and names of what exists."""
    found = get_completion_class(shell)
    assert found is not None
    source = found(context.find_root().command, {}, "unionfs", "_UNIONFS_COMPLETE")
    # Not source.source(): click checks the version of the bash in PATH, but the script may be for another.
    script = (_BASH if shell == "bash" else source.source_template) % source.source_vars()
    for old, new in _CHANGES.get(shell, ()):
        script = script.replace(old, new)
    print(script)
