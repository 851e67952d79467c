# SPDX-License-Identifier: Apache-2.0
"""What the documents name exists: files, links, options, commands, targets, tests and probes. And their lines
are short enough to be read in a terminal."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import documents
from support.documents import REPOSITORY, SUFFIXES, TOP, Document, Piece

LINE = 120

# Directories in the source of Linux, which documents cite.
LINUX = ("net/", "include/", "fs/", "mm/", "tools/", "Documentation/")

# Which file reads the arguments of a program that is run by its path, and of a target by way of ARGS.
PROGRAMS = {
    "tests/apps/run": "tests/apps/__main__.py",
    "tests/soak/run": "tests/soak/__main__.py",
    "tests/vm/run": "tests/vm/__main__.py",
}
TARGETS = {
    "test-apps": "tests/apps/__main__.py",
    "test-vm": "tests/vm/__main__.py",
    "soak": "tests/soak/__main__.py",
}
# Targets that run a command of splicer with ARGS.
COMMANDS = {"run": "run", "bench": "bench", "bench-stack": "bench"}
# Options of others that documents may name. Add what you need.
FOREIGN = {
    *("--build", "--build-arg", "--compose-file", "--detach", "--env", "--file", "--follow", "--name"),
    *("--network", "--pid", "--privileged", "--profile", "--resolve-image", "--rm", "--tag", "--volume"),
    *("--now", "--no-pager", "--since", "--unit", "--user"),  # systemctl, journalctl
    *("--force", "--system-site-packages", "--upgrade", "--yes"),  # venv, pip, pipx, apt-get
    *("--durations", "--exitfirst", "--last-failed", "--maxfail", "--timeout"),  # pytest
    "--unix-socket",  # curl
    *("--filename", "--namespace", "--nonblocked"),  # kubectl, sockperf
}

Mistakes = Iterator[tuple[int, str]]


# -- files and links ---------------------------------------------------------------------------------------

_BEFORE = r"(?<![\w/.~$<>*{}-])"
_FILE = re.compile(rf"{_BEFORE}((?:[\w.*-]+/)*[\w*-][\w.*-]*\.(?:{'|'.join(SUFFIXES)}))(?![\w/-])")
_BELOW_TOP = re.compile(rf"{_BEFORE}(?:{'|'.join(map(re.escape, TOP))})/[\w./*-]*")


def is_path(name: str, document: Document) -> bool:
    """Is there such a file or directory? Named from the top, from the document, or by the end of its path."""
    name = name.rstrip("/")
    near = os.path.normpath(os.path.join(os.path.dirname(document.path), name))
    endings = documents.list_endings()
    return bool({name, near} & endings) or (
        "*" in name and any(fnmatch.fnmatch(each, name) for each in endings)
    )


def find_wrong_files(document: Document) -> Mistakes:
    """Names of files anywhere. Of what begins with one of our directories also what has no such end, if it is
    between backticks or in a block of code."""
    for number, line, language in document.lines:
        bare = re.sub(r"\w+://\S+", "", re.sub(r"\]\([^)]*\)", "]", line))
        for match in _FILE.finditer(bare):
            name = match[1]
            # One that only ends like a document or a picture may be of the reader's.
            ours = "/" in name or name.endswith((".py", ".c", ".h")) or f"`{name}`" in line
            if ours and not name.startswith(LINUX) and not is_path(name, document):
                yield number, f"no such file: {name}"
        if language is not None:
            yield from ((number, what) for what in _find_wrong_paths(bare, document))
    for span in document.spans:
        yield from ((span.line, what) for what in _find_wrong_paths(span.text, document))


def _find_wrong_paths(text: str, document: Document) -> Iterator[str]:
    for match in _BELOW_TOP.finditer(text):
        name = match[0].rstrip(".")
        if not _FILE.fullmatch(name) and not is_path(name, document):
            yield f"no such path: {name}"


def find_wrong_links(document: Document) -> Mistakes:
    for link in document.links:
        target, _, anchor = link.text.partition("#")
        if re.match(r"\w+:", target):
            continue
        path = os.path.normpath(os.path.join(os.path.dirname(document.path), target))
        if target and not (REPOSITORY / path).exists():
            yield link.line, f"the link leads nowhere: {link.text}"
        elif anchor:
            other = documents.read_document(path) if target else document
            if anchor not in other.anchors:
                yield link.line, f"no such heading: {link.text}"


# -- command lines -----------------------------------------------------------------------------------------


def split_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command in a line: what pipes, && and the like join is taken apart."""
    try:
        words = shlex.split(text.replace("<(", " ; ").replace(";", " ; "))
    except ValueError:
        words = text.split()
    simple: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "|", "||", "&&", "&"):
            if simple:
                yield simple
            simple = []
        else:
            simple.append(word)


def find_command(words: list[str]) -> list[str]:
    """A simple command without what stands before its name; from `splicer` on if that is run by another."""
    while words and (words[0] in ("sudo", "exec", "time", "-E") or re.match(r"[A-Z_]+=", words[0])):
        if words[0].startswith("ARGS="):
            return words
        words = words[1:]
    for place in range(1, len(words) - 1):
        if words[place] == "splicer" and words[place - 1] in ("splicer", "--", "exec"):
            if words[place - 1] == "exec" and words[place + 1] == "splicer":
                continue  # the service's name
            return words[place:]
    return words


def options_in(words: list[str]) -> Iterator[str]:
    for word in words:
        name = word.partition("=")[0].rstrip(".,;:)")
        if re.fullmatch(r"--[a-z][a-z0-9-]*", name):
            yield name


def find_wrong_words(piece: Piece) -> Iterator[str]:
    for simple in split_commands(piece.text):
        yield from find_wrong_command(find_command(simple))


def find_wrong_command(words: list[str]) -> Iterator[str]:
    if not words:
        return
    name, rest = words[0], words[1:]
    anything = documents.list_own_options() | FOREIGN
    if name == "splicer" or name.endswith("/bin/splicer"):
        yield from find_wrong_splicer(rest)
    elif name == "make":
        yield from find_wrong_make(rest)
    else:
        file = PROGRAMS.get(name.removeprefix("./"))
        known = documents.read_options(file) if file else anything
        for word in words:
            inner = word.removeprefix("ARGS=").split() if word.startswith("ARGS=") else [word]
            for option in options_in(inner):
                if option not in known:
                    yield f"no such option{f' of {name}' if file else ''}: {option}"


def find_wrong_splicer(rest: list[str]) -> Iterator[str]:
    commands = documents.list_commands()
    command = next((word for word in rest if not word.startswith("-")), "")
    if not re.fullmatch(r"[a-z][a-z-]*", command):
        command = ""  # COMMAND, or dots
    elif command not in commands:
        yield f"no such command: splicer {command}"
        return
    for option in options_in(rest):
        if option not in commands[command] | commands[""]:
            yield f"no such option of splicer {command}: {option}".replace(" :", ":")


def find_wrong_make(rest: list[str]) -> Iterator[str]:
    target = ""
    for word in rest:
        if re.fullmatch(r"[a-z][a-z0-9-]*", word):
            target = word
            if target not in documents.list_targets():
                yield f"no such target: make {target}"
        elif word.startswith("ARGS="):
            known: frozenset[str] | set[str] = documents.list_own_options() | FOREIGN
            if target in TARGETS:
                known = documents.read_options(TARGETS[target])
            elif target in COMMANDS:
                known = documents.list_commands()[COMMANDS[target]]
            for option in options_in(word.removeprefix("ARGS=").split()):
                if option not in known:
                    yield f"no such option of make {target}: {option}"


def find_wrong_commands(document: Document) -> Mistakes:
    for piece in (*document.spans, *document.commands):
        for mistake in find_wrong_words(piece):
            yield piece.line, mistake


# -- tests and probes --------------------------------------------------------------------------------------

_TEST = re.compile(r"([\w./-]*\.py)?::(\w+)((?:::\w+)*)(\[[^\]\s]*\])?")


def find_wrong_tests(document: Document) -> Mistakes:
    """file::name, and ::name of the file that is named before it on the line, or of any."""
    tests = documents.list_tests()
    for number, line, _ in document.lines:
        candidates: list[str] = []
        for match in _TEST.finditer(line):
            if match[1]:
                candidates = [path for path in tests if ("/" + path).endswith("/" + match[1])]
                if not candidates:
                    yield number, f"no such file of tests: {match[1]}"
                    continue
            elif not match[2].startswith("test_"):
                continue  # another language's ::
            names = [match[2], *match[3].split("::")[1:]]
            if not any(set(names) <= tests[path] for path in candidates or tests):
                yield number, f"no such test: {match[0]}"
            probe = (match[4] or "").strip("[]").partition("-")[0]
            if (
                match[4]
                and any(path.endswith("/test_probes.py") for path in candidates)
                and not {probe, match[4].strip("[]")} & (documents.list_probes() | {"x"})
            ):
                yield number, f"no such probe: {match[0]}"
    every = {name for names in tests.values() for name in names} | {Path(path).stem for path in tests}
    for span in document.spans:
        if re.fullmatch(r"test_\w+", span.text) and span.text not in every:
            yield span.line, f"no such test: {span.text}"


_PROBES = re.compile(r"\bprobes?((?:[\s,]+(?:and\s+)?`?[a-z][a-z0-9_]*`?(?=[\s,;:.)|\]]|$))+)")


def find_wrong_probes(document: Document) -> Mistakes:
    """Lists behind the word probe: what has an underscore or backticks is taken for a name."""
    for match in _PROBES.finditer(document.prose):
        words = re.findall(r"([,\s]*)(`?[a-z][a-z0-9_]*`?)", match[1])
        listed = True
        for before, word in words:
            # A list goes on behind a comma or `and`; whatever else follows is a sentence.
            if not listed and "," not in before:
                break
            listed = word == "and"
            name = word.strip("`")
            if listed or name == "x" or ("_" not in name and "`" not in word):
                continue
            if name not in documents.list_probes():
                yield document.line_of(match.start()), f"no such probe: {name}"


def find_long_lines(document: Document) -> Mistakes:
    for number, line, language in document.lines:
        if language is None and not line.lstrip().startswith("|") and len(line) > LINE:
            yield number, f"{len(line)} characters"


CHECKS: tuple[Callable[[Document], Mistakes], ...] = (
    find_wrong_files,
    find_wrong_links,
    find_wrong_commands,
    find_wrong_tests,
    find_wrong_probes,
    find_long_lines,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("find_"))
@pytest.mark.parametrize("path", documents.list_documents())
def test_documents(path: str, check: Callable[[Document], Mistakes]) -> None:
    mistakes = [f"{path}:{line}: {what}" for line, what in check(documents.read_document(path))]
    assert not mistakes, "\n" + "\n".join(mistakes)


class TestTheTest:
    """A wrong name of each kind is found, and a right one is not."""

    @pytest.mark.parametrize(
        ("check", "wrong", "right"),
        [
            (find_wrong_files, "see `splicer/daemon.py`", "see `splicer/daemon/loop.py`"),
            (find_wrong_files, "see splicer/daemon.py", "see kernel/test_reuse.py"),
            (find_wrong_files, "see `daemons.py`", "see `loop.py`"),
            (find_wrong_files, "in `tests/nothing/`", "in `tests/kernel/`"),
            (find_wrong_files, "by `scripts/setup`", "by `.ci/run`"),
            (
                find_wrong_files,
                "`examples/x/y.yaml`",
                "`examples/swarm/stack.yml`, system.slice/redis.service",
            ),
            (find_wrong_files, "```\n$ cp examples/x a\n```", "```\n$ cp examples/swarm/stack.yml a\n```"),
            (find_wrong_files, "see `CHANGES.md`", "see `CHANGELOG.md`, and net/core/secure_seq.c"),
            (find_wrong_files, "all of `bpf/*.py`", "all of `bpf/*.c`"),
            (find_wrong_files, "```\n$ cat bpf/redirect.c\n```", "```\n$ cat bpf/verdict.c /etc/x.toml\n```"),
            (find_wrong_links, "[a](WRITEME.md)", "[a](README.md)"),
            (find_wrong_links, "[a\nb](WRITEME.md)", "[a\nb](README.md)"),
            (find_wrong_links, "![a](docs/none.svg)", "![a](LICENSE)"),
            (find_wrong_links, '<img src="none.svg">', '<img src="LICENSE">'),
            (find_wrong_links, "[a]: WRITEME.md", "[a]: https://example.com/WRITEME.md"),
            (find_wrong_links, "[a](#nowhere)\n# Here", "[a](#ends-and-here)\n# `ends`, and [here](LICENSE)"),
            (find_wrong_links, "[a](#here-1)\n# Here", "[a](#here-1)\n# Here\n# Here"),
            (find_wrong_links, "[a](ARCHITECTURE.md#x)", "[a](ARCHITECTURE.md#sigterm)"),
            (find_wrong_links, "[a](#here)\n```\n# Here\n```", "`[a](#here)`"),
            (find_wrong_commands, "`splicer stats`", "`splicer status`, `splicer COMMAND`"),
            (find_wrong_commands, "`sudo .venv/bin/splicer stats`", "`sudo .venv/bin/splicer status`"),
            (find_wrong_commands, "`splicer status --wide`", "`splicer flows --wide --debug`"),
            (find_wrong_commands, "`--nonsense`", "`--wide`, `--json`, `--minutes N`"),
            (find_wrong_commands, "`--mode=eager --nonsense=1`", "`--mode=eager`"),
            (find_wrong_commands, "`make tests`", "`make test ARGS=-x`, `make TARGET`"),
            (find_wrong_commands, '`make bench ARGS="--minutes 3"`', '`make soak ARGS="--minutes 3"`'),
            (find_wrong_commands, '`make run ARGS="--wide"`', '`make run ARGS="--mode eager"`'),
            (find_wrong_commands, '`ARGS="--nonsense"`', '`ARGS="--only close --programs"`'),
            (find_wrong_commands, "`tests/apps/run --minutes 3`", "`tests/apps/run --list`"),
            (
                find_wrong_commands,
                "```console\n$ splicer stats\n```",
                "```console\n$ splicer status\nsplicer x\n```",
            ),
            (find_wrong_commands, "```sh\nsplicer stats\n```", "```sh\n# splicer stats\nsplicer status\n```"),
            (
                find_wrong_commands,
                "```console\n$ a && make x\n```",
                "```console\n$ a && make run  # make x\n```",
            ),
            (
                find_wrong_commands,
                "```console\n$ docker compose exec splicer splicer stats\n```",
                "```console\n$ docker compose exec splicer splicer status\n$ kubectl -n splicer rollout\n```",
            ),
            (
                find_wrong_commands,
                "```console\n$ splicer run \\\n    --nonsense\n```",
                "```console\n$ splicer run \\\n    --mode eager\n```",
            ),
            (
                find_wrong_tests,
                "kernel/test_reuse.py::test_x",
                "unit/test_floors.py::test_imports_go_down[x]",
            ),
            (
                find_wrong_tests,
                "kernel/test_none.py::test_x",
                "test_floors.py::TestTheTest::test_shared_objects",
            ),
            (
                find_wrong_tests,
                "unit/test_floors.py::test_imports_go_down, ::test_x",
                "unit/test_floors.py::test_imports_go_down, ::test_every_room_has_a_floor",
            ),
            (find_wrong_tests, "| ::test_x |", "| ::test_every_room_has_a_floor |, std::move"),
            (find_wrong_tests, "`test_nothing_at_all`", "`test_imports_go_down`, `test_floors`"),
            (
                find_wrong_tests,
                "conformance/test_probes.py::test_spliced[none]",
                "`conformance/test_probes.py::test_spliced[x]`, test_probes.py::test_spliced[peek]",
            ),
            (find_wrong_probes, "probe no_such_thing", "probe broken_pipe"),
            (find_wrong_probes, "(probes `peek`, `no_such`)", "(probes `peek`, `broken_pipe`)"),
            (find_wrong_probes, "(probe `none`)", "(probe `peek`), a probe is one_thing, probe x"),
            (find_wrong_probes, "probes peek,\nno_such_thing", "probes peek, half_close; not_a_probe"),
            (find_long_lines, "x" * 121, "x" * 120 + "\n|" + "x" * 200 + "\n```\n" + "x" * 200 + "\n```"),
        ],
    )
    def test_each_kind(self, check: Callable[[Document], Mistakes], wrong: str, right: str) -> None:
        assert list(check(Document("README.md", wrong))), "a mistake is not found"
        assert not list(check(Document("README.md", right)))

    def test_lines_are_right(self) -> None:
        text = "a\n\n```\nb\n```\n`splicer\nstats` and\n[a](none.md)\n"
        assert [line for line, _ in find_wrong_commands(Document("README.md", text))] == [6]
        assert [line for line, _ in find_wrong_links(Document("README.md", text))] == [8]

    def test_something_is_read(self) -> None:
        """Names are found where they should be: an empty list would forbid or allow everything."""
        assert {"README.md", "ARCHITECTURE.md", "HAZARDS.md"} <= set(documents.list_documents())
        assert "run" in documents.list_commands() and "bench" in documents.list_targets()
        assert len(documents.list_probes()) > 50
        assert all("--json" in documents.read_options(file) for file in TARGETS.values())
