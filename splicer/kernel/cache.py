# SPDX-License-Identifier: Apache-2.0
"""What was compiled, kept for the next start: one file for each kernel and each set of sources and settings.

What is read here is loaded into the kernel. So the directory and the file must belong to whoever runs this,
or to root, and nobody else may be able to write to them. Who can write to a directory above can put another
one in its place, but none with such a file in it. A file is

    splicer-programs 1 SHA-256        of what follows; it finds damage, and is no proof of who wrote it
    {"name", "kernel", ...}           JSON; the rest is of class Compiled

It is written under another name and renamed, so that it is there as a whole or not at all. There are a few at
most; the one that was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator

from splicer.kernel import compiler
from splicer.kernel.compiled import Compiled

OFF = "off"
KEPT = 8
_MARK = b"splicer-programs 1 "
_LARGEST = 16 << 20  # bytes
_SUFFIX = ".programs"
_NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(_SUFFIX)}")
_DRAFT = "draft"


class CacheError(Exception):
    """Something is wrong with the cache, which is no reason not to start. `is_read_only`: the file system is
    read-only, as that of a container may well be."""

    def __init__(self, reason: str, *, is_read_only: bool = False) -> None:
        super().__init__(reason)
        self.is_read_only = is_read_only


def _explain(error: OSError) -> CacheError:
    if error.errno == errno.ENOTDIR:
        return CacheError("the directory is none, or a symbolic link")
    return CacheError(str(error.strerror), is_read_only=error.errno == errno.EROFS)


class Cache:
    """A directory with what was compiled; "off" for none."""

    def __init__(self, directory: str) -> None:
        # With a slash behind it a symbolic link would be followed.
        self._directory = directory.rstrip("/") or "/"

    @property
    def is_off(self) -> bool:
        return self._directory == OFF

    def locate(self, name: str) -> str:
        """The path under which what has this name is kept."""
        return os.path.join(self._directory, name + _SUFFIX)

    def read(self, name: str) -> Compiled | None:
        """What was compiled under this name; None if it was not. Raises CacheError."""
        if self.is_off:
            return None
        try:
            with self._open_directory() as directory:
                found = _read_file(directory, name + _SUFFIX)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _explain(error) from error
        return _parse(found, name)

    def write(self, name: str, compiled: Compiled) -> None:
        """Keep it, and remove what there is too much. Raises CacheError; what was there is untouched then."""
        if self.is_off:
            return
        kernel = " ".join(compiler.describe_kernel())
        document = {"name": name, "kernel": kernel, **compiled.to_document()}
        body = json.dumps(document, separators=(",", ":")).encode()
        text = _MARK + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            with self._open_directory() as directory:
                # One at a time: the draft has one name, so that those of the dead do not pile up.
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _write_file(directory, name + _SUFFIX, text)
                _prune(directory)
        except BlockingIOError:
            raise CacheError("another splicer is writing there") from None
        except OSError as error:
            raise _explain(error) from error

    @contextlib.contextmanager
    def _open_directory(self) -> Iterator[int]:
        """Its descriptor. Whatever is done goes through it, so that it is done to what was looked at."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _require_trust(os.fstat(fd), "the directory")
            yield fd
        finally:
            os.close(fd)


def _require_trust(found: os.stat_result, what: str) -> None:
    """Raise CacheError if others could have written there."""
    if found.st_uid not in (0, os.geteuid()):
        raise CacheError(f"{what} belongs to another user ({found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"others can write to {what} (mode {stat.S_IMODE(found.st_mode):04o})")


def _read_file(directory: int, name: str) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheError("it is a symbolic link") from error
        raise
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CacheError("it is no file")
        _require_trust(found, "it")
        if found.st_size > _LARGEST:
            raise CacheError(f"it is too large ({found.st_size} bytes)")
        text = file.read(_LARGEST)
        # Not on a file system that is read-only, where nothing is removed either.
        with contextlib.suppress(OSError):
            os.utime(fd)
        return text


def _parse(text: bytes, name: str) -> Compiled:
    head, _, body = text.partition(b"\n")
    if not head.startswith(_MARK):
        raise CacheError("it is damaged, or of another version of splicer")
    if head != _MARK + hashlib.sha256(body).hexdigest().encode():
        raise CacheError("it is damaged: its checksum is wrong")
    try:
        document = json.loads(body)
        if document["name"] != name:
            raise CacheError(f"it was compiled for something else (kernel {document['kernel']})")
        compiled = Compiled.from_document(document)
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"it makes no sense ({error})") from error
    if not compiler.is_same_compiler(compiled.made_by):
        raise CacheError("it was compiled by another compiler")
    return compiled


def _write_file(directory: int, name: str, text: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_DRAFT, dir_fd=directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(_DRAFT, flags, 0o600, dir_fd=directory)
    try:
        with open(fd, "wb") as file:
            file.write(text)
        os.rename(_DRAFT, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(_DRAFT, dir_fd=directory)
        raise


def _prune(directory: int) -> None:
    """Leave those that were used last."""
    ages = {
        name: os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime_ns
        for name in os.listdir(directory)
        if _NAME.fullmatch(name)
    }
    for name in sorted(ages, key=lambda each: ages[each], reverse=True)[KEPT:]:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
