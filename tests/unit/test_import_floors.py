# SPDX-License-Identifier: Apache-2.0
"""The package is a house: a module imports from its own floor and from those below, never from above.

Each foreign library has one module that imports it, so that the rest can be tested without it and its
surprises stay in one place. Both are read from the source, imports inside functions included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import splicer

PACKAGE = Path(splicer.__file__).resolve().parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "kinds", "labels", "model", "text", "layout"),
    ("config", "rules", "policy", "statements", "explanation"),
    (
        "libbpf",
        "btf",
        "programs",
        "compiler",
        "namespaces",
        "cgroups",
        "bpffs",
        "logs",
        "engine",
        "scopes",
        "process",
        "inventory",
        "overrides",
        "notify",
    ),
    (
        "probes",
        "generation",
        "sweep",
        "patrol",
        "control",
        "instance",
        "watcher",
        "governor",
        "attribution",
        "answers",
    ),
    ("daemon",),
    ("cli", "__main__"),
)
FLOOR_OF = {module: number for number, modules in enumerate(FLOORS) for module in modules}

# A library to the modules that may import it. None at all: wherever it turns up, decide first where it
# belongs.
ONLY_IMPORTERS: dict[str, frozenset[str]] = {
    "bcc": frozenset({"compiler"}),
    "pyroute2": frozenset({"namespaces"}),
    "psutil": frozenset({"process"}),
    "structlog": frozenset({"logs"}),
    "docker": frozenset({"engine"}),
}
# Shared objects are found by name and not by an import statement. libbcc carries a libbpf of its own.
SHARED_OBJECTS: dict[str, str] = {"bpf": "libbpf", "bcc": "compiler"}

# What must not be needed to show a help text, or to ask a daemon that somebody else has started.
HEAVY = ("bcc", "ctypes", "docker", "psutil", "pyroute2", "structlog")


@dataclass(frozen=True)
class Import:
    """One imported name, dotted, and where."""

    name: str
    importer: str
    line: int


def module_of(file: Path) -> str:
    """The part of the package a file belongs to: `config`, `cli`; empty for the package's own __init__."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


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
    target = parts[1]
    if target not in FLOOR_OF:
        return None  # __version__ and the like
    if FLOOR_OF[target] > FLOOR_OF[found.importer]:
        return (
            f"{found.importer}:{found.line} (floor {FLOOR_OF[found.importer]}) imports "
            f"{target} (floor {FLOOR_OF[target]})"
        )
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


def test_every_module_has_a_floor() -> None:
    homeless = {module_of(file) for file in FILES} - set(FLOOR_OF) - {""}
    assert not homeless, f"give {sorted(homeless)} a floor in FLOORS"
    assert sum(len(floor) for floor in FLOORS) == len(FLOOR_OF), "a module stands on two floors"


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
    [["--help"], ["run", "--help"], ["flows", "--help"], ["completion", "bash"], ["run", "--print-config"]],
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
            "import splicer.daemon",
            "from splicer import daemon",
            "from splicer.daemon import Daemon",
            "from . import daemon",
            "from .daemon import Daemon",
            "def f():\n    from splicer.cli import main",
            "from importlib import import_module\nimport_module('splicer.daemon')",
            "if TYPE_CHECKING:\n    from splicer.generation import unload",
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
            find_foreign(found) for found in self.read(f"def f():\n    from {library}.x import y", "daemon")
        )
        for module in ONLY_IMPORTERS[library]:
            assert not any(find_foreign(found) for found in self.read(f"import {library}", module))

    def test_shared_objects(self) -> None:
        source = 'x = ctypes.CDLL("libbpf.so.1")\ny = util.find_library("bcc")\n"""libbpf.so, elsewhere"""'
        assert set(find_shared_objects(source)) == {("bpf", 1), ("bcc", 2)}
