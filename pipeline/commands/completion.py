"""`farebox completion`: scripts that complete commands, options, keys and names in bash, zsh and fish.

A script holds the names of the moment at which it was printed, so that completion is quick: it starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping

from pipeline.config.files import CONF, Kind, names
from pipeline.config.plain_yaml import read_file
from pipeline.errors import ConfigError, did_you_mean

KINDS: Mapping[str, Kind] = {"sweep": "sweep", "model": "model", "datasets": "dataset", "methods": "method"}
"""Keys whose values are completed, and the kind of file that their values name."""
SHELLS = ("bash", "zsh", "fish")

BASH = r"""# farebox completion for bash. Add to ~/.bashrc: eval "$(farebox completion bash)"
_farebox() {
    local line="${COMP_LINE:0:COMP_POINT}" word command="" candidates="" before="" w
    word="${line##*[[:space:]]}"
    for w in ${line%"$word"}; do
        case "$w" in farebox|*/farebox|-*) ;; *) command="$w"; break ;; esac
    done
    case "$word" in
@values@
    *=*) return ;;
    *)
        case "$command" in
        "") candidates="@commands@ --help --version" ;;
@options@
        esac
        [[ "$word" == -* || -z "$command" ]] || candidates+=" @keys@" ;;
    esac
    [[ "$word" == *=* ]] && before="${word%%=*}="
    [[ "$word" == *,* ]] && before="${word%%,*},"
    COMPREPLY=($(compgen -P "$before" -W "$candidates" -- "${word#"$before"}"))
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#*=}")
    fi
    [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _farebox farebox
"""
ZSH = r"""#compdef farebox
# farebox completion for zsh. Add to ~/.zshrc, after compinit: eval "$(farebox completion zsh)"
_farebox() {
    local word="${words[CURRENT]}" command="" w
    for w in "${(@)words[2,CURRENT-1]}"; do
        [[ "$w" == -* ]] || { command="$w"; break }
    done
    case "$word" in
@values@
    *=*) _files -P "${word%%=*}="; return ;;
    esac
    case "$command" in
    "") compadd -- @commands@ --help --version; return ;;
@options@
    esac
    compadd -S '' -- @keys@
}
compdef _farebox farebox
"""
FISH = r"""# farebox completion for fish. Save as ~/.config/fish/completions/farebox.fish
complete -c farebox -f
function __farebox_list --description 'values of a list, after those that are typed'
    set -l word (commandline -ct)
    set -l before (string replace -r '[^,=]*$' '' -- $word)
    for value in $argv
        echo $before$value
    end
end
@lines@
"""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion script of a shell.

    Raises:
        ConfigError: the shell is not one of `SHELLS`.
    """
    if shell not in SHELLS:
        raise ConfigError(did_you_mean("shell", shell, SHELLS))
    commands = _commands(parser)
    values = {key: names(kind) for key, kind in KINDS.items()}
    keys = [f"{key}=" for key in _keys(read_file(CONF / "base.yaml"))]
    if shell == "fish":
        return _filled(FISH, lines="\n".join(_fish(commands, values, keys)))
    if shell == "bash":
        cases = [f'    {key}=*) candidates="{" ".join(listed)}" ;;' for key, listed in values.items()]
        options = [f'        {name}) candidates="{" ".join(words)}" ;;' for name, words in commands.items()]
        return _filled(BASH, **_parts(cases, options, commands, keys))
    before = '"${word%${word##*[,=]}}"'
    cases = [f"    {key}=*) compadd -P {before} -- {' '.join(listed)}; return ;;" for key, listed in values.items()]
    options = [f"    {name}) compadd -- {' '.join(words)} ;;" for name, words in commands.items() if words]
    return _filled(ZSH, **_parts(cases, options, commands, keys))


def _filled(template: str, **parts: str) -> str:
    """Return a template with its `@name@` replaced."""
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template


def _parts(
    cases: Iterable[str], options: Iterable[str], commands: Iterable[str], keys: Iterable[str]
) -> dict[str, str]:
    return {
        "values": "\n".join(cases),
        "options": "\n".join(options),
        "commands": " ".join(commands),
        "keys": " ".join(keys),
    }


def _commands(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Return the words that may follow each command: its options and its own commands."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found = {}
    for name, command in commands.choices.items():
        own = [a for a in command._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [command, *(p for action in own for p in action.choices.values())]
        options = {o for p in parsers for action in p._actions for o in action.option_strings if o.startswith("--")}
        found[name] = [*(verb for action in own for verb in action.choices), *sorted(options)]
    return found


def _keys(node: Mapping[str, object], prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys += _keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return [key for key in keys if key not in ("method", "variants", "budget.further")]


def _fish(commands: Mapping[str, list[str]], values: Mapping[str, list[str]], keys: Iterable[str]) -> Iterable[str]:
    none = "not __fish_seen_subcommand_from " + " ".join(commands)
    yield f"complete -c farebox -n '{none}' -a '{' '.join(commands)}'"
    for name, words in commands.items():
        seen = f"__fish_seen_subcommand_from {name}"
        for word in words:
            flag = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            yield f"complete -c farebox -n '{seen}' {flag}"
    some = "__fish_seen_subcommand_from " + " ".join(commands)
    yield f"complete -c farebox -n '{some}' -a '{' '.join(keys)}'"
    for key, listed in values.items():
        typed = f'string match -q "{key}=*" -- (commandline -ct)'
        yield f"complete -c farebox -n '{typed}' -a '(__farebox_list {' '.join(listed)})'"
