# SPDX-License-Identifier: Apache-2.0
"""The package is a house: a room uses the rooms on the floors below it, never those beside or above it.

Each foreign library has one module that imports it, so that the rest can be tested without it and its
surprises stay in one place. Both are read from the source, imports inside functions included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import splicer

PACKAGE = Path(splicer.__file__).resolve().parent

# From the ground up. Rooms on one floor know nothing of each other, and a room may use all that is below it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "model", "text", "logs", "pcapng"),
    ("host",),
    ("kernel", "containers", "metrics"),
    ("policy",),
    ("daemon",),
    ("doctor", "bench"),
    ("cli", "__main__"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
GROUND = FLOORS[0]

# A library to the modules that may import it. None at all: wherever it turns up, decide first where it
# belongs.
ONLY_IMPORTERS: dict[str, frozenset[str]] = {
    # One of them is a program of its own, which a measurement runs.
    "bcc": frozenset({"kernel.compiler", "bench.loads.naive"}),
    "psutil": frozenset({"host.namespaces", "host.process"}),
    "structlog": frozenset({"logs"}),
    "docker": frozenset({"containers.engine"}),
    "matplotlib": frozenset({"bench.plots"}),
    "prometheus_client": frozenset({"metrics.page"}),
    "curses": frozenset({"cli.screen"}),
}
# Shared objects are found by name and not by an import statement. libbcc carries a libbpf of its own.
SHARED_OBJECTS: dict[str, str] = {"bpf": "kernel.libbpf", "bcc": "kernel.compiler"}

# What must not be needed to show a help text, or to ask a daemon that somebody else has started.
HEAVY = (
    "bcc",
    "ctypes",
    "curses",
    "docker",
    "matplotlib",
    "prometheus_client",
    "psutil",
    "structlog",
)


@dataclass(frozen=True)
class Import:
    """One imported name, dotted, and where."""

    name: str
    importer: str
    line: int


def module_of(file: Path) -> str:
    """The module's name inside the package: `errors`, `policy.config`; that of a room is its __init__'s."""
    return ".".join(part for part in file.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def room_of(module: str) -> str:
    """The room a module is in; a module on the ground floor is one by itself."""
    return module.partition(".")[0]


def read_imports(source: str, importer: str, package: tuple[str, ...]) -> Iterator[Import]:
    """All imports of a source text; relative ones are resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, importer, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from splicer import control` may name a module as well as an attribute: take both for a module.
            for alias in node.names:
                yield Import(f"{start}.{alias.name}", importer, node.lineno)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            name = node.args[0]
            if called in ("__import__", "import_module", "importlib.import_module") and isinstance(
                name, ast.Constant
            ):
                yield Import(str(name.value), importer, node.lineno)


def find_upward(found: Import) -> str | None:
    """Why an import breaks the order of the floors, or None."""
    parts = found.name.split(".")
    if parts[0] != "splicer" or len(parts) < 2 or found.importer == "":
        return None
    target, room = parts[1], room_of(found.importer)
    if target not in FLOOR_OF or target == room:
        return None  # __version__ and the like, and the same room
    above, floor = FLOOR_OF[target], FLOOR_OF[room]
    if above > floor or (above == floor and target not in GROUND and room != "__main__"):
        return f"{found.importer}:{found.line} (floor {floor}) imports {target} (floor {above})"
    return None


def find_foreign(found: Import) -> str | None:
    """Why an import of a library is in the wrong module, or None."""
    library = found.name.split(".")[0]
    if library in ONLY_IMPORTERS and found.importer not in ONLY_IMPORTERS[library]:
        allowed = ", ".join(sorted(ONLY_IMPORTERS[library])) or "nothing so far"
        return f"{found.importer}:{found.line} imports {library}, which only {allowed} may"
    return None


def find_shared_objects(source: str) -> Iterator[tuple[str, int]]:
    """Short names of the shared objects that a source text opens: `libbpf.so.1`, or `find_library("bpf")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = re.fullmatch(r"(?:.*/)?lib(bpf|bcc)\.so[.\d]*", node.value)
            if match:
                yield match[1], node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "find_library":
            yield from (
                (str(argument.value), node.lineno)
                for argument in node.args
                if isinstance(argument, ast.Constant)
            )


FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path) -> list[Import]:
    package = ("splicer", *file.relative_to(PACKAGE).parent.parts)
    return list(read_imports(file.read_text(), module_of(file), package))


def test_every_room_has_a_floor() -> None:
    homeless = {room_of(module_of(file)) for file in FILES} - set(FLOOR_OF) - {""}
    assert not homeless, f"give {sorted(homeless)} a floor in FLOORS"
    assert sum(len(floor) for floor in FLOORS) == len(FLOOR_OF), "a room stands on two floors"


def test_every_room_says_what_it_owns_and_what_it_must_not_know() -> None:
    for room in sorted(
        file.parent for file in FILES if file.name == "__init__.py" and file.parent != PACKAGE
    ):
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
        lines = said.splitlines()
        assert len(lines) == 4, f"{room.name}: what it is, then what it owns, then what it must not know"
        assert lines[2].startswith("Owns ") and lines[3].startswith("Must not "), room.name


def test_every_room_is_installed() -> None:
    packages = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    rooms = {f"splicer.{room}" for room in FLOOR_OF if (PACKAGE / room).is_dir()}
    assert set(packages) == {"splicer", "splicer.bpf"} | rooms


def test_unit_tests_mirror_the_rooms() -> None:
    """A test below tests/unit/ROOM is of that room; there is no room without tests."""
    rooms = {room for room in FLOOR_OF if (PACKAGE / room).is_dir()}
    here = Path(__file__).parent
    assert {child.parent.name for child in here.glob("*/test_*.py")} == rooms


def test_modules_of_a_room_do_not_import_each_other_in_circles() -> None:
    modules = {module_of(file) for file in FILES}
    uses = {
        module_of(file): {
            module
            for found in imports_of(file)
            for name in (found.name.removeprefix("splicer."),)
            for module in (name, name.rpartition(".")[0])
            if module in modules and "." in module
        }
        for file in FILES
    }
    while free := {module for module, used in uses.items() if not used & set(uses)}:
        uses = {module: used for module, used in uses.items() if module not in free}
    assert not uses, f"circles among: {', '.join(sorted(uses))}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    wrong = [reason for found in imports_of(file) if (reason := find_upward(found))]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_each_library_has_one_importer(file: Path) -> None:
    wrong = [reason for found in imports_of(file) if (reason := find_foreign(found))]
    assert not wrong, "; ".join(wrong)
    opened = [
        f"{module_of(file)}:{line} opens lib{name}, which only {SHARED_OBJECTS[name]} may"
        for name, line in find_shared_objects(file.read_text())
        if SHARED_OBJECTS.get(name, module_of(file)) != module_of(file)
    ]
    assert not opened, "; ".join(opened)


def test_the_package_itself_imports_nothing() -> None:
    assert imports_of(PACKAGE / "__init__.py") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["doctor", "--help"],
        ["bench", "--help"],
        ["completion", "bash"],
        ["run", "--print-config"],
    ],
)
def test_help_needs_no_heavy_library(arguments: list[str]) -> None:
    source = (
        "import sys\n"
        "from splicer.cli.main import main\n"
        f"code = main({arguments!r}, environ={{}})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else code)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", source], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr


class TestTheTest:
    """A guard that cannot bark is none."""

    def read(
        self, source: str, importer: str = "errors", package: tuple[str, ...] = ("splicer",)
    ) -> list[Import]:
        return list(read_imports(source, importer, package))

    @pytest.mark.parametrize(
        "source",
        [
            "import splicer.daemon.loop",
            "from splicer import daemon",
            "from splicer.daemon.loop import Daemon",
            "from . import daemon",
            "from .daemon import Daemon",
            "def f():\n    from splicer.cli import main",
            "from importlib import import_module\nimport_module('splicer.daemon.loop')",
            "if TYPE_CHECKING:\n    from splicer.kernel.generation import unload",
        ],
    )
    def test_upward_imports_are_found(self, source: str) -> None:
        assert any(find_upward(found) for found in self.read(source))

    @pytest.mark.parametrize(
        "source", ["from splicer import __version__", "import os", "from .model import Flow"]
    )
    def test_others_are_not(self, source: str) -> None:
        assert not any(find_upward(found) for found in self.read(source))

    def test_relative_imports_inside_the_command_line(self) -> None:
        (found,) = self.read("from .context import Context", "cli", ("splicer", "cli"))
        assert found.name == "splicer.cli.context.Context"
        (found,) = self.read("from ..daemon import Daemon", "cli", ("splicer", "cli"))
        assert found.name == "splicer.daemon.Daemon"

    @pytest.mark.parametrize("library", sorted(ONLY_IMPORTERS))
    def test_a_library_in_the_wrong_place(self, library: str) -> None:
        assert any(
            find_foreign(found)
            for found in self.read(f"def f():\n    from {library}.x import y", "daemon.loop")
        )
        for module in ONLY_IMPORTERS[library]:
            assert not any(find_foreign(found) for found in self.read(f"import {library}", module))

    def test_shared_objects(self) -> None:
        source = 'x = ctypes.CDLL("libbpf.so.1")\ny = util.find_library("bcc")\n"""libbpf.so, elsewhere"""'
        assert set(find_shared_objects(source)) == {("bpf", 1), ("bcc", 2)}
