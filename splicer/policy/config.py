# SPDX-License-Identifier: Apache-2.0
"""Settings: command line over SPLICER_* environment over the configuration file (TOML) over defaults.

Each value remembers where it came from, so that an error and `--print-config` can name the place.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from splicer.errors import USAGE, SplicerError
from splicer.metrics import address
from splicer.policy.rules import BLOCKING as BLOCKING
from splicer.policy.rules import CONTAINER_MODES as CONTAINER_MODES
from splicer.policy.rules import TCP_INQ as TCP_INQ
from splicer.policy.rules import Rule as Rule
from splicer.policy.rules import read_rules, render_rule
from splicer.policy.values import (
    PATH,
    SWITCH,
    ValueType,
    check_value,
    choice,
    integer,
    is_text,
    refuse,
    refuse_key,
    render_value,
    seconds,
)

Mode = Literal["adaptive", "eager"]
Default = Literal["on", "off"]
Blocking = Literal["refuse", "allow"]
TcpInq = Literal["allow", "refuse"]
Fionread = Literal["auto", "off"]
LogFormat = Literal["auto", "console", "json"]

MODES: tuple[str, ...] = get_args(Mode)
DEFAULTS: tuple[str, ...] = get_args(Default)
FIONREAD: tuple[str, ...] = get_args(Fionread)
LOG_FORMATS: tuple[str, ...] = get_args(LogFormat)

_PREFIX = "SPLICER_"
CONFIG_VARIABLE = f"{_PREFIX}CONFIG"
DEFAULT_SOURCE = "default"


@dataclass(frozen=True)
class Settings:
    """Everything `splicer run` can be told. `lease` and `stop_timeout` are in seconds."""

    cgroup: str = "/sys/fs/cgroup"
    mode: Mode = "adaptive"
    default: Default = "on"
    blocking: Blocking = "refuse"
    tcp_inq: TcpInq = "allow"
    policies: tuple[Rule, ...] = ()
    fionread: Fionread = "auto"
    docker: str = "auto"
    metrics: str = "off"
    ready_file: str | None = None
    max_connections: int = 65536
    run_dir: str = "/run/splicer"
    pin_dir: str = "/sys/fs/bpf/splicer"
    cache_dir: str = "/var/cache/splicer"
    hot_reads: int = 16
    census: bool = True
    lease: float = 240.0
    stop_timeout: float = 5.0
    debug: bool = False
    log_format: LogFormat = "auto"


@dataclass(frozen=True)
class Resolved:
    """Settings, and for each name where its value came from: an option, a variable, a file or `default`."""

    settings: Settings
    sources: Mapping[str, str]


def _is_engine(value: object) -> bool:
    return (
        isinstance(value, str)
        and value.isprintable()
        and (
            value in ("auto", "off")
            or re.fullmatch(r"unix:///[^/].*|(?:tcp|https?)://[^/].*", value) is not None
        )
    )


VALUE_TYPES: Mapping[str, ValueType] = {
    "cgroup": PATH,
    "mode": ValueType(
        "adaptive or eager; for splicing nothing unasked there is --default off", lambda value: value in MODES
    ),
    "default": choice(DEFAULTS),
    "blocking": choice(BLOCKING),
    "tcp_inq": choice(TCP_INQ),
    "fionread": choice(FIONREAD),
    "docker": ValueType(
        "auto, off, or where the engine listens, such as unix:///run/podman/podman.sock", _is_engine
    ),
    "metrics": ValueType(address.ACCEPTED, address.is_accepted),
    "ready_file": PATH,
    "max_connections": integer(16, 1_048_576),
    "run_dir": PATH,
    "pin_dir": PATH,
    "cache_dir": ValueType("a path, or off", is_text),
    "hot_reads": integer(1, 65535),
    "census": SWITCH,
    "lease": seconds(0, 86400),
    "stop_timeout": seconds(0, 3600),
    "debug": SWITCH,
    "log_format": choice(LOG_FORMATS),
}
# Switches whose option switches them off.
_ON_BY_DEFAULT = ("census",)
# What a daemon takes over while it runs; the rest is for the next start.
RELOADABLE = ("mode", "default", "blocking", "tcp_inq", "lease", "policies")


def option_of(name: str) -> str:
    """The command-line option of a setting: --max-connections for max_connections."""
    return ("--no-" if name in _ON_BY_DEFAULT else "--") + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting: SPLICER_MAX_CONNECTIONS for max_connections."""
    return _PREFIX + name.upper()


def resolve(
    options: Mapping[str, object],
    environ: Mapping[str, str],
    *,
    config_file: str | None = None,
    only: Collection[str] | None = None,
) -> Resolved:
    """Merge all sources into settings.

    `options` holds the command line's values by setting name; None means not given. An empty variable counts
    as unset. `only` limits which settings are looked at, so that a mistake in one that a command has no use
    for cannot stop it. Unknown SPLICER_* variables are no mistake here: see find_unknown_variables(). Raises
    SplicerError with exit code 2 that names source, key, value and what is accepted."""
    names = [name for name in VALUE_TYPES if only is None or name in only]
    values: dict[str, Any] = {}
    sources = dict.fromkeys((entry.name for entry in dataclasses.fields(Settings)), DEFAULT_SOURCE)
    file = config_file or environ.get(CONFIG_VARIABLE) or None
    if file is not None:
        from_file = load_file(file)
        values = {name: value for name, value in from_file.items() if name in names or name == "policies"}
        sources |= dict.fromkeys(values, file)
    for name in names:
        texts = (
            (options.get(name), option_of(name)),
            (environ.get(variable_of(name)) or None, variable_of(name)),
        )
        for given, source in texts:
            if given is not None:
                values[name] = _read(VALUE_TYPES[name], given, source)
                sources[name] = source
                break
    for name in {"lease", "stop_timeout"} & values.keys():
        values[name] = float(values[name])
    return Resolved(Settings(**values), sources)


@dataclass(frozen=True)
class UnknownVariable:
    """A variable that nobody reads, and the one that may have been meant, empty if none is like it."""

    name: str
    meant: str

    def describe(self) -> str:
        """In one line."""
        guess = f"; did you mean {self.meant}?" if self.meant else ""
        return f"unknown variable {self.name} is ignored{guess}"


# What Kubernetes, and Docker's links, put into every container where a service is called "splicer".
_SERVICE_VARIABLE = re.compile(r"SPLICER_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_.*)?|NAME|ENV_.*)")


def find_unknown_variables(environ: Mapping[str, str]) -> list[UnknownVariable]:
    """The SPLICER_* variables that are set and that no setting has, by name."""
    # All begin alike: what follows has to be like one, too.
    known = {name.removeprefix(_PREFIX): name for name in (CONFIG_VARIABLE, *map(variable_of, VALUE_TYPES))}
    found = []
    for name in sorted(environ):
        tail = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and tail not in known and not _SERVICE_VARIABLE.fullmatch(name):
            near = difflib.get_close_matches(tail, known, n=1)
            printed = name if name.isprintable() else ascii(name)
            found.append(UnknownVariable(printed, known[near[0]] if near else ""))
    return found


def _read(kind: ValueType, given: object, source: str) -> object:
    try:
        value = kind.read(given) if isinstance(given, str) else given
    except ValueError:
        raise refuse(source, given, kind.accepted) from None
    return check_value(kind, value, source, given)


def load_file(file: str) -> dict[str, object]:
    """Read and check a configuration file. Returns setting names with values, `policies` as a tuple of rules.

    Raises SplicerError with exit code 2 when it cannot be read, is no TOML, or holds an unknown key or a bad
    value.
    """
    try:
        with open(file, "rb") as stream:
            document = tomllib.load(stream)
    except OSError as error:
        raise SplicerError(
            f"cannot read the configuration file ({file}: {error.strerror})",
            hint=f"check the path given with --config or {CONFIG_VARIABLE}",
            exit_code=USAGE,
        ) from error
    except ValueError as error:
        # tomllib's error names line and column; text that is not UTF-8 ends up here as well.
        raise SplicerError(
            f"the configuration file is not valid TOML ({file}: {error})",
            hint="print a valid one with: splicer run --print-config",
            exit_code=USAGE,
        ) from error
    values: dict[str, object] = {}
    for key, value in document.items():
        if key == "policy":
            values["policies"] = read_rules(value, file)
        elif key in VALUE_TYPES:
            values[key] = check_value(VALUE_TYPES[key], value, f"{key} in {file}", value)
        else:
            raise refuse_key(key, f"{file}", [*VALUE_TYPES, "[[policy]]"])
    return values


@dataclass(frozen=True)
class ReloadOutcome:
    """What comes of reading the configuration again: settings to go on with, and names of what changed."""

    settings: Settings
    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]


def reload(current: Settings, read: Settings) -> ReloadOutcome:
    """Take over from `read` what can change while a daemon runs; name what cannot."""
    changed = [
        entry.name
        for entry in dataclasses.fields(Settings)
        if getattr(current, entry.name) != getattr(read, entry.name)
    ]
    applied = tuple(name for name in changed if name in RELOADABLE)
    # Also what compares equal: a rule that stands in another file now says so.
    live: dict[str, Any] = {name: getattr(read, name) for name in RELOADABLE}
    return ReloadOutcome(
        dataclasses.replace(current, **live),
        applied,
        tuple(name for name in changed if name not in RELOADABLE),
    )


def render(resolved: Resolved) -> str:
    """Settings as a TOML file that gives the same settings again, each value with its source in a comment."""
    lines = ["# Effective settings of splicer run, each with where it came from."]
    for name in VALUE_TYPES:
        value = getattr(resolved.settings, name)
        source = resolved.sources[name]
        lines.append(
            f"# {name} is not set" if value is None else f"{name} = {render_value(value)}  # {source}"
        )
    for rule in resolved.settings.policies:
        lines += ["", f"[[policy]]  # {resolved.sources['policies']}"]
        lines += render_rule(rule)
    return "\n".join(lines) + "\n"
