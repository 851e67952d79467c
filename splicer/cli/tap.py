# SPDX-License-Identifier: Apache-2.0
"""`splicer tap`: the bytes that tcpdump does not see."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from splicer import __version__
from splicer.doctor import prerequisites
from splicer.errors import NOT_RUNNING, OK, USAGE, SplicerError
from splicer.host import sessions
from splicer.host.sparing import Sparing
from splicer.text import printable

from . import flows, options
from .context import Context
from .owners import FILTERS
from .query import ask, section, text

if TYPE_CHECKING:
    from splicer.kernel.tap import Tap

    from .capture import Capture, Row, Sink


DESCRIPTION = """\
Show the bytes of spliced connections as they are redirected, on the terminal or
as packets in a file that Wireshark and tshark read (-w). Nobody pays for it who
does not tap. A connection that is tapped never waits: what finds no room in the
buffer is missed, counted and said. Bytes that go through TCP are not shown;
tcpdump sees those. One can tap at a time, and Ctrl-C ends it. Whatever ends the
command, nothing of it stays in the kernel."""

EPILOG = """\
packets (-w):
  Each message is a packet, a larger one several of 16 KiB. Addresses are those
  that the client sees; each network namespace of clients is an interface.
  Sequence numbers go on from TCP's own, so what went through TCP or was missed
  is a gap of its size, and a comment of the packet behind it says which. TCP
  checksums are 0. A capture of tcpdump has other numbers once bytes were
  redirected: the two do not merge into one stream.

examples:
  splicer tap                              # everything, as text
  splicer tap --port 6379 --hex
  splicer tap --container web-1 -w web.pcapng
  splicer tap --port 80 -w - | tshark -r - -Y http
  splicer tap --address 10.0.0.0/24 --count 100

exit codes:
  0 done, also by Ctrl-C; 1 failure, or somebody else taps; 2 usage;
  3 not running, or stopped meanwhile; 4 host not supported"""

SNAPLEN = 262144
_BUFFER_KIB = 16384
_HEADERS = 40
_BATCH = 64
"""So many records at a time are taken: some tenths of a millisecond."""
_NAP_S = 0.01
_CHECK_S = 1.0
_SWEEP = 2048
"""So many connections are looked at for their end in each second's check, in turn."""
_DESCRIBED = 256
"""So many connections the daemon is asked about at once."""
_UNASKED = 64
"""More new ones than that at once go without names, where no filter wants to know them."""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer tap`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--port",
        action="append",
        metavar="PORT",
        help="only connections with this port at either end, DNATed or not; may be repeated",
    )
    for name, what in zip(FILTERS, ("container", "compose service", "process"), strict=True):
        parser.add_argument(
            f"--{name}",
            action="append",
            metavar="NAME",
            help=f"only connections with this {what} at either end, a name or a pattern such as 'web-*'; "
            "may be repeated",
        )
    parser.add_argument(
        "--address",
        action="append",
        metavar="ADDRESS",
        help="only connections with this address at either end, or one of this network, as 10.0.0.0/24; "
        "may be repeated",
    )
    parser.add_argument("-w", "--write", metavar="FILE", help="write packets to a file (pcapng); - is stdout")
    parser.add_argument("--hex", action="store_true", help="show bytes as hex and text")
    parser.add_argument(
        "--snaplen",
        metavar="BYTES",
        help=f"so many bytes of a packet are kept, its {_HEADERS} of headers among them (default: {SNAPLEN})",
    )
    parser.add_argument("--count", metavar="N", help="end after so many messages")
    parser.add_argument(
        "--buffer",
        metavar="KIB",
        help=f"room for what was not written yet, rounded up to a power of two (default: {_BUFFER_KIB})",
    )
    options.add_run_dir(parser)
    options.add_pin_dir(parser)
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where compiled programs are kept (default: /var/cache/splicer)"
    )
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tap until a signal, --count, or the end of splicer."""
    settings = options.resolve_settings(arguments, context, only=("run_dir", "pin_dir", "cache_dir")).settings
    ports = frozenset(flows.read_port(given) for given in arguments.port or ())
    names = {name: given for name in FILTERS if (given := getattr(arguments, name))}
    networks = [_read_network(given) for given in arguments.address or ()]
    snaplen = options.read_whole(arguments.snaplen, "--snaplen", _HEADERS, SNAPLEN) or SNAPLEN
    count = options.read_whole(arguments.count, "--count", 1, 1 << 62) or 0
    buffer = (options.read_whole(arguments.buffer, "--buffer", 64, 1 << 20) or _BUFFER_KIB) * 1024
    if arguments.hex and arguments.write:
        raise SplicerError("--hex is for the terminal, and -w for a file", hint="choose one", exit_code=USAGE)
    prerequisites.require_privileges("tap")
    from splicer.kernel.layout import TAP_PORTS
    from splicer.kernel.tap import Tap, TapPlan

    # A few ports are chosen by the program itself, so nothing can come too late.
    is_filtered = bool(names or networks or len(ports) > TAP_PORTS)

    def is_wanted(row: Row) -> bool:
        return bool(flows.select([row], (), ports, names)) and _is_in(row, networks)

    def describe(wanted: Sequence[int]) -> Mapping[int, Row]:
        if not is_filtered and len(wanted) > _UNASKED:
            return {}
        return _describe(settings.run_dir, wanted)

    # Whoever taps without a daemon would know nothing of filters.
    ask(settings.run_dir, "describe", {"connections": []})
    code = _branch_off()
    if code is not None:
        return code
    plan = TapPlan(
        settings.pin_dir,
        1 << (buffer - 1).bit_length(),
        snaplen - _HEADERS,
        ports,
        is_filtered,
        settings.cache_dir,
    )
    with contextlib.ExitStack() as opened:
        sink = _open_sink(arguments.write, snaplen, arguments.hex, context, opened)
        tap = opened.enter_context(contextlib.closing(Tap(plan, _Teller(context), prerequisites.require_bcc)))
        from .capture import Capture, summarise

        capture = Capture(sink, describe, is_wanted if is_filtered else None, tap.choose)
        context.stderr.write("tapping; Ctrl-C ends it\n")
        context.stderr.flush()
        is_of_use = _run(tap, capture, count)
    for line in summarise(capture.totals):
        context.stderr.write(line + "\n")
    if not is_of_use:
        raise SplicerError(
            "splicer was stopped, or restarted with other programs: that was all",
            hint="if it runs again, tap again",
            exit_code=NOT_RUNNING,
        )
    return OK


def _is_to_give_way() -> bool:
    """Whoever has said another priority is obeyed."""
    return os.sched_getscheduler(0) == os.SCHED_OTHER and os.getpriority(os.PRIO_PROCESS, 0) == 0


def _branch_off() -> int | None:
    """Whoever gives way does so among those of one session only, where sessions share out the CPUs. In the
    parent, the exit code of the child that taps."""
    if _is_to_give_way() and sessions.is_share_by_session():
        with contextlib.suppress(OSError):  # no process more: then it gives way less
            return sessions.branch_off()
    return None


@contextlib.contextmanager
def _giving_way() -> Iterator[Callable[[], None]]:
    """What is tapped comes first, where there are fewer CPUs than work (SCHED_IDLE, sched(7)). What to call
    after each portion of work."""
    if not _is_to_give_way():
        yield lambda: None
        return
    before = os.sched_param(0)
    os.sched_setscheduler(0, os.SCHED_IDLE, before)
    try:
        with sessions.least_share():
            yield Sparing().rest
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, before)


def _run(tap: Tap, capture: Capture, count: int) -> bool:
    """Tap to the end. False if splicer ended first."""
    taken = 0

    def take() -> int:
        nonlocal taken
        records = tap.ring.read(min(_BATCH, count - taken) if count else _BATCH)
        taken += capture.take(records)
        tap.ring.release()
        return len(records)

    def is_enough() -> bool:
        return bool(count) and taken >= count

    with _Ending() as ending:
        is_of_use = True
        checked, sweep = time.monotonic(), _Sweep(tap, capture)
        with _giving_way() as rest:
            while is_of_use and not ending.is_due and not is_enough():
                if take() < _BATCH:
                    time.sleep(_NAP_S)
                rest()
                if time.monotonic() - checked > _CHECK_S:
                    checked = time.monotonic()
                    is_of_use = tap.is_of_use
                    sweep.go_on()
        tap.stop()
        # A program that had begun may still be writing.
        time.sleep(_NAP_S)
        while not is_enough() and take():
            pass
        capture.finish(tap.read_missed, tap.read_unknown())
    return is_of_use


class _Sweep:
    """Finds connections that have ended, some at a time. What is known of them goes one turn later, when all
    of their records have been read."""

    def __init__(self, tap: Tap, capture: Capture) -> None:
        self._tap = tap
        self._capture = capture
        self._turn = 0
        self._closed: list[int] = []

    def go_on(self) -> None:
        for name in self._closed:
            self._capture.close_flow(name, self._tap.read_missed(name))
            self._tap.forget(name)
        names = self._capture.names
        start = self._turn if self._turn < len(names) else 0
        self._turn = start + _SWEEP
        self._closed = [name for name in names[start : self._turn] if self._tap.is_closed(name)]


class _Ending:
    """Notes SIGINT, SIGTERM and SIGHUP, so that what was captured is written to its end."""

    def __init__(self) -> None:
        self.is_due = False

    def __enter__(self) -> _Ending:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # nohup(1) means it.
        heard = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def _note(self, *_: object) -> None:
        self.is_due = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Teller:
    """A log of which somebody at a terminal wants to see one thing: why it takes long."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def info(self, event: str, /, **_: object) -> None:
        if event == "compiling":
            self._context.stderr.write("compiling; this takes some seconds\n")

    def debug(self, event: str, /, **_: object) -> None:
        pass

    warning = error = exception = debug


def _open_sink(
    path: str | None, snaplen: int, hexadecimal: bool, context: Context, opened: contextlib.ExitStack
) -> Sink:
    from .capture import Packets, Text

    if path is None:
        return Text(context.stdout, hexadecimal=hexadecimal)
    if path == "-" and context.stdout.isatty():
        raise SplicerError("packets are nothing for a terminal", hint="give a file to -w", exit_code=USAGE)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.dup(1) if path == "-" else os.open(path, flags, 0o600)
    except OSError as error:
        raise SplicerError(f"cannot write {printable(path)}: {error.strerror}") from error
    opened.callback(os.close, fd)
    kernel = os.uname()
    return Packets(
        fd,
        snaplen=snaplen,
        version=__version__,
        system=f"{kernel.sysname} {kernel.release} {kernel.machine}",
    )


def _describe(run_dir: str, names: Sequence[int]) -> Mapping[int, Row]:
    """What the daemon knows of these connections; nothing while it does not answer."""
    found: dict[int, Row] = {}
    with contextlib.suppress(SplicerError):
        for start in range(0, len(names), _DESCRIBED):
            part = names[start : start + _DESCRIBED]
            answer = ask(run_dir, "describe", {"connections": part}, timeout=options.QUICK_S)
            rows = section(answer, "flows")
            found |= {name: section(rows, str(name)) for name in part if str(name) in rows}
    return found


def _is_in(row: Row, networks: Collection[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    return not networks or any(address in network for address in _list_addresses(row) for network in networks)


def _list_addresses(row: Row) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    for key in ("local", "remote", "peer"):
        with contextlib.suppress(ValueError):
            yield ipaddress.ip_address(text(row, key).rpartition(":")[0].strip("[]"))


def _read_network(given: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(given, strict=False)
    except ValueError:
        raise SplicerError(
            f"bad value for --address: {printable(given)}",
            hint="accepted: an IPv4 or IPv6 address, or a network such as 10.0.0.0/24",
            exit_code=USAGE,
        ) from None
