# SPDX-License-Identifier: Apache-2.0
"""Sessions (setsid(2)), by which the scheduler may share out CPUs, and children that end with their
parent."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_ENABLED = Path("/proc/sys/kernel/sched_autogroup_enabled")
_NICE = Path("/proc/self/autogroup")
_USUAL, _LEAST = "0", "19"
# What a shell or a service manager sends to the process it has started.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_with_parent(parent: int, number: int) -> None:
    """Get that signal when the parent, whose pid it is, has gone; end at once if it has."""
    import ctypes as ct

    ct.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def is_share_by_session() -> bool:
    """Do sessions have equal shares of the CPUs, whatever the priorities in them (sched(7), autogroup)?"""
    try:
        return _ENABLED.read_text().strip() == "1" and _NICE.exists()
    except OSError:
        return False


@contextlib.contextmanager
def least_share() -> Iterator[None]:
    """Meanwhile this session has the least share of the CPUs, if it is one that branch_off() has made: the
    share of another would stay when we are killed."""
    is_own = os.getsid(0) == os.getpid() and is_share_by_session()
    if is_own:
        _set_share(_LEAST)
    try:
        yield
    finally:
        if is_own:
            _set_share(_USUAL)


def _set_share(nice: str) -> None:
    with contextlib.suppress(OSError):
        _NICE.write_text(nice)


def branch_off() -> int | None:
    """Go on in a child that leads a session. None in the child. In the parent, once the child has ended, its
    exit code, or 128 and the number of the signal that ended it.

    Meanwhile the parent hands on what signals it is sent, and the child gets a SIGTERM if it is killed.
    Raises OSError: there is no child then.
    """
    parent = os.getpid()
    # They wait until both of us are ready for them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGTSTP))
    try:
        child = os.fork()
        if child:
            with _handing_on_to(child):
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                # It is not reaped yet: what comes now is for no other process that has its pid.
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        os.setsid()
        end_with_parent(parent, signal.SIGTERM)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handing_on_to(child: int) -> Iterator[None]:
    def send(number: int, *_: object) -> None:
        os.kill(child, number)

    def pause(*_: object) -> None:
        # The child is in no terminal's session: SIGTSTP would not stop it (signal(7)).
        send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        send(signal.SIGCONT)

    handlers: dict[int, Callable[..., None]] = {**dict.fromkeys(_FORWARDED, send), signal.SIGTSTP: pause}
    # nohup(1) means it.
    heard = {
        number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN
    }
    replaced = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
