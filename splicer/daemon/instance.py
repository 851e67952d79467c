# SPDX-License-Identifier: Apache-2.0
"""One splicer for each run directory: a flock(2) on <run-dir>/lock, which a crash releases by itself.

The file tells who holds the lock. It is removed on release; therefore whoever gets the lock looks whether the
file is still the one in the directory, and begins again if it is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from dataclasses import dataclass
from types import TracebackType

from splicer.errors import SplicerError

LOCK_NAME = "lock"
# A reader of the lock takes it, shared, for some microseconds: what is refused now may be free a moment
# later.
_ATTEMPTS = 6
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `pid` is 0 and `cgroup` empty when the holder has not written it yet."""

    pid: int
    cgroup: str
    run_dir: str
    purpose: str

    def describe(self) -> str:
        """The holder in words, for messages."""
        pid = str(self.pid) if self.pid else "unknown"
        cgroup = f"cgroup {self.cgroup}, " if self.cgroup else ""
        return f"pid {pid}, {cgroup}run directory {self.run_dir}"


class AlreadyRunningError(SplicerError):
    """Another process holds the lock of the run directory."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        if holder.purpose == "unload":
            message = f"splicer unload is at work ({holder.describe()})"
            hint = "wait until it has finished, then try again"
        else:
            message = f"already running ({holder.describe()})"
            stop = f"stop it with: kill {holder.pid}; " if holder.pid else ""
            hint = f"{stop}a second one beside it needs a --run-dir and a --pin-dir of its own"
        super().__init__(message, hint=hint)


class Lock:
    """A held lock. A context manager; leaving it releases.

    The lock belongs to the open file: a child made by fork() without exec() shares it and keeps it held.
    """

    def __init__(self, descriptor: int, run_dir: str, created: bool) -> None:
        self._descriptor: int | None = descriptor
        self._created = created
        self.run_dir = run_dir

    def release(self) -> None:
        """Remove the lock file, and the run directory if `acquire` made it and it is empty. Idempotent."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self.run_dir, LOCK_NAME))
        os.close(self._descriptor)
        self._descriptor = None
        if self._created:
            with contextlib.suppress(OSError):
                os.rmdir(self.run_dir)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire(run_dir: str, cgroup: str, *, purpose: str = "run") -> Lock:
    """Take the lock of `run_dir`, making the directory (mode 0700) if need be.

    `cgroup` and `purpose` ("run" or "unload") are left in the file for whoever finds the lock taken.
    Raises AlreadyRunningError when another process holds it, SplicerError when the directory cannot be used.
    """
    path = os.path.join(run_dir, LOCK_NAME)
    created = False
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        created = prepare(run_dir) or created
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the previous holder removed its run directory just now
        except OSError as error:
            raise SplicerError(f"cannot open the lock file ({path}: {error.strerror})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(descriptor, path):
                record = {"pid": os.getpid(), "cgroup": cgroup, "purpose": purpose}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
                return Lock(descriptor, run_dir, created)
        except BlockingIOError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise SplicerError(f"cannot take the lock ({path}: {error.strerror})") from error
        os.close(descriptor)
    raise AlreadyRunningError(_read(path, run_dir))


def find_holder(run_dir: str) -> Holder | None:
    """Who holds the lock of `run_dir`; None when nobody does or this user may not look."""
    path = os.path.join(run_dir, LOCK_NAME)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path, run_dir)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def prepare(run_dir: str) -> bool:
    """Make `run_dir` with mode 0700 if it is missing, and refuse one that others can write to. True: made it.

    Who can write to the directory could put a socket or lock of their own in place of ours.
    """
    made = False
    try:
        os.makedirs(os.path.dirname(os.path.abspath(run_dir)), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(run_dir, 0o700)
            made = True
        status = os.stat(run_dir)
    except OSError as error:
        raise SplicerError(
            f"cannot make the run directory ({run_dir}: {error.strerror})",
            hint="choose another with --run-dir DIR",
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise SplicerError(
            f"the run directory is a file ({run_dir})", hint="choose another with --run-dir DIR"
        )
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SplicerError(
            f"others can write to the run directory ({run_dir}: owner {status.st_uid}, "
            f"mode {stat.S_IMODE(status.st_mode):04o})",
            hint="choose a directory of its own, such as --run-dir /run/splicer; it is made with mode 0700",
        )
    return made


def _is_current(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _read(path: str, run_dir: str) -> Holder:
    record: object = None
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as stream:
        record = json.loads(stream.read(65536))
    if not isinstance(record, dict):
        record = {}
    pid = record.get("pid")
    return Holder(
        pid=pid if isinstance(pid, int) else 0,
        cgroup=str(record.get("cgroup") or ""),
        run_dir=run_dir,
        purpose=str(record.get("purpose") or "run"),
    )
