"""Shell completion, written from the parsers: verbs, their flags, and values where a flag has a fixed choice."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from distft.core.command_line import CommandParser

Verbs = Mapping[str, tuple[str, CommandParser]]
"""Verb -> (help in a line, its parser)."""

_TOP_FLAGS = ("--help", "--version")
_INSTALL = {
    "bash": 'eval "$(distft completion bash)"    in ~/.bashrc',
    "zsh": 'eval "$(distft completion zsh)"    in ~/.zshrc, after compinit',
    "fish": "distft completion fish > ~/.config/fish/completions/distft.fish",
}


def parser() -> CommandParser:
    """Return the parser of `distft completion`."""
    made = CommandParser(
        prog="distft completion",
        description="Print a script that completes distft's verbs, flags and values.",
        epilog="To install it:\n" + "\n".join(f"  {shell}: {how}" for shell, how in _INSTALL.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("shell", choices=tuple(_INSTALL), help="the shell that is to complete")
    return made


def script(shell: str, verbs: Verbs) -> str:
    """Return the completion script of one shell."""
    return _SCRIPTS[shell](verbs)


def _bash(verbs: Verbs) -> str:
    return "\n".join(
        [
            "# Completion of distft for bash, made by `distft completion bash`.",
            "_distft() {",
            '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"',
            '    local verb="${COMP_WORDS[1]}" words=""',
            "    COMPREPLY=()",
            "    if ((COMP_CWORD == 1)); then",
            f'        COMPREPLY=($(compgen -W "{" ".join([*verbs, *_TOP_FLAGS])}" -- "$cur"))',
            "        return",
            "    fi",
            "    # bash splits --flag=value at the equals sign",
            '    if [[ $cur == "=" ]]; then',
            '        cur=""',
            '    elif [[ $prev == "=" ]]; then',
            '        prev="${COMP_WORDS[COMP_CWORD-2]}"',
            "    fi",
            '    case "$verb $prev" in',
            *(
                f'        "{verb} {flag}") {_bash_values(action)} ;;'
                for verb, (_, made) in verbs.items()
                for action in made.arguments()
                for flag in action.option_strings
                if _takes_value(action)
            ),
            "    esac",
            '    case "$verb" in',
            *(
                f'        {verb}) if [[ $cur == -* ]]; then words="{" ".join(made.flags())}"; '
                f'else words="{" ".join(_positional_choices(made))}"; fi ;;'
                for verb, (_, made) in verbs.items()
            ),
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$cur"))',
            "}",
            "complete -o default -F _distft distft",
            "",
        ]
    )


def _bash_values(action: argparse.Action) -> str:
    """Complete the value of a flag: its choices, or, with no reply, the shell's default, which is file names."""
    if action.choices is None:
        return "return"
    return f'COMPREPLY=($(compgen -W "{" ".join(map(str, action.choices))}" -- "$cur")); return'


def _zsh(verbs: Verbs) -> str:
    """Return the completion for zsh, which runs bash's completion functions by its own `bashcompinit`."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + _bash(verbs)


def _fish(verbs: Verbs) -> str:
    lines = ["# Completion of distft for fish, made by `distft completion fish`."]
    for verb, (summary, _) in verbs.items():
        lines.append(f"complete -c distft -f -n __fish_use_subcommand -a {verb} -d {_quoted(summary)}")
    for verb, (_, made) in verbs.items():
        of_verb = f"complete -c distft -n {_quoted(f'__fish_seen_subcommand_from {verb}')}"
        for action in made.arguments():
            for flag in action.option_strings:
                lines.append(f"{of_verb} {_fish_flag(flag, action)}")
        if choices := _positional_choices(made):
            lines.append(f"{of_verb} -f -a {_quoted(' '.join(choices))}")
    return "\n".join([*lines, ""])


def _fish_flag(flag: str, action: argparse.Action) -> str:
    kind = "-l" if flag.startswith("--") else "-s"
    values = ""
    if action.choices is not None:
        values = f" -x -a {_quoted(' '.join(map(str, action.choices)))}"
    elif _takes_value(action):
        values = " -r"
    return f"{kind} {flag.lstrip('-')}{values} -d {_quoted((action.help or '').replace('%%', '%'))}"


def _takes_value(action: argparse.Action) -> bool:
    return bool(action.option_strings) and action.nargs != 0


def _positional_choices(made: CommandParser) -> list[str]:
    positionals = [action for action in made.arguments() if not action.option_strings]
    return [str(choice) for action in positionals if action.choices is not None for choice in action.choices]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_SCRIPTS: dict[str, Callable[[Verbs], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
