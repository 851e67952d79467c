#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes splicer(8) and splicer.toml(5) into a directory, from the parser and from docs/.

    packaging/manual.py DIRECTORY

The text comes from where `--help` and the documents have it, so the pages cannot lag behind. It is put
together as Markdown, and lowdown(1) makes roff of it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from splicer import __version__  # noqa: E402
from splicer.cli.main import make_parser  # noqa: E402
from splicer.policy.config import CONFIG_VARIABLE, VALUE_TYPES, variable_of  # noqa: E402

SUMMARY = "makes TCP between the containers and processes of one host faster"

FILES = """\
*/run/splicer/*
: The lock, the control socket and what `splicer set` has said. For root only.

*/sys/fs/bpf/splicer/*
: Pinned programs and maps. They outlive a crash, and `splicer unload` removes them.

*/var/cache/splicer/*
: The compiled programs, for the next start.

*/etc/default/splicer*
: Variables for the systemd service, one a line: `SPLICER_CONFIG=/etc/splicer.toml`.
"""

SEE_ALSO = """\
**splicer.toml**(5), **ss**(8), **bpftool**(8), and `/usr/share/doc/splicer`: what differs from plain TCP on a
spliced connection is in KNOWN_ISSUES.md, running it on a host in operations.md.
"""


def commands_of(parser: argparse.ArgumentParser) -> list[tuple[str, str, argparse.ArgumentParser]]:
    """Name, summary and parser of each command, in the order of `splicer --help`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return [(name, summaries[name], child) for name, child in action.choices.items()]
    return []


def write_command_page() -> str:
    """splicer(8) as Markdown."""
    parser = make_parser()
    lines = ["# NAME", "", f"splicer - {SUMMARY}", ""]
    lines += ["# SYNOPSIS", "", "**splicer** *COMMAND* [*OPTION*...]", ""]
    lines += ["# DESCRIPTION", "", *_verbatim_paragraphs(parser.description or ""), "", "# OPTIONS", ""]
    lines += [*_options(parser, common=True), "# COMMANDS", ""]
    for name, summary, child in commands_of(parser):
        lines += [f"## splicer {name}", "", *_usage(child), ""]
        lines += _verbatim_paragraphs(child.description or summary)
        lines += ["", *_options(child, common=False), *_examples(child)]
    lines += ["# EXIT STATUS", "", *_exit_codes(parser.epilog or ""), "# ENVIRONMENT", ""]
    lines += [f"*{CONFIG_VARIABLE}*", ": The configuration file.", ""]
    lines += ["*NO_COLOR*", ": No colour, unless `--color` asks for it.", ""]
    settings = ", ".join(f"*{variable_of(name)}*" for name in VALUE_TYPES)
    lines += [settings, ": One for each setting of `splicer run`. See **splicer.toml**(5).", ""]
    lines += ["# FILES", "", FILES, "# SEE ALSO", "", SEE_ALSO]
    return "\n".join(lines)


def _usage(parser: argparse.ArgumentParser) -> list[str]:
    usage = parser.format_usage().removeprefix("usage: ").rstrip().splitlines()
    return [f"    {line}" for line in usage]


def _verbatim_paragraphs(text: str) -> list[str]:
    """A description: paragraphs flow, and what is indented or a table stays as it is."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        rows = block.splitlines()
        is_fixed = any(row.startswith(" ") for row in rows)
        lines += [f"    {row}" for row in rows] if is_fixed else [_escape(row) for row in rows]
        lines.append("")
    return lines


def _escape(text: str) -> str:
    return re.sub(r"([*_<>\[\]\\|])", r"\\\1", text)


def _options(parser: argparse.ArgumentParser, *, common: bool) -> Iterator[str]:
    for group in parser._action_groups:
        if not common and group.title == "common options":
            continue
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction) or (action.dest == "help" and not common):
                continue
            yield _spell(action)
            yield f": {_escape(_help_of(action))}"
            yield ""


def _spell(action: argparse.Action) -> str:
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = action.metavar or choices or action.dest
    if not action.option_strings:
        return f"*{_escape(str(value))}*"
    flags = ", ".join(f"**{flag}**" for flag in action.option_strings)
    return flags if action.nargs == 0 else f"{flags} *{_escape(str(value))}*"


def _help_of(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    return " ".join(text.split()) or "."


def _examples(parser: Any) -> list[str]:
    epilog = parser.make_epilog() if getattr(parser, "make_epilog", None) else parser.epilog
    if not epilog:
        return []
    # Fenced: indented, it would belong to the last option.
    return ["", "```", *str(epilog).splitlines(), "```", ""]


def _exit_codes(epilog: str) -> list[str]:
    """The end of the epilog of `splicer --help` as a list."""
    _, _, codes = epilog.partition("exit codes:")
    lines = []
    for entry in " ".join(codes.split()).split(", "):
        number, _, meaning = entry.partition(" ")
        lines += [f"**{number}**", f": {meaning}", ""]
    return lines


def write_configuration_page() -> str:
    """splicer.toml(5) as Markdown: docs/configuration.md, and the tables of docs/policy.md."""
    configuration = _document("configuration.md")
    tables = re.search(r"^## Tables\n.*?(?=^## |\Z)", _document("policy.md"), re.S | re.M)
    assert tables, "docs/policy.md has no section Tables"
    text = re.sub(r"\A# .*\n", "", configuration) + "\n" + tables.group(0)
    text = re.sub(r"^## (.*)$", lambda found: f"# {found.group(1).upper()}", text, flags=re.M)
    head = "# NAME\n\nsplicer.toml - configuration of splicer\n\n# DESCRIPTION\n"
    return f"{head}{_turn_tables(text)}\n# SEE ALSO\n\n**splicer**(8)\n"


def _document(name: str) -> str:
    """A document without the links, which lead nowhere from a terminal."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", (ROOT / "docs" / name).read_text(encoding="utf-8"))


def _turn_tables(text: str) -> str:
    """Wide tables are lists on a terminal: the first cells, and below them the last one."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|") or line.startswith("|---"):
            lines += [] if line.startswith("|---") else [line]
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        if all(re.fullmatch(r"[a-z A-Z]*", cell) for cell in cells):
            continue  # the heading of a table
        *names, meaning = cells
        lines += [", ".join(filter(None, names)), f": {meaning}", ""]
    return "\n".join(lines)


def render(markdown: str, title: str, section: int) -> str:
    """The page as roff. Raises CalledProcessError if lowdown refuses it."""
    facts = {"title": title, "section": str(section), "source": f"splicer {__version__}", "date": ""}
    told = [word for key, value in facts.items() for word in ("-m", f"{key}: {value}")]
    # Two hyphens are an option and no dash.
    command = ["lowdown", "-s", "-tman", "--nroff-nolinks", "--out-no-smarty", "--parse-no-intraemph", *told]
    return subprocess.run(command, input=markdown, capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str]) -> int:
    """Write both pages."""
    if len(arguments) != 1:
        print("usage: packaging/manual.py DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "splicer.8").write_text(render(write_command_page(), "SPLICER", 8), encoding="utf-8")
    (directory / "splicer.toml.5").write_text(
        render(write_configuration_page(), "SPLICER.TOML", 5), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
