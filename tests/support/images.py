# SPDX-License-Identifier: Apache-2.0
"""The images of the tests with containers: Debian by debootstrap, splicer and its demonstration by the
repository's own Dockerfiles.

A registry of images is not needed: what the Dockerfiles call their base is made from the package source that
this machine's apt uses, and tagged with the same name. It brings apt's own way to reach that source along.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from support.daemon import REPOSITORY
from support.docker import TEMPORARY, Engine

# Only to make the next run faster; made anew when missing or unfit.
CACHE = Path("/var/cache/splicer-test")
SPLICER, DEMO = "splicer", "splicer-demo"
_SUITES = {"12": "bookworm", "13": "trixie"}
_BASE = re.compile(r"^ARG BASE=(debian:(\d+)-slim)$", re.MULTILINE)
# What debian:*-slim leaves out as well.
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt")
# Settings of apt that concern other things than the way to the packages.
_NOT_TAKEN = ("Acquire::IndexTargets", "Acquire::CompressionTypes", "Acquire::Changelogs")
_LEFT_OUT_BELOW = ("var/lib/apt/lists", "usr/share/zoneinfo")


# Settings of pip that are the way to its packages. Of what lies on this machine's disk nothing is taken.
_PIP_TAKEN = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "default-timeout", "timeout")


def base_of(dockerfile: Path) -> tuple[str, str]:
    """Name of the base image and Debian's name for the suite in it."""
    found = _BASE.search(dockerfile.read_text())
    assert found, f"no ARG BASE=debian:NN-slim in {dockerfile}"
    return found[1], _SUITES[found[2]]


def build_all(engine: Engine) -> None:
    """Base, splicer and demonstration. Raises DockerError, CalledProcessError."""
    base, suite = base_of(REPOSITORY / "Dockerfile")
    with archive_of(suite).open("rb") as archive:
        engine.docker("import", "-", base, stdin=archive, timeout=120)
    _add_source(engine, base, suite)
    engine.docker("build", "--tag", SPLICER, str(REPOSITORY), timeout=600)
    dockerfile = REPOSITORY / "examples/compose/Dockerfile"
    engine.docker("build", "--tag", DEMO, "--file", str(dockerfile), str(REPOSITORY), timeout=600)


def archive_of(suite: str) -> Path:
    """A tar of the suite's smallest system, from the cache if there is a complete one."""
    archive = CACHE / f"{suite}.tar"
    if not _is_complete(archive):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"splicer-test-{os.getpid()}-", dir=TEMPORARY) as directory:
            _make_archive(suite, Path(directory), archive)
    return archive


def _is_complete(archive: Path) -> bool:
    try:
        with tarfile.open(archive) as content:
            names = content.getnames()
    except (OSError, tarfile.TarError):
        return False
    return "./etc/debian_version" in names and len(names) > 1000


def _make_archive(suite: str, directory: Path, archive: Path) -> None:
    root = directory / "root"
    command = ["debootstrap", "--variant=minbase", suite, str(root), _find_source()]
    _call(command, directory / "debootstrap.log")
    for path in _LEFT_OUT:
        shutil.rmtree(root / path)
    for path in _LEFT_OUT_BELOW:
        shutil.rmtree(root / path)
        (root / path).mkdir()
    draft = archive.with_suffix(f".{os.getpid()}")
    try:
        _call(["tar", "-C", str(root), "--one-file-system", "-cf", str(draft), "."], directory / "tar.log")
        draft.replace(archive)
    finally:
        draft.unlink(missing_ok=True)


def _call(command: list[str], log: Path) -> None:
    with log.open("wb") as sink:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{tail}")


def _ask_apt(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _find_source() -> str:
    """Address of the package source of this machine's own Debian."""
    lines = _ask_apt("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)")
    addresses = [line.split("|")[2] for line in lines if line.startswith("Debian|Debian|")]
    assert addresses, "this machine's apt has no source with Debian's packages (apt-get update?)"
    return addresses[0]


def apt_of(suite: str) -> tuple[str, list[str]]:
    """For apt in a suite's system: this machine's source, and settings by which it is reached (proxies)."""
    settings = [
        line
        for line in _ask_apt("apt-config", "dump", "Acquire")
        if not line.endswith('"";') and not line.startswith(_NOT_TAKEN)
    ]
    return f"deb {_find_source()} {suite} main", settings


def pip_of(certificates: str) -> tuple[list[str], Path | None]:
    """For pip in another system: lines of its configuration, by which this machine's index is reached; and
    the file that has to be at the path `certificates` there, if there is one."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    found: dict[str, str] = {}
    # What the environment says counts before any file, and is listed first.
    for line in reversed(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ):
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    bundle = Path(found["cert"]) if "cert" in found else None
    settings = []
    for name in _PIP_TAKEN:
        words = [certificates] if name == "cert" and bundle else found.get(name, "").split()
        words = [word for word in words if not word.startswith("file:")]
        if words:
            settings.append(f"{name} = {' '.join(words)}")
    return settings, bundle


def _add_source(engine: Engine, base: str, suite: str) -> None:
    """Give apt in the base image the way to its packages."""
    source, settings = apt_of(suite)
    script = 'echo "$1" >/etc/apt/sources.list && echo "$2" >/etc/apt/apt.conf.d/99machine'
    name = engine.docker("create", base, "sh", "-c", script, "sh", source, "\n".join(settings)).strip()
    engine.docker("start", "--attach", name)
    # A container's settings would become the image's: debian:*-slim has a shell for its command.
    engine.docker("commit", "--change", 'CMD ["bash"]', name, base)
    engine.docker("rm", name)
