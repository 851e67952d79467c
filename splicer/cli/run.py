# SPDX-License-Identifier: Apache-2.0
"""`splicer run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse

from splicer import cgroups, config, instance
from splicer.errors import OK
from splicer.text import legend

from . import options, prerequisites
from .context import Context

SUMMARY = "splice local connections until told to stop"

DESCRIPTION = """\
Attach to a cgroup and splice the TCP connections of its processes whose both
ends are on this host. Runs in the foreground. SIGTERM and SIGINT take every
connection back to plain TCP, detach and exit; a second signal does not wait
for the connections. After a crash connections stay spliced, and the next run
takes over."""


def _make_epilog() -> str:
    modes = {
        "adaptive": "splice connections that are busy and whose reading style is safe (default)",
        "eager": "splice every local connection at once; for services you vouch for",
        "off": "splice nothing; with a configuration file, only the services named there",
    }
    blocking = {
        "refuse": "connections with a blocking reader stay plain TCP (default)",
        "allow": "splice them too; read KNOWN_ISSUES.md first",
    }
    return f"""\
modes:
{legend(modes)}

blocking readers:
{legend(blocking)}

configuration file (TOML; keys are the long options with _ for -):
  mode = "adaptive"
  max_connections = 65536
  [[service]]
  port = 8080                  # the server's port
  mode = "eager"
  blocking = "allow"

Each option has a variable: SPLICER_MODE, SPLICER_MAX_CONNECTIONS, and so on.
The command line beats the environment, which beats the file, which beats the
default.

examples:
  splicer run --cgroup /sys/fs/cgroup
  splicer run --cgroup /sys/fs/cgroup/system.slice --config /etc/splicer.toml
  SPLICER_MODE=off splicer run --config services.toml --print-config

exit codes:
  0 stopped by a signal, 1 failure, 2 usage or configuration, 4 this host is
  not supported"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer run`."""
    parser.description = DESCRIPTION
    parser.make_epilog = _make_epilog
    parser.add_argument(
        "--cgroup",
        metavar="PATH",
        help="a cgroup v2 directory; /sys/fs/cgroup finds the v2 hierarchy on hosts that have v1 there "
        "(default: /sys/fs/cgroup)",
    )
    parser.add_argument("--mode", metavar="MODE", help="adaptive, eager or off (default: adaptive)")
    parser.add_argument(
        "--blocking", metavar="POLICY", help="blocking readers: refuse or allow (default: refuse)"
    )
    options.add_config(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective settings as TOML and exit"
    )
    parser.add_argument(
        "--ready-file",
        metavar="FILE",
        help="write the pid to FILE once attached and serving; removed on exit",
    )
    tuning = parser.add_argument_group("limits and places")
    tuning.add_argument(
        "--max-connections",
        metavar="N",
        help="connections followed at once, 16 to 1048576; further ones stay plain TCP (default: 65536)",
    )
    tuning.add_argument(
        "--hot-reads",
        metavar="N",
        help="reads both ends must have done before adaptive splices, 1 to 65535 (default: 16)",
    )
    options.add_stop_timeout(tuning)
    options.add_run_dir(tuning)
    options.add_pin_dir(tuning)
    tuning.add_argument(
        "--log-format", metavar="FORMAT", help="auto, console or json (default: auto, console on a terminal)"
    )


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Check the host, cheapest and most likely first, then hand over to the daemon."""
    resolved = options.resolve_settings(arguments, context)
    settings = resolved.settings
    if arguments.print_config:
        context.stdout.write(config.render(resolved))
        return OK
    prerequisites.require_privileges("run")
    cgroup = cgroups.find(settings.cgroup)
    prerequisites.require_bcc()
    with instance.acquire(settings.run_dir, cgroup.path):
        from splicer import logs
        from splicer.daemon import Daemon

        log = logs.configure(
            settings.log_format,
            debug=settings.debug,
            stream=context.stderr,
            colour=context.error_palette.enabled,
        )
        if cgroup.substituted:
            log.info("cgroup_substituted", requested=cgroup.requested, taken=cgroup.path)
        return Daemon(settings, cgroup, log).run()
