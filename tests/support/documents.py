# SPDX-License-Identifier: Apache-2.0
"""Reads the documents of the repository, and the names that they may use: files, headings, options, commands,
targets, tests and probes."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from splicer.cli.main import make_parser

REPOSITORY = Path(__file__).resolve().parents[2]

# Names of our own files end so, wherever they stand in a text.
SUFFIXES = ("py", "c", "h", "md", "sh", "svg")
# What begins like this is a path in this repository, whatever its end.
TOP = ("bpf", "splicer", "tests", "examples", "docs", "scripts", "packaging", ".ci")


# -- the tree ----------------------------------------------------------------------------------------------


@functools.cache
def list_files() -> frozenset[str]:
    """Every file that is or will be committed. Without git, every file that is not hidden."""
    try:
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        found = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file())
        listed = [str(path) for path in found if path.parts[0] == ".ci" or path.parts[0][0] != "."]
    return frozenset(path for path in listed if (REPOSITORY / path).exists())


@functools.cache
def list_endings() -> frozenset[str]:
    """All ends of paths of files and directories, at whole names: `a/b/c`, `b/c` and `c`."""
    paths = set(list_files())
    for file in list_files():
        paths.update(str(parent) for parent in Path(file).parents)
    endings = set()
    for path in paths:
        parts = path.split("/")
        endings.update("/".join(parts[start:]) for start in range(len(parts)))
    return frozenset(endings)


# -- a document --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A command, or another text between backticks, and its line."""

    text: str
    line: int


@dataclass(frozen=True)
class Document:
    """A Markdown file. `path` is relative to the repository."""

    path: str
    text: str

    @functools.cached_property
    def lines(self) -> list[tuple[int, str, str | None]]:
        """Number and text of each line, and the language of the block that it is in; None outside of any."""
        found: list[tuple[int, str, str | None]] = []
        fence, language = "", None
        for number, line in enumerate(self.text.splitlines(), 1):
            mark = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
            if fence:
                found.append((number, line, language))
                if mark and mark[1].startswith(fence) and not mark[2]:
                    fence, language = "", None
            elif mark:
                fence, language = mark[1], mark[2]
                found.append((number, line, language))
            else:
                found.append((number, line, None))
        return found

    @functools.cached_property
    def prose(self) -> str:
        """The text with blocks of code left empty, so that places are the same."""
        return "\n".join(line if language is None else "" for _, line, language in self.lines)

    def line_of(self, place: int) -> int:
        """The line of a place in `prose`."""
        return self.prose.count("\n", 0, place) + 1

    @functools.cached_property
    def spans(self) -> list[Piece]:
        """What stands between backticks."""
        return [
            Piece(" ".join(match[2].split()), self.line_of(match.start()))
            for match in re.finditer(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)(?<!`)\1(?!`)", self.prose, re.S)
        ]

    @functools.cached_property
    def commands(self) -> list[Piece]:
        """What somebody is told to type: lines with a prompt, and all lines of a block of shell."""
        found: list[Piece] = []
        joined = ""
        for number, line, language in self.lines:
            text = line.strip()
            if language is None or text.startswith(("```", "~~~")):
                continue
            if joined or text.startswith("$ ") or (language in ("sh", "bash", "shell") and text):
                joined += text.removeprefix("$ ").removesuffix("\\") + " "
                if text.endswith("\\"):
                    continue
                found.append(Piece(re.sub(r"(^|\s)#(\s.*)?$", "", joined.strip()), number))
                joined = ""
        return found

    @functools.cached_property
    def anchors(self) -> frozenset[str]:
        """What a link may have behind its #, as GitHub makes them of headings."""
        found: list[str] = re.findall(r"<\w+[^>]*\b(?:id|name)=\"([^\"]+)\"", self.prose)
        for _, line, language in self.lines:
            heading = re.match(r"#{1,6}\s+(.*?)\s*#*$", line)
            if heading and language is None:
                text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
                slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
                count = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in found)
                found.append(f"{slug}-{count}" if slug in found else slug)
        return frozenset(found)

    @functools.cached_property
    def links(self) -> list[Piece]:
        """Targets of links and pictures."""
        bare = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", lambda m: "_" * len(m[0]), self.prose)
        forms = (
            r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)",
            r"^\s*\[[^\]]+\]:\s*(\S+)",
            r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"",
        )
        return [
            Piece(match[1], self.line_of(match.start()))
            for form in forms
            for match in re.finditer(form, bare, re.M)
        ]

    def tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Head and rows of each table, cell by cell."""
        rows: list[list[str]] = []
        for _, line, language in [*self.lines, (0, "", None)]:
            if language is None and line.startswith("|"):
                rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))])
            elif rows:
                yield rows[0], [row for row in rows[1:] if not re.fullmatch(r"[-:]*", row[0] or "-")]
                rows = []


@functools.cache
def read_document(path: str) -> Document:
    return Document(path, (REPOSITORY / path).read_text())


@functools.cache
def list_documents() -> list[str]:
    return sorted(path for path in list_files() if path.endswith(".md"))


# -- names that exist --------------------------------------------------------------------------------------


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


@functools.cache
def list_commands() -> dict[str, set[str]]:
    """The commands of `splicer` with their options; those before the command belong to the empty name."""
    parser = make_parser()
    found = {"": _options_of(parser)}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: _options_of(child) for name, child in action.choices.items()}
    return found


@functools.cache
def read_options(path: str) -> frozenset[str]:
    """The options that a Python file gives to a parser of arguments."""
    found = {"-h", "--help"}
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "add",
            "add_argument",
            "addoption",
        ):
            values = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            found.update(value for value in values if isinstance(value, str) and value.startswith("-"))
    return frozenset(found)


@functools.cache
def list_own_options() -> frozenset[str]:
    """Options of `splicer`, and of every other program in this repository."""
    found = {option for options in list_commands().values() for option in options}
    for path in list_files():
        if path.endswith(".py") and not path.startswith("splicer/"):
            found |= read_options(path)
    return frozenset(found)


@functools.cache
def list_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][a-z0-9-]*):", (REPOSITORY / "Makefile").read_text(), re.M))


@functools.cache
def list_tests() -> dict[str, frozenset[str]]:
    """Files of tests to the functions and classes in them."""
    return {
        path: frozenset(
            node.name
            for node in ast.walk(ast.parse((REPOSITORY / path).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        )
        for path in list_files()
        if path.startswith("tests/") and path.endswith(".py")
    }


@functools.cache
def list_probes() -> frozenset[str]:
    """Functions below tests/conformance/probes that are registered as probes."""
    return frozenset(
        node.name
        for path in list_files()
        if path.startswith("tests/conformance/probes/") and path.endswith(".py")
        for node in ast.walk(ast.parse((REPOSITORY / path).read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each).split("(")[0] == "probe" for each in node.decorator_list)
    )
