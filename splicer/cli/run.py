# SPDX-License-Identifier: Apache-2.0
"""`splicer run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse

from splicer.daemon import instance
from splicer.doctor import prerequisites
from splicer.errors import OK
from splicer.host import cgroups
from splicer.policy import config
from splicer.text import legend

from . import options
from .context import Context

DESCRIPTION = """\
Attach to a cgroup and splice the TCP connections of its processes whose both
ends are on this host. Runs in the foreground. SIGTERM and SIGINT take every
connection back to plain TCP, detach and exit; a second signal does not wait
for the connections. One whose reader takes nothing within --stop-timeout
keeps its data and stays as it is. SIGHUP reads the configuration file again.
After a crash connections stay spliced, and the next run takes over.
Kernels without what splicer needs are found by trying, and end with exit
code 4; docs/kernels.md says which they are."""


def _make_epilog() -> str:
    modes = {
        "adaptive": "splice connections that are busy and whose reading style is safe (default)",
        "eager": "splice every local connection at once; for services you vouch for",
    }
    default = {
        "on": "everything local is spliced, but for what is switched off (default)",
        "off": "only what is switched on is spliced: by label, by [[policy]], by splicer set",
    }
    blocking = {
        "refuse": "connections with a blocking reader stay plain TCP (default)",
        "allow": "splice them too; read KNOWN_ISSUES.md first",
    }
    tcp_inq = {
        "allow": "connections that ask for it are spliced, and get no answer then (default)",
        "refuse": "they stay plain TCP; for programs that cannot do without the answer",
    }
    fionread = {
        "auto": "where the kernel's own answer is short, splicer puts it right if it can (default)",
        "off": "never; kernels of class A are refused then",
    }
    docker = {
        "auto": "the engine of this host, looked for until it is there (default)",
        "off": "containers are not looked at; rules by cgroup, address and port still apply",
        "URL": "where it listens, such as unix:///run/podman/podman.sock",
    }
    metrics = {
        "off": "nothing is served (default)",
        "127.0.0.1:9469": "a loopback address and a port; no other address is accepted",
        "/PATH": "a Unix socket",
    }
    labels = {
        "splicer.enable": "true or false",
        "splicer.mode": "adaptive, eager or off; default: --mode; implies enable=true",
        "splicer.ports": '"80,443,8000-8010": only connections to these server ports; the rest is off, '
        "or, with mode off, as if there were no label; implies enable=true",
    }
    selectors = {
        "container, image": "name of the container, of its image; with * ? [...]",
        "service, project": "of docker compose; with * ? [...]",
        "ports": "the server's own: a port, a range, or a list; beside the others, or alone",
        "cgroup": "path below the cgroup v2 root, with all that is below it; beside ports only",
        "cidr": "address of that end, IPv4 or IPv6; beside ports only",
    }
    return f"""\
modes:
{legend(modes)}

default:
{legend(default)}

blocking readers:
{legend(blocking)}

TCP_INQ, the question how much is left to read, which gRPC always asks:
{legend(tcp_inq)}

FIONREAD, the question how many bytes wait, which nginx asks (docs/kernels.md):
{legend(fionread)}

containers (--docker; Docker, or Podman's compatible socket):
{legend(docker)}

metrics for Prometheus (--metrics; docs/metrics.md):
{legend(metrics)}

labels of containers, read strictly; a mistake leaves the container alone:
{legend(labels)}

configuration file (TOML; keys are the long options with _ for -):
  mode = "adaptive"
  default = "off"
  [[policy]]                   # as many as you like; the first that matches and
  service = "web"              # says something about a value decides it
  ports = [80, "8000-8010"]    # the server's own
  mode = "eager"
  blocking = "allow"
  tcp_inq = "refuse"

selectors of a [[policy]] table:
{legend(selectors)}

Overrides (splicer set) come before labels, labels before [[policy]] tables. A
connection is off if either end is off; else the server's end decides, else the
client's, else --mode and --default. splicer policy shows all of it.

SIGHUP reads the file again: mode, default, blocking, tcp_inq, lease and tables
apply at once, to living connections too; the rest needs a restart, and the log
says so.
A mistake in the file leaves everything as it was.

Each option has a variable: SPLICER_MODE, SPLICER_MAX_CONNECTIONS, and so on.
The command line beats the environment, which beats the file, which beats the
default.

examples:
  splicer run --cgroup /sys/fs/cgroup
  splicer run --cgroup /sys/fs/cgroup/system.slice --config /etc/splicer.toml
  splicer run --default off     # with label splicer.enable=true on containers
  splicer run --no-census       # nothing that is connected already
  SPLICER_MODE=eager splicer run --config splicer.toml --print-config

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
    parser.add_argument("--mode", metavar="MODE", help="adaptive or eager (default: adaptive)")
    parser.add_argument(
        "--default",
        metavar="WHICH",
        help="on: all that is local; off: only what is switched on (default: on)",
    )
    parser.add_argument(
        "--blocking", metavar="POLICY", help="blocking readers: refuse or allow (default: refuse)"
    )
    parser.add_argument(
        "--tcp-inq",
        metavar="POLICY",
        help="connections that ask for TCP_INQ: allow or refuse (default: allow)",
    )
    parser.add_argument(
        "--fionread",
        metavar="WHO",
        help="answer FIONREAD where the kernel's answer is short: auto or off (default: auto)",
    )
    parser.add_argument(
        "--docker", metavar="WHERE", help="where the container engine is: auto, off or a URL (default: auto)"
    )
    parser.add_argument(
        "--metrics",
        metavar="WHERE",
        help="serve /metrics for Prometheus, /healthz and /readyz: off, a loopback address with a port, or a "
        "Unix socket (default: off)",
    )
    parser.add_argument(
        "--no-census",
        dest="census",
        action="store_const",
        const=False,
        help="leave connections alone that were there before splicer (default: they are looked for)",
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
    tuning.add_argument(
        "--lease",
        metavar="SECONDS",
        help="a busy spliced connection sends a packet each way through TCP once in so long, up to 86400, for"
        " conntrack and IPVS to see; 0: never (default: 240)",
    )
    options.add_stop_timeout(tuning)
    options.add_run_dir(tuning)
    options.add_pin_dir(tuning)
    tuning.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where the compiled programs are kept for the next start; off: nowhere "
        "(default: /var/cache/splicer)",
    )
    tuning.add_argument(
        "--log-format", metavar="FORMAT", help="auto, console or json (default: auto, console on a terminal)"
    )


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Check the host, cheapest and most likely first, then hand over to the daemon. Whether bcc is there is
    looked at where it is needed: when nothing was compiled earlier."""
    # What is wrong with the environment is for the log, where there is one.
    read = options.resolve_settings if arguments.print_config else _read_quietly
    resolved = read(arguments, context)
    settings = resolved.settings
    if arguments.print_config:
        context.stdout.write(config.render(resolved))
        return OK
    prerequisites.require_privileges("run")
    cgroup = cgroups.find(settings.cgroup)
    with instance.acquire(settings.run_dir, cgroup.path):
        from splicer import logs
        from splicer.daemon.loop import Daemon

        log = logs.configure(
            settings.log_format,
            debug=settings.debug,
            stream=context.stderr,
            colour=context.error_palette.enabled,
        )
        for unknown in config.find_unknown_variables(context.environ):
            log.warning("unknown_variable", variable=unknown.name, meant=unknown.meant or None)
        if cgroup.substituted:
            log.info("cgroup_substituted", requested=cgroup.requested, taken=cgroup.path)
        reread = lambda: _read_quietly(arguments, context).settings  # noqa: E731
        require = prerequisites.require_bcc
        return Daemon(settings, cgroup, log, reread=reread, require_compiler=require).run()


def _read_quietly(arguments: argparse.Namespace, context: Context) -> config.Resolved:
    return options.read_settings(arguments, context.environ)
