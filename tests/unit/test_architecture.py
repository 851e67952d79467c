# SPDX-License-Identifier: Apache-2.0
"""ARCHITECTURE.md says what the code says: every module and BPF file, who changes a pair's state, the flags
and switches, and all times."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from support.documents import REPOSITORY, Document, read_document

ARCHITECTURE = read_document("ARCHITECTURE.md")
SOURCES = sorted(
    path
    for pattern in ("bpf/*.[ch]", "splicer/**/*.py")
    for path in REPOSITORY.glob(pattern)
    if path.name != "__init__.py"
)

# A name that ends so is a time or a share of one; whatever else paces something is in the table as well.
TIMED = re.compile(r".*_(?:NS|MS|S|SHARE)")
UNIT_OF_NAME = {"NS": Fraction(1, 10**9), "MS": Fraction(1, 1000)}
UNITS = {"": 1, "s": 1, "ms": Fraction(1, 1000), "%": Fraction(1, 100)}
# Dataclasses whose fields are times or paces, with those that are.
FIELDS = {
    "splicer/containers/watcher.py": {"Timing": {"*"}},
    "splicer/policy/config.py": {"Settings": {"hot_reads", "lease", "stop_timeout"}},
}


def find_rows(head: list[str], document: Document = ARCHITECTURE) -> list[list[str]]:
    """The rows of the table with these headings."""
    found = [rows for heading, rows in document.tables() if heading == head]
    assert len(found) == 1, f"{len(found)} tables with the headings {head}"
    return found[0]


def unquote(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# -- modules -----------------------------------------------------------------------------------------------


def list_named(document: Document) -> dict[str, list[str]]:
    """Directory to the files that the table below its heading names, in order."""
    named: dict[str, list[str]] = {}
    directory = ""
    for _, line, _ in document.lines:
        heading = re.match(r"#+ ((?:bpf|splicer)/(?:\w+/)*)(?::.*)?$", line)
        if line.startswith("#"):
            directory = heading[1].rstrip("/") if heading else ""
        elif directory and line.startswith("|"):
            named.setdefault(directory, []).extend(unquote(line.split("|")[1]))
    return named


@pytest.mark.parametrize("directory", sorted({str(path.parent.relative_to(REPOSITORY)) for path in SOURCES}))
def test_every_file_is_named_once(directory: str) -> None:
    files = [path.name for path in SOURCES if str(path.parent.relative_to(REPOSITORY)) == directory]
    assert sorted(list_named(ARCHITECTURE).get(directory, [])) == files


def test_functions_and_classes_exist() -> None:
    """Of Python, C, or Linux."""
    text = "\n".join(path.read_text() for path in SOURCES)
    linux = {"connect", "accept", "secure_tcp_seq", "sk_msg_recvmsg", "tcp_inq"}
    for span in ARCHITECTURE.spans:
        if match := re.fullmatch(r"(\w+)\(\)", span.text):
            defined = re.search(rf"(?:\bdef {match[1]}|^(?:[\w *]+[ *])?{match[1]})\(", text, re.M)
            assert match[1] in linux or defined, f"line {span.line}: {span.text}"
    for name in re.findall(r"\bclass ([A-Z]\w+)", ARCHITECTURE.prose):
        assert len(name) == 1 or re.search(rf"^class {name}\b", text, re.M), name


# -- states ------------------------------------------------------------------------------------------------


def find_writes(name: str, source: str) -> Iterator[tuple[str, str]]:
    """Which state a file can give to a pair: (file, state), by itself or through start_draining()."""
    code = re.sub(r"/\*.*?\*/", "", source, flags=re.S)
    values = re.findall(r"WRITE_ONCE\([^,;]*->state,\s*([^;]*)\);", code)
    values += re.findall(r"->state\s*=(?!=)\s*([^;]*);", code)
    for value in values:
        states = re.findall(r"STATE_(\w+)", value.rpartition("?")[2])
        assert states, f"{name}: which state is it? {value}"
        yield from ((name, state) for state in states)
    if re.search(r"\bstart_draining\(", code):
        yield name, "start_draining"


def read_enum(name: str) -> set[str]:
    text = (REPOSITORY / "bpf/types.h").read_text()
    body = re.search(rf"enum {name} \{{(.*?)\n\}};", text, re.S)
    assert body, name
    return set(re.findall(r"^\t([A-Z]\w*)", body[1], re.M))


def find_wrong_changes(rows: list[list[str]], sources: dict[str, str]) -> Iterator[str]:
    """What the table of changes says and the code does not, and the other way round."""
    written = {write for name, source in sources.items() for write in find_writes(name, source)}
    said = {(unquote(file)[0], state) for _, to, _, _, file in rows for state in unquote(to)}
    for file, state in sorted(written):
        # The function itself stands for those who call it.
        if file == "bpf/registry.h":
            continue
        if state == "start_draining":
            if not {(file, "DRAINING"), (file, "LEAVING")} & said:
                yield f"{file} starts a way back, and no row says so"
        elif (file, state) not in said:
            yield f"{file} makes a pair {state}, and no row says so"
    for file, state in sorted(said):
        goes_back = state in ("DRAINING", "LEAVING") and (file, "start_draining") in written
        if (file, state) not in written and not goes_back:
            yield f"{file} never makes a pair {state}"


STATE_HEAD = ["from", "to", "program", "when", "file"]


def read_bpf() -> dict[str, str]:
    return {f"bpf/{path.name}": path.read_text() for path in SOURCES if path.parent.name == "bpf"}


def test_changes_of_state() -> None:
    rows = find_rows(STATE_HEAD)
    assert not list(find_wrong_changes(rows, read_bpf()))
    states = {name.removeprefix("STATE_") for name in read_enum("pair_state")}
    assert {state for row in rows for cell in row[:2] for state in unquote(cell)} == states
    assert {
        unquote(row[0])[0] for row in find_rows(["state", "what the verdict does", "what it means"])
    } == states


def test_only_programs_write_the_state() -> None:
    for path in SOURCES:
        if path.suffix == ".py":
            assert not re.search(r"\"pairs\"\]\.(?:set|delete|update)", path.read_text()), path


def test_flags_and_switches() -> None:
    assert {
        unquote(row[0])[0] for row in find_rows(["flag", "meaning", "set by", "cleared by"])
    } == read_enum("end_flag")
    text = (REPOSITORY / "bpf/types.h").read_text()
    body = text.partition("struct settings {")[2].partition("};")[0]
    switches = {unquote(row[0])[0] for row in find_rows(["field", "meaning", "written by"])}
    assert switches <= set(re.findall(r"u(?:32|64) (\w+);", body))


# -- times -------------------------------------------------------------------------------------------------


def _evaluate(node: ast.expr) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    return None


def read_constants(file: str, text: str) -> dict[str, Fraction]:
    """Numbers by name, times in seconds: macros, constants of a module, fields of dataclasses in FIELDS."""
    found: dict[str, Fraction] = {}
    if not file.endswith(".py"):
        for name, value in re.findall(r"^#define\s+(\w+)\s+(.*?)\s*(?:/\*.*)?$", text, re.M):
            number = re.fullmatch(r"(\d+)(?:U?L?L?)", value)
            assert number or not TIMED.fullmatch(name), f"{file}: write {name} as a number"
            if number:
                found[name] = Fraction(number[1])
    else:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, value = node.targets[0].id, _evaluate(node.value)
                assert value is not None or not TIMED.fullmatch(name), f"{file}: write {name} as a number"
                if value is not None:
                    found[name] = value
            elif isinstance(node, ast.ClassDef) and node.name in FIELDS.get(file, {}):
                wanted = FIELDS[file][node.name]
                for field in node.body:
                    if (
                        isinstance(field, ast.AnnAssign)
                        and isinstance(field.target, ast.Name)
                        and field.value
                    ):
                        value = _evaluate(field.value)
                        if value is not None and {"*", field.target.id} & wanted:
                            found[f"{node.name}.{field.target.id}"] = value
    return {name: value * UNIT_OF_NAME.get(name.rpartition("_")[2], 1) for name, value in found.items()}


@functools.cache
def read_all_constants() -> dict[tuple[str, str], Fraction]:
    return {
        (str(path.relative_to(REPOSITORY)), name): value
        for path in SOURCES
        for name, value in read_constants(str(path.relative_to(REPOSITORY)), path.read_text()).items()
    }


def parse_value(text: str) -> Fraction:
    match = re.fullmatch(r"([\d.]+)\s*(\D*)", text)
    assert match and match[2] in UNITS, f"no number with a unit: {text}"
    return Fraction(match[1]) * UNITS[match[2]]


def find_wrong_times(rows: list[list[str]], constants: dict[tuple[str, str], Fraction]) -> Iterator[str]:
    said = {(unquote(file)[0], unquote(name)[0]): parse_value(value) for name, value, file, _ in rows}
    if len(said) != len(rows):
        yield "a constant stands there twice"
    for (file, name), value in said.items():
        if (file, name) not in constants:
            elsewhere = ", ".join(other for other, each in constants if each == name)
            yield f"{name} is not in {file}" + (f" but in {elsewhere}" if elsewhere else "")
        elif constants[file, name] != value:
            yield f"{name} is {float(constants[file, name]):g} in {file}, not {float(value):g}"
    for file, name in sorted(set(constants) - set(said)):
        if TIMED.fullmatch(name) or "." in name:
            yield f"{name} of {file} is missing"


TIME_HEAD = ["constant", "value", "file", "meaning"]


def test_times() -> None:
    assert not list(find_wrong_times(find_rows(TIME_HEAD), read_all_constants()))


# -- the test of the test ----------------------------------------------------------------------------------


class TestTheTest:
    """What is wrong or missing in a table is found."""

    def read(self, text: str) -> Document:
        return Document("ARCHITECTURE.md", text)

    def test_a_module_that_is_not_named(self) -> None:
        text = (
            "## splicer/host/: what\n\n| | |\n|---|---|\n| `a.py`, `b.py` | `c.py` |\n## Else\n| `d.py` | |"
        )
        assert list_named(self.read(text)) == {"splicer/host": ["a.py", "b.py"]}

    @pytest.mark.parametrize(
        ("source", "found"),
        [
            ("WRITE_ONCE(p->state, STATE_SPLICED);", True),
            ("WRITE_ONCE(p->state, p->state == STATE_PAIRED ?\n\tSTATE_SPLICED : STATE_DRAINING);", True),
            ("WRITE_ONCE(visit->pair->state, STATE_PAIRED);", True),
            ("p->state = STATE_LEAVING;", True),
            ("start_draining(p, reason);", True),
            ("if (p->state == STATE_SPLICED)", False),
            ("/* start_draining(p, reason); */", False),
        ],
    )
    def test_a_change_that_no_row_has(self, source: str, found: bool) -> None:
        assert bool(list(find_wrong_changes([], {"bpf/x.c": source}))) == found

    def test_a_row_that_no_code_has(self) -> None:
        rows = [["`PAIRED`", "`SPLICED`", "x", "", "`bpf/x.c`"]]
        assert list(find_wrong_changes(rows, {"bpf/x.c": "WRITE_ONCE(p->state, STATE_PAIRED);"}))
        assert not list(find_wrong_changes(rows, {"bpf/x.c": "WRITE_ONCE(p->state, STATE_SPLICED);"}))

    @pytest.mark.parametrize(
        ("row", "mistakes"),
        [
            ("| `A_NS` | 15 ms | `bpf/x.h` | |", 0),
            ("| `A_NS` | 16 ms | `bpf/x.h` | |", 1),
            ("| `A_NS` | 15 s | `bpf/x.h` | |", 1),
            ("| `A_NS` | 15 ms | `bpf/y.h` | |", 2),
            ("| `STEPS` | 3 | `bpf/x.h` | |", 1),
        ],
    )
    def test_times_that_are_wrong_or_missing(self, row: str, mistakes: int) -> None:
        text = "#define A_NS\t15000000ULL /* x */\n#define STEPS 3\n#define NAME other\n"
        constants = {("bpf/x.h", name): value for name, value in read_constants("bpf/x.h", text).items()}
        table = self.read("| constant | value | file | meaning |\n|---|---|---|---|\n" + row)
        assert len(list(find_wrong_times(find_rows(TIME_HEAD, table), constants))) == mistakes

    def test_times_that_cannot_be_read(self) -> None:
        with pytest.raises(AssertionError, match="A_NS"):
            read_constants("bpf/x.h", "#define A_NS\t(2 * B_NS)\n")
        with pytest.raises(AssertionError, match="_A_S"):
            read_constants("splicer/x.py", "_A_S = 2 * 3\n")

    def test_constants_of_python(self) -> None:
        text = "_PAUSE_S = 0.05\n_SHARE = 0.05\nX = (1, 2)\nclass Timing:\n    stop: float = 1.0\n"
        assert read_constants("splicer/containers/watcher.py", text) == {
            "_PAUSE_S": Fraction(1, 20),
            "_SHARE": Fraction(1, 20),
            "Timing.stop": 1,
        }

    def test_something_is_read(self) -> None:
        assert len(read_all_constants()) > 50
        assert len(find_rows(TIME_HEAD)) > 30 and len(find_rows(STATE_HEAD)) > 10
        assert all(Path(REPOSITORY / file).is_file() for file in FIELDS)
