# SPDX-License-Identifier: Apache-2.0
"""The image: small, complete, described."""

from __future__ import annotations

import json

import pytest
from support.daemon import REPOSITORY
from support.docker import DockerError, Engine
from support.images import SPLICER, base_of

# Promised in examples/compose/README.md. Most of it is LLVM, which compiles the programs for the kernel.
ADDED_LIMIT = 300_000_000  # bytes, beside the base image


def test_it_is_small(engine: Engine) -> None:
    base, _ = base_of(REPOSITORY / "Dockerfile")
    added = engine.inspect(SPLICER)["Size"] - engine.inspect(base)["Size"]
    assert added < ADDED_LIMIT


def test_it_says_what_it_is(engine: Engine) -> None:
    config = engine.inspect(SPLICER)["Config"]
    version = json.loads(engine.docker("run", "--rm", SPLICER, "version", "--json"))["version"]
    assert config["Labels"]["org.opencontainers.image.version"] == version
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0 AND GPL-2.0-only"
    assert config["Entrypoint"] == ["splicer"]
    assert config["Cmd"] == ["run"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "splicer", "status", "--brief"]


@pytest.mark.parametrize("tool", ["pip", "gcc", "make", "clang", "git"])
def test_nothing_is_left_of_the_build(engine: Engine, tool: str) -> None:
    script = f"command -v {tool} || echo none"
    found = engine.docker("run", "--rm", "--entrypoint", "sh", SPLICER, "-c", script)
    assert found.strip() == "none"


def test_without_privileges_it_says_what_it_lacks(engine: Engine) -> None:
    with pytest.raises(DockerError, match="CAP_SYS_ADMIN"):
        engine.docker("run", "--rm", SPLICER)
