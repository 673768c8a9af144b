"""`fledge completion SHELL`: a script that completes commands, options and values by Hydra's engine.

Hydra's own script cannot: it takes the program's first word for all of it, and an enum's default for its value.
"""

import contextlib
import os
from collections.abc import Iterable

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from ..schema import Config
from ..schema.describe import describe

_BASH = r"""_fledge() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n'
    local word=${line##*[[:space:]]}
    COMPREPLY=($(COMP_LINE=$line "${COMP_WORDS[0]}" completion query 2>/dev/null))
    local kept=${word%"${word##*[$COMP_WORDBREAKS]}"}  # the shell replaces what follows the last of its breaks
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[.=/] ]] && COMPREPLY[0]+=' '
}
complete -o nospace -o default -F _fledge fledge"""
_ZSH = r"""_fledge() {
    local -a found=(${(f)"$(COMP_LINE="${words[1,CURRENT]}" $words[1] completion query 2>/dev/null)"})
    local -a open=(${(M)found:#*[.=/]}) whole=(${found:#*[.=/]})
    (( $#found )) || { _files; return }
    compadd -Q -S '' -a open
    compadd -Q -a whole
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _fledge fledge"""
_FLAGS = ("--help", "--cfg", "--multirun")
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}


def completion(arguments: list[str], commands: Iterable[str]) -> str:
    """Return a shell's script; for `query`, which the script asks, what completes COMP_LINE. ValueError for others."""
    if arguments == ["query"]:
        with contextlib.suppress(Exception):  # what was typed is not whole: nothing is known to complete it
            return "\n".join(matches(os.environ["COMP_LINE"], commands))
        return ""
    if len(arguments) != 1 or arguments[0] not in _SCRIPTS:
        raise ValueError('completion must be for bash or zsh: eval "$(fledge completion bash)"')
    return _SCRIPTS[arguments[0]]


def matches(line: str, commands: Iterable[str]) -> list[str]:
    """Return what the last word of a command line may become."""
    *before, word = line.split(" ")
    words = [text for text in before if text]
    if len(words) < 2:
        return sorted(name for name in commands if name.startswith(word))
    if word.startswith("-"):
        return [flag for flag in _FLAGS if flag.startswith(word)]
    groups = [option.name.partition(".")[0] + "." for option in describe(Config) if "." in option.name]
    if words[-1] == "--help":
        return sorted({group[:-1] for group in groups if group.startswith(word)})
    if values := [value for value in _values(word) if value.startswith(word)]:
        return values
    ConfigStore.instance().store(name="schema", node=Config)
    loader = ConfigLoaderImpl(config_search_path=create_config_search_path("pkg://fledge.conf"))
    options = " ".join([text for text in words[2:] if not text.startswith("-")] + [word])
    return [found for found in DefaultCompletionPlugin(loader)._query("config", options) if found != "schema="]


def _values(word: str) -> list[str]:
    """Return what an option may be set to, if its values can be counted."""
    name, equal, _ = word.partition("=")
    option = next((option for option in describe(Config) if equal and option.name == name), None)
    kind = option.type.replace("true or false", "true, false") if option else ""
    return [f"{name}={value}" for value in kind.split(", ")] if "," in kind else []
