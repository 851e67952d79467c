# SPDX-License-Identifier: Apache-2.0
"""Programs from the cache, and from the compiler where they cannot be had there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splicer.errors import SplicerError
from splicer.kernel import store
from splicer.kernel.cache import Cache
from splicer.kernel.compiler import Sources
from splicer.kernel.store import Store

from ..conftest import Log
from .test_cache import make_compiled

SOURCES = Sources("text", ("-DA=1",))
NAME = SOURCES.name_compiled()
REQUEST = {"pin_dir": "/pins"}
LOCK = 7


class Scene:
    """A store whose loader and compiler are not there."""

    def __init__(self, directory: Path) -> None:
        self.log = Log()
        self.cache = Cache(str(directory))
        self.done: list[str] = []
        self.refused = ""
        self.has_compiler = True
        self.store = Store(SOURCES, self.cache, self.log, self.require)  # type: ignore[arg-type]

    def require(self) -> None:
        self.done.append("require")
        if not self.has_compiler:
            raise SplicerError("there is no compiler")

    def run_loader(self, request: dict[str, Any], lock: int, log: object) -> dict[str, Any]:
        assert (request["pin_dir"], lock) == ("/pins", LOCK)
        if "compiled" in request:
            assert request["compiled"] == make_compiled().to_document()
            self.done.append("load")
            if self.refused:
                raise SplicerError(self.refused)
            return {"missing": {"census": "why"}, "compiled": None}
        assert (request["text"], tuple(request["flags"])) == (SOURCES.text, SOURCES.flags)
        self.done.append("compile")
        return {"missing": {"answer4": "why"}, "compiled": make_compiled().to_document()}

    def start(self) -> dict[str, str]:
        self.store.prepare()
        return self.store.load(dict(REQUEST), LOCK)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def scene(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene(directory)
    monkeypatch.setattr(store, "_run_loader", made.run_loader)
    return made


def test_nothing_is_kept(scene: Scene) -> None:
    assert scene.start() == {"answer4": "why"}
    assert scene.done == ["require", "compile"]
    assert scene.log.names() == ["compiling"]
    assert scene.cache.read(NAME) == make_compiled()


def test_something_is_kept(scene: Scene) -> None:
    scene.cache.write(NAME, make_compiled())
    scene.has_compiler = False
    assert scene.start() == {"census": "why"}
    assert scene.done == ["load"]
    assert scene.log.names() == ["programs_from_cache", "program_refused"]


def test_no_compiler(scene: Scene) -> None:
    """Found out before anything is loaded, or drained."""
    scene.has_compiler = False
    with pytest.raises(SplicerError, match="no compiler"):
        scene.store.prepare()
    assert scene.log.names() == []


def test_what_is_kept_is_damaged(scene: Scene, directory: Path) -> None:
    scene.cache.write(NAME, make_compiled())
    (directory / f"{NAME}.programs").write_text("nonsense")
    scene.start()
    assert scene.done == ["require", "compile"]
    assert scene.log.names() == ["cache_unusable", "compiling"]
    assert scene.cache.read(NAME) == make_compiled()


def test_what_is_kept_is_refused_by_the_kernel(scene: Scene) -> None:
    scene.cache.write(NAME, make_compiled())
    scene.refused = "the verifier does not like it"
    scene.start()
    assert scene.done == ["load", "require", "compile"]
    assert scene.log.events[0] == (
        "warning",
        "cache_unusable",
        {"path": scene.cache.locate(NAME), "why": "the verifier does not like it"},
    )


def test_nothing_can_be_kept(scene: Scene, directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    scene.start()
    assert scene.done == ["require", "compile"]
    assert scene.log.names() == ["cache_unusable", "compiling", "cache_not_written"]
