# SPDX-License-Identifier: Apache-2.0
"""`splicer unload`: take out what a daemon that is gone left behind."""

from __future__ import annotations

import argparse
import contextlib

from splicer.daemon import control, instance
from splicer.doctor import prerequisites
from splicer.errors import OK, SplicerError

from . import options
from .context import Context

DESCRIPTION = """\
Take every connection that a dead daemon left spliced back to plain TCP, then
detach and remove its programs and maps. Says what it removed. A connection
whose reader takes nothing within --stop-timeout keeps its data and stays as
it is. Succeeds, and does nothing, when there is nothing; refuses while a
daemon is alive."""

EPILOG = """\
examples:
  splicer unload
  splicer unload --pin-dir /sys/fs/bpf/other --run-dir /run/other

exit codes:
  0 removed, or nothing to remove; 1 failure, or a daemon is alive; 2 usage"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer unload`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_run_dir(parser)
    options.add_pin_dir(parser)
    options.add_stop_timeout(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Unload under the instance lock, so that no daemon starts meanwhile."""
    settings = options.resolve_settings(
        arguments, context, only=("run_dir", "pin_dir", "stop_timeout")
    ).settings
    prerequisites.require_privileges("unload")
    from splicer.kernel.generation import unload

    with _acquire(settings.run_dir):
        removed = list(unload(settings.pin_dir, settings.run_dir, settings.stop_timeout))
        path = control.socket_path(settings.run_dir)
        if control.remove_stale(path):
            removed.append(f"removed control socket {path}")
    context.write(removed or ["Nothing to unload."])
    return OK


def _acquire(run_dir: str) -> contextlib.AbstractContextManager[object]:
    try:
        return instance.acquire(run_dir, "", purpose="unload")
    except instance.AlreadyRunningError as error:
        if error.holder.purpose == "unload":
            raise
        stop = f"kill {error.holder.pid}" if error.holder.pid else "find it with: ps -C splicer"
        raise SplicerError(
            f"a daemon is alive and in charge ({error.holder.describe()})",
            hint=f"stop it, and it unloads everything itself: {stop}",
        ) from error
