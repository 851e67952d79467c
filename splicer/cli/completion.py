# SPDX-License-Identifier: Apache-2.0
"""`splicer completion`: scripts for shells, made from the parser itself, so that they cannot lag behind."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from splicer.errors import OK
from splicer.policy.config import BLOCKING, CONTAINER_MODES, DEFAULTS, FIONREAD, LOG_FORMATS, MODES, TCP_INQ

from . import options
from .context import Context

DESCRIPTION = "Print a completion script."

EPILOG = """\
examples:
  source <(splicer completion bash)
  splicer completion bash > /etc/bash_completion.d/splicer
  splicer completion zsh > /usr/share/zsh/site-functions/_splicer
  splicer completion fish > ~/.config/fish/completions/splicer.fish"""

SHELLS = ("bash", "zsh", "fish")

# Values that argparse does not know of, because the settings check them wherever they come from.
_WORDS: Mapping[str, Sequence[str]] = {
    "mode": MODES,
    "set_mode": CONTAINER_MODES,
    "default": DEFAULTS,
    "blocking": BLOCKING,
    "tcp_inq": TCP_INQ,
    "fionread": FIONREAD,
    "docker": ("auto", "off"),
    "log_format": LOG_FORMATS,
}
_PATHS = {
    "cgroup": "directory",
    "run_dir": "directory",
    "pin_dir": "directory",
    "cache_dir": "directory",
    "config": "file",
    "ready_file": "file",
    "html": "file",
    "png": "file",
    "splicer": "file",
    "python": "file",
}


@dataclass(frozen=True)
class Option:
    """One option or positional of a command. `path` is "file", "directory" or empty.

    `position` counts a command's positionals from 1; 0 for an option.
    """

    flags: tuple[str, ...]
    takes_value: bool
    words: tuple[str, ...]
    path: str
    help: str
    repeatable: bool
    position: int


@dataclass(frozen=True)
class Command:
    """One command; the empty name stands for what precedes the command."""

    name: str
    help: str
    options: tuple[Option, ...]

    @property
    def flags(self) -> list[str]:
        """All option strings."""
        return [flag for option in self.options for flag in option.flags]

    @property
    def positionals(self) -> list[str]:
        """Words that may stand without an option."""
        return [word for option in self.options if not option.flags for word in option.words]


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer completion`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete for")


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the script."""
    commands = describe(arguments.make_parser())
    context.write({"bash": render_bash, "zsh": render_zsh, "fish": render_fish}[arguments.shell](commands))
    return OK


def describe(parser: argparse.ArgumentParser) -> list[Command]:
    """The commands of a parser; the first has no name and holds the options in front of the command."""
    found = [Command("", "", tuple(_describe_options(parser)))]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            found += [
                Command(name, helps.get(name, ""), tuple(_describe_options(child)))
                for name, child in action.choices.items()
            ]
    return found


def _describe_options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    positionals = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        positionals += not action.option_strings
        words = tuple(str(word) for word in action.choices or _WORDS.get(action.dest, ()) if word is not None)
        yield Option(
            flags=tuple(action.option_strings),
            takes_value=action.nargs != 0,
            words=words,
            path=_PATHS.get(action.dest, ""),
            help=(action.help or "").partition(";")[0],
            repeatable=isinstance(action, argparse._AppendAction),
            position=0 if action.option_strings else positionals,
        )


def render_bash(commands: Sequence[Command]) -> list[str]:
    """A script for bash 4 or later; does without the bash-completion package."""
    names = [command.name for command in commands if command.name]
    lines = [
        "# bash completion for splicer",
        "_splicer() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
        '    local command="" word',
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f'        case "$word" in {"|".join(names)}) command="$word"; break;; esac',
        "    done",
        "    COMPREPLY=()",
        '    case "$command $previous" in',
    ]
    for command in commands:
        for option in command.options:
            if not option.flags or not option.takes_value:
                continue
            patterns = "|".join(f'"{command.name} {flag}"' for flag in option.flags)
            if option.path:
                kind = "-d" if option.path == "directory" else "-f"
                action = f'compopt -o filenames; mapfile -t COMPREPLY < <(compgen {kind} -- "$current")'
            elif option.words:
                action = f'mapfile -t COMPREPLY < <(compgen -W "{" ".join(option.words)}" -- "$current")'
            else:
                action = ":"
            lines.append(f"        {patterns}) {action}; return;;")
    lines += ["    esac", '    case "$command" in']
    for command in commands:
        words = [*(names if not command.name else []), *command.positionals, *command.flags]
        reply = f'mapfile -t COMPREPLY < <(compgen -W "{" ".join(words)}" -- "$current")'
        lines.append(f'        "{command.name}") {reply};;')
    return [*lines, "    esac", "}", "complete -F _splicer splicer"]


def render_zsh(commands: Sequence[Command]) -> list[str]:
    """A script for zsh's completion system."""
    lines = [
        "#compdef splicer",
        "",
        "_splicer() {",
        "    local context state state_descr line",
        "    typeset -A opt_args",
    ]
    lines.append("    local -a commands=(")
    lines += [
        "        " + shlex.quote(f"{command.name}:{_zsh_escape(command.help)}")
        for command in commands
        if command.name
    ]
    lines += ["    )", "    _arguments -C \\"]
    lines += [f"        {spec} \\" for option in commands[0].options for spec in _zsh_specs(option)]
    lines += [
        "        '1:command:->command' \\",
        "        '*::argument:->argument' && return",
        '    case "$state" in',
        "    command) _describe command commands;;",
        "    argument)",
        '        case "$line[1]" in',
    ]
    for command in commands[1:]:
        specs = [spec for option in command.options for spec in _zsh_specs(option)]
        lines.append(f"        {command.name}) _arguments \\")
        lines += [f"            {spec} \\" for spec in specs[:-1]]
        lines.append(f"            {specs[-1]};;")
    return [*lines, "        esac;;", "    esac", "}", "", '_splicer "$@"']


def _zsh_escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:").replace("[", "\\[").replace("]", "\\]")


def _zsh_specs(option: Option) -> Iterator[str]:
    action = ""
    if option.path:
        action = "_files -/" if option.path == "directory" else "_files"
    elif option.words:
        action = f"({' '.join(option.words)})"
    if not option.flags:
        yield shlex.quote(f"{option.position}:{_zsh_escape(option.help)}:{action}")
    for flag in option.flags:
        value = f":value:{action}" if option.takes_value else ""
        star = "*" if option.repeatable else ""
        yield shlex.quote(f"{star}{flag}[{_zsh_escape(option.help)}]{value}")


def render_fish(commands: Sequence[Command]) -> list[str]:
    """A script for fish."""
    names = " ".join(command.name for command in commands if command.name)
    lines = ["# fish completion for splicer", "complete -c splicer -f"]
    for command in commands:
        inside = (
            f"__fish_seen_subcommand_from {command.name}"
            if command.name
            else f"not __fish_seen_subcommand_from {names}"
        )
        condition = shlex.quote(inside)
        if command.name:
            outside = shlex.quote(f"not __fish_seen_subcommand_from {names}")
            lines.append(f"complete -c splicer -n {outside} -a {command.name} -d {_fish_quote(command.help)}")
        for option in command.options:
            if not option.flags and not option.words:
                continue  # names of containers, which only the daemon knows
            parts = ["complete -c splicer -n", condition]
            for flag in option.flags:
                parts += ["-l", flag[2:]] if flag.startswith("--") else ["-s", flag[1:]]
            if option.path:
                parts.append("-rF" if option.path == "file" else "-xa '(__fish_complete_directories)'")
            elif option.words:
                parts.append(("-xa " if option.flags else "-a ") + _fish_quote(" ".join(option.words)))
            elif option.takes_value and option.flags:
                parts.append("-x")
            lines.append(" ".join([*parts, "-d", _fish_quote(option.help)]))
    return lines


def _fish_quote(text: str) -> str:
    # Inside single quotes fish knows \\ and \' as escapes, unlike the other shells.
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
