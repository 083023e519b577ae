"""Completion in shells: ``ptq --completion bash | zsh | fish`` prints what a shell has to read once.

The shell then asks ``ptq --complete WORD...`` what may stand in the last word's place; no torch and no Hydra is imported for that.
"""

from collections.abc import Mapping, Sequence

from ptq.cli import catalog, reference
from ptq.errors import UserError, nearest

SCRIPTS = {
    "bash": r"""_ptq() {
    local line=${COMP_LINE:0:COMP_POINT} words cur head
    read -ra words <<< "$line"
    [[ $line == *" " ]] && words+=("")
    cur=${words[-1]}
    # readline takes = and : for ends of words, so that what stands before them is not part of an answer.
    head=${cur%"${cur##*[=:]}"}
    local IFS=$'\n'
    COMPREPLY=($(ptq --complete "${words[@]:1}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 0 ]] && COMPREPLY=($(compgen -f -- "${cur#"$head"}")) && return
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _ptq ptq
""",
    "zsh": r"""#compdef ptq
_ptq() {
    local -a found ends
    found=("${(@f)$(ptq --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    (( ${#found} )) || { _files; return }
    ends=(${(M)found:#*=})
    (( ${#ends} )) && compadd -S '' -- $ends
    compadd -- ${found:#*=}
}
compdef _ptq ptq
""",
    "fish": r"""complete -c ptq -a '(ptq --complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
""",
}
_INSTALL = {
    "bash": 'eval "$(ptq --completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(ptq --completion zsh)" in ~/.zshrc, after compinit',
    "fish": "ptq --completion fish > ~/.config/fish/completions/ptq.fish",
}


def script(shell: str) -> str:
    """Returns what the shell reads. Raises `UserError` for another shell."""
    if shell not in SCRIPTS:
        raise UserError(f"--completion: {shell!r} is no shell that is known{nearest(shell, SCRIPTS)}")
    return f"# {_INSTALL[shell]}\n{SCRIPTS[shell]}" if shell != "zsh" else SCRIPTS[shell]


def candidates(words: Sequence[str], commands: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns what may stand in the place of the last of `words`.

    Args:
        words: the command line without the program's name; the last word may be begun or empty.
        commands: by name of a command its options; those that take a recipe have ``--config``.
    """
    *before, word = words or [""]
    if not before:
        found = [*commands, "--help", "--version", "--completion"]
    elif before == ["--completion"]:
        found = list(SCRIPTS)
    elif (command := before[0]) not in commands:
        found = []
    elif before[-1] == "--config":
        found = list(catalog.recipes())
    elif word.startswith("--config="):
        found = [f"--config={name}" for name in catalog.recipes()]
    elif word.startswith("-"):
        found = list(commands[command])
    elif command == "list":
        found = list(reference.SECTIONS)
    elif command == "show":
        found = list(reference.names())
    elif "--config" in commands[command]:
        found = _overrides(word)
    else:
        found = []
    return sorted({each for each in found if each.startswith(word)})


def _overrides(word: str) -> list[str]:
    sign = word[: len(word) - len(word.lstrip("+~"))]
    if sign.startswith("~"):
        return [f"~steps.{name}" for name in reference.step_files()]
    key, equals, _ = word.lstrip("+").partition("=")
    groups = catalog.groups()
    if equals:
        choices = reference.choices_of(key)
        return [f"{sign}{key}={choice}" for choice in groups.get(key, choices)]
    keys = [*groups, *(name for name in reference.names() if not name.startswith("export.") or name.count(".") == 1)]
    return [f"{sign}{name}=" for name in keys]
