# SPDX-License-Identifier: Apache-2.0
"""`splicer events`: what happened lately, and what happens now."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping

from splicer.errors import OK, SplicerError
from splicer.model import DAEMON_BACK, DAEMON_GONE, DAEMON_RESTARTED, EVENTS, MISSED, SCHEMA
from splicer.text import PLAIN, Palette, legend, plural, printable

from . import options
from .context import Context
from .owners import name_owner
from .query import ask_rows, number, seconds, section, text

DESCRIPTION = """\
Say what happened lately: which connections were spliced, which go back to plain
TCP and which were refused, each with whose it is and why; and what concerns all
of them: the policy, a pause, a configuration that was read again, the container
engine. The daemon keeps the latest 4 096 events of connections and 1 024 others
in memory, from its start on. What it does not keep is counted and said."""

LIMIT = 100
_MOST = 1_000_000
# While the daemon is away.
_RETRY_S = 0.5
# It says something each second.
_SILENCE_S = 10.0
_STYLES = {
    "spliced": "green",
    "draining": "yellow",
    "refused": "yellow",
    "rescued": "red",
    "lost": "red",
    MISSED: "red",
    DAEMON_GONE: "red",
    "reload_failed": "red",
    "policy_incomplete": "red",
    "docker_lost": "red",
}
_LONGEST_TYPE = max(map(len, EVENTS))


def _make_epilog() -> str:
    return f"""\
events:
{legend(EVENTS)}

examples:
  splicer events
  splicer events --follow
  splicer events --limit 0 | grep draining
  splicer events --follow --json | jq 'select(.type == "refused")'

exit codes:
  0 done, 1 failure, 2 usage, 3 not running, 130 interrupted, as --follow is"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer events`."""
    parser.description = DESCRIPTION
    parser.make_epilog = _make_epilog
    parser.add_argument(
        "--follow",
        "-f",
        action="store_true",
        help="go on until Ctrl-C, also while the daemon is restarted",
    )
    parser.add_argument(
        "--limit", metavar="N", help=f"so many of what has happened at most, 0 for all (default: {LIMIT})"
    )
    parser.add_argument("--json", action="store_true", help='one JSON object with "schema": 1 a line')
    options.add_timeout(parser)
    options.add_run_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the daemon's events."""
    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    limit = options.read_whole(arguments.limit, "--limit", 0, _MOST)
    if limit is None:
        limit = LIMIT
    patience = options.read_timeout(arguments)
    if arguments.follow:
        events = follow(settings.run_dir, limit, patience, idle=context.require_reader)
    else:
        _, events = ask_rows(settings.run_dir, "events", "events", {"limit": limit}, patience=patience)
    count = 0
    for event in events:
        count += 1
        if arguments.json:
            context.stdout.write(json.dumps({"schema": SCHEMA, **event}, separators=(",", ":")) + "\n")
        else:
            context.write([describe(event, context.palette)])
        if arguments.follow:
            context.stdout.flush()
    if not count and not arguments.json:
        context.write(["Nothing has happened yet."])
    return OK


def follow(
    run_dir: str,
    limit: int,
    patience: float,
    *,
    idle: Callable[[], None] | None = None,
    retry: float = _RETRY_S,
) -> Iterator[Mapping[str, object]]:
    """The latest events, and those that come, without end. Of a daemon that goes away it tries to hear again
    each `retry` seconds, and says so. While nothing happens `idle` is called about once a second. Raises
    SplicerError if there is no daemon at first."""
    daemon, last = "", 0
    is_gone = False
    why: SplicerError | None = None
    while True:
        place: dict[str, object] = {"after": last, "daemon": daemon} if daemon else {"limit": limit}
        try:
            head, rows = ask_rows(
                run_dir,
                "events",
                "events",
                {**place, "follow": True},
                timeout=_SILENCE_S,
                patience=patience,
                idle=idle,
            )
        except SplicerError as error:
            if not daemon:
                raise
            if not is_gone:
                is_gone = True
                yield _make_own(DAEMON_GONE, (why or error).message)
            if idle is not None:
                idle()
            time.sleep(retry)
            continue
        if daemon and text(head, "daemon") != daemon:
            yield _make_own(DAEMON_RESTARTED)
            last = 0
        elif is_gone:
            yield _make_own(DAEMON_BACK)
        daemon, is_gone, why = text(head, "daemon"), False, None
        try:
            for row in rows:
                last = number(row, "number") or last
                yield row
        except SplicerError as error:
            why = error


def _make_own(type_: str, why: str = "") -> dict[str, object]:
    """What the daemon cannot say itself."""
    return {
        "number": 0,
        "time": round(time.time(), 6),
        "type": type_,
        "reason": "",
        "count": 1,
        "local": "",
        "remote": "",
        "client": None,
        "server": None,
        "detail": {"why": why} if why else {},
    }


def describe(event: Mapping[str, object], palette: Palette = PLAIN) -> str:
    """One event in one line."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds(event, "time")))
    type_ = printable(text(event, "type"))
    shown = palette.paint(type_.ljust(_LONGEST_TYPE), _STYLES.get(type_, "cyan"))
    parts = [_describe_parties(event), text(event, "reason"), _describe_count(event)]
    parts += [f"{key}={_spell(value)}" for key, value in section(event, "detail").items()]
    said = printable("  ".join(part for part in parts if part))
    return f"{palette.paint(when, 'dim')}  {shown}  {said}".rstrip()


def _describe_parties(event: Mapping[str, object]) -> str:
    local, remote = text(event, "local"), text(event, "remote")
    names = [name_owner(section(event, end)) for end in ("client", "server")]
    who = " -> ".join(name or "?" for name in names) if any(names) else ""
    where = f"{local} -> {remote}" if local or remote else ""
    return f"{who} ({where})" if who and where else who or where


def _describe_count(event: Mapping[str, object]) -> str:
    count, type_ = number(event, "count"), text(event, "type")
    if type_ in (MISSED, "lost"):
        return plural(count, "event")
    is_of_one = section(event, "client") or text(event, "local")
    if type_ in ("spliced", "refused", "rescued") and not is_of_one:
        return plural(count, "connection")
    return ""


def _spell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_spell, value))
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}={_spell(each)}" for key, each in value.items()) + "}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
