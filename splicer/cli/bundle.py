# SPDX-License-Identifier: Apache-2.0
"""`splicer bundle`: what a bug report needs, in one file."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splicer import __version__
from splicer.daemon import instance
from splicer.errors import OK, SplicerError
from splicer.model import SCHEMA
from splicer.text import human_bytes, plural, printable

from . import doctor, options
from .context import Context
from .query import ask, ask_rows

if TYPE_CHECKING:
    from splicer.doctor.veil import Veil
    from splicer.policy.config import Settings


DESCRIPTION = """\
Write a tar.gz with what splicer doctor, status, flows, policy and events say,
versions, facts of the kernel, what is loaded, and the end of the log. A file
in it, manifest.json, says what could be private, and what is missing and why.
Works without a daemon as well. Nothing is sent anywhere. Takes some seconds."""

EPILOG = """\
private:
  addresses, names of containers, services, processes and cgroups, command
  lines, labels, images. With --anonymous each is replaced by a word, the same
  one throughout (container-3, address-2); ports, pids and numbers stay. Look
  through it all the same before you give it to somebody.

examples:
  sudo splicer bundle splicer.tar.gz
  sudo splicer bundle --anonymous splicer.tar.gz
  tar -xzOf splicer.tar.gz splicer-bundle/manifest.json

exit codes:
  0 written, whatever is missing in it; 1 failure, or there is such a file;
  2 usage"""

DIRECTORY = "splicer-bundle"
# So many flows, the first ones that the daemon tells of.
MOST_FLOWS = 2000
_PATIENCE_S = 10.0
_LOG = "log.json"

_OWNERS = ("addresses", "container names", "process names", "command lines", "cgroups")
PRIVATE: dict[str, tuple[str, ...]] = {
    "version.json": (),
    "kernel.json": (),
    "loaded.json": (),
    "doctor.json": ("cgroups", "names of other BPF programs", "paths"),
    "status.json": _OWNERS,
    "policy.json": ("addresses", "container names", "images", "labels", "cgroups"),
    "flows.json": _OWNERS,
    "events.json": (*_OWNERS, "labels"),
    _LOG: ("container names", "labels", "cgroups", "paths"),
}
"""The files, and what in them could be private."""


@dataclass(frozen=True)
class Piece:
    """A file of the bundle; `content` is None if it is missing, and `why` says for what reason, or what is
    left out."""

    name: str
    content: Any
    why: str = ""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer bundle`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("file", metavar="FILE", help="where to write it, with mode 0600")
    parser.add_argument("--anonymous", action="store_true", help="replace what could be private")
    parser.add_argument("--force", action="store_true", help="replace FILE if there is one")
    options.add_json(parser)
    options.add_run_dir(parser)
    options.add_pin_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Collect everything, and write it."""
    settings = options.resolve_settings(arguments, context).settings
    path: str = arguments.file
    if not arguments.force and os.path.lexists(path):
        raise _refuse(path)
    from splicer.doctor.veil import Veil

    veil = Veil() if arguments.anonymous else None
    # Before it takes its time: can it be written at all?
    with _replacing(path, force=arguments.force) as file:
        pieces = list(collect(settings, context))
        if veil is not None:
            # Twice: in sentences is replaced what was seen as a name elsewhere.
            for _ in range(2):
                covered = [_cover(piece, veil) for piece in pieces]
            pieces = covered
        manifest = describe(pieces, veil is not None)
        write(file, [Piece("manifest.json", manifest), *pieces])
        file.flush()
        size = file.tell()
    if arguments.json:
        context.write_json(manifest)
        return OK
    context.write(_report(path, size, manifest))
    return OK


def _report(path: str, size: int, manifest: dict[str, Any]) -> list[str]:
    there = [each for each in manifest["files"] if each["missing"] == ""]
    lines = [printable(f"Wrote {path}: {plural(len(there), 'file')}, {human_bytes(size)}.")]
    for each in manifest["files"]:
        if said := each["missing"] or each["note"]:
            lines.append(printable(f"  {each['name']:13} {'missing: ' if each['missing'] else ''}{said}"))
    if manifest["anonymous"]:
        lines.append("Names, addresses and command lines are replaced. Look through it all the same.")
    else:
        kinds = sorted({kind for each in there for kind in each["private"]})
        lines.append(f"It could be private: {', '.join(kinds)}. --anonymous replaces that.")
    return lines


# -- collecting --------------------------------------------------------------------------------------------


def collect(settings: Settings, context: Context) -> Iterator[Piece]:
    """All files of the bundle, one after the other."""
    from splicer.doctor import evidence

    holder = instance.find_holder(settings.run_dir)
    status = _try("status.json", lambda: ask(settings.run_dir, "status", _ALL, timeout=_PATIENCE_S))
    yield _try("version.json", lambda: _read_versions(status.content))
    yield _try("kernel.json", evidence.read_kernel)
    yield _try("loaded.json", lambda: _read_loaded(settings.pin_dir))
    yield status
    yield _try("policy.json", lambda: ask(settings.run_dir, "policy", timeout=_PATIENCE_S))
    yield _collect_flows(settings.run_dir)
    yield _try("events.json", lambda: _read_rows(settings.run_dir, "events", None))
    yield _try("doctor.json", lambda: _examine(settings, context))
    yield _collect_log(holder.pid if holder is not None else 0)


_ALL = {"neighbours": True, "coverage": True}


def _try(name: str, read: Callable[[], Any]) -> Piece:
    """What cannot be had is missing, and the others are still worth something."""
    try:
        return Piece(name, read())
    except SplicerError as error:
        return Piece(name, None, error.message)
    except OSError as error:
        return Piece(name, None, error.strerror or str(error))
    except Exception as error:  # it is a bug that is to be reported, after all
        return Piece(name, None, f"{type(error).__name__}: {error}")


def _read_versions(status: object) -> dict[str, Any]:
    running = status.get("version") if isinstance(status, dict) else None
    return {
        "schema": SCHEMA,
        "version": __version__,
        "daemon_version": running,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


def _read_loaded(pin_dir: str) -> list[dict[str, Any]]:
    from splicer.doctor import evidence

    if not os.path.isdir(pin_dir):
        raise SplicerError("nothing is loaded")
    return evidence.read_loaded(pin_dir)


def _read_rows(run_dir: str, command: str, most: int | None) -> list[dict[str, Any]]:
    _, rows = ask_rows(run_dir, command, command, timeout=_PATIENCE_S)
    return [dict(row) for row in itertools.islice(rows, most)]


def _collect_flows(run_dir: str) -> Piece:
    piece = _try("flows.json", lambda: _read_rows(run_dir, "flows", MOST_FLOWS + 1))
    if piece.content is not None and len(piece.content) > MOST_FLOWS:
        return Piece(piece.name, piece.content[:MOST_FLOWS], f"the first {MOST_FLOWS} connections of more")
    return piece


def _examine(settings: Settings, context: Context) -> dict[str, object]:
    from splicer.doctor import check, checks
    from splicer.doctor.surroundings import Surroundings

    surroundings = Surroundings(settings, context.environ)
    results = list(check.examine(checks.list_checks(), surroundings))
    return doctor.describe(results, check.judge(results, surroundings), surroundings)


def _collect_log(pid: int) -> Piece:
    from splicer.doctor import evidence

    unit = evidence.find_unit(pid) if pid else "splicer.service"
    if not unit:
        return Piece(_LOG, None, "the daemon is no service of systemd; its log is where its stderr goes")
    try:
        lines = evidence.read_log(unit)
    except FileNotFoundError:
        return Piece(_LOG, None, "journalctl is not there; the log is where the daemon's stderr goes")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Piece(_LOG, None, f"{unit}: {error}")
    entries, others = evidence.parse_log(lines)
    if not entries:
        return Piece(_LOG, None, f"the journal has nothing of {unit}")
    return Piece(_LOG, entries, f"{plural(others, 'line')} left out that are no JSON" if others else "")


# -- writing -----------------------------------------------------------------------------------------------


def _cover(piece: Piece, veil: Veil) -> Piece:
    # What has nothing private is as it is.
    from splicer.doctor.veil import KEPT

    # There the checks have names.
    veil.kept = KEPT | {"name"} if piece.name == "doctor.json" else KEPT
    content = veil.cover(piece.content) if PRIVATE[piece.name] else piece.content
    return Piece(piece.name, content, veil.cover_sentence(piece.why))


def describe(pieces: list[Piece], is_anonymous: bool) -> dict[str, Any]:
    """The manifest: what is in it, what could be private there, what is missing, and why."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "anonymous": is_anonymous,
        "files": [
            {
                "name": piece.name,
                "private": [] if is_anonymous else list(PRIVATE[piece.name]),
                "missing": piece.why if piece.content is None else "",
                "note": "" if piece.content is None else piece.why,
            }
            for piece in pieces
        ],
    }


def write(file: io.BufferedWriter, pieces: list[Piece]) -> None:
    """The tar.gz."""
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for piece in pieces:
            if piece.content is None:
                continue
            text = (json.dumps(piece.content, indent=1) + "\n").encode()
            entry = tarfile.TarInfo(f"{DIRECTORY}/{piece.name}")
            entry.size, entry.mode = len(text), 0o600
            archive.addfile(entry, io.BytesIO(text))


@contextlib.contextmanager
def _replacing(path: str, *, force: bool) -> Iterator[io.BufferedWriter]:
    """A file for its owner alone that takes the place of `path` when it is complete. Raises SplicerError."""
    draft = f"{path}.{os.getpid()}.part"
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SplicerError(
            f"cannot write ({path}: {error.strerror})", hint="name a file in another place"
        ) from error
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            yield file
        if force:
            os.replace(draft, path)
        else:
            os.link(draft, path)  # somebody may have made one meanwhile
    except FileExistsError as error:
        raise _refuse(path) from error
    except OSError as error:
        raise SplicerError(f"cannot write ({path}: {error.strerror})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def _refuse(path: str) -> SplicerError:
    return SplicerError(
        f"there is such a file already ({path})", hint="another name, or --force to replace it"
    )
