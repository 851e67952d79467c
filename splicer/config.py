# SPDX-License-Identifier: Apache-2.0
"""Settings: command line over SPLICER_* environment over the configuration file (TOML) over defaults.

Each value remembers where it came from, so that an error and `--print-config` can name the place.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from splicer.errors import USAGE, SplicerError

Mode = Literal["adaptive", "eager", "off"]
Blocking = Literal["refuse", "allow"]
LogFormat = Literal["auto", "console", "json"]

MODES: tuple[str, ...] = get_args(Mode)
BLOCKING: tuple[str, ...] = get_args(Blocking)
LOG_FORMATS: tuple[str, ...] = get_args(LogFormat)

CONFIG_VARIABLE = "SPLICER_CONFIG"
DEFAULT_SOURCE = "default"


@dataclass(frozen=True)
class ServiceRule:
    """What differs for connections to one server port. None means: as for all others."""

    port: int
    mode: Mode | None = None
    blocking: Blocking | None = None


@dataclass(frozen=True)
class Settings:
    """Everything `splicer run` can be told. `stop_timeout` is in seconds."""

    cgroup: str = "/sys/fs/cgroup"
    mode: Mode = "adaptive"
    blocking: Blocking = "refuse"
    services: tuple[ServiceRule, ...] = ()
    ready_file: str | None = None
    max_connections: int = 65536
    run_dir: str = "/run/splicer"
    pin_dir: str = "/sys/fs/bpf/splicer"
    hot_reads: int = 16
    stop_timeout: float = 5.0
    debug: bool = False
    log_format: LogFormat = "auto"


@dataclass(frozen=True)
class Resolved:
    """Settings, and for each name where its value came from: an option, a variable, a file or `default`."""

    settings: Settings
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """A type of value: what is accepted, in words; how TOML's value is checked; how text is read."""

    accepted: str
    check: Callable[[object], bool]
    # Raises ValueError for text that cannot be read. The outcome still goes through `check`.
    read: Callable[[str], object] = field(default=lambda text: text)


def _choice(values: Sequence[str]) -> Kind:
    return Kind(
        ", ".join(values[:-1]) + " or " + values[-1], lambda value: isinstance(value, str) and value in values
    )


def _integer(low: int, high: int) -> Kind:
    # bool is an int to Python and not to anybody else.
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        int,
    )


def _seconds(low: float, high: float) -> Kind:
    return Kind(
        f"seconds, from {low:g} to {high:g}",
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and low <= value <= high
        ),
        float,
    )


def _is_path(value: object) -> bool:
    # What no file system call or TOML file can carry is better refused here, where its source can be named.
    return isinstance(value, str) and bool(value) and value.isprintable()


def _read_switch(text: str) -> bool:
    try:
        return {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


_PATH = Kind("a path", _is_path)
_PORT = _integer(1, 65535)

KINDS: Mapping[str, Kind] = {
    "cgroup": _PATH,
    "mode": _choice(MODES),
    "blocking": _choice(BLOCKING),
    "ready_file": _PATH,
    "max_connections": _integer(16, 1_048_576),
    "run_dir": _PATH,
    "pin_dir": _PATH,
    "hot_reads": _integer(1, 65535),
    "stop_timeout": _seconds(0, 3600),
    "debug": Kind("true or false", lambda value: isinstance(value, bool), _read_switch),
    "log_format": _choice(LOG_FORMATS),
}
SERVICE_KINDS: Mapping[str, Kind] = {"port": _PORT, "mode": KINDS["mode"], "blocking": KINDS["blocking"]}


def option_of(name: str) -> str:
    """The command-line option of a setting: --max-connections for max_connections."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting: SPLICER_MAX_CONNECTIONS for max_connections."""
    return "SPLICER_" + name.upper()


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
    for cannot stop it. Unknown SPLICER_* variables are left alone: Kubernetes makes such names up for any
    service called "splicer". Raises SplicerError with exit code 2 that names source, key, value and what is
    accepted.
    """
    names = [name for name in KINDS if only is None or name in only]
    values: dict[str, Any] = {}
    sources = dict.fromkeys((entry.name for entry in dataclasses.fields(Settings)), DEFAULT_SOURCE)
    file = config_file or environ.get(CONFIG_VARIABLE) or None
    if file is not None:
        from_file = load_file(file)
        values = {name: value for name, value in from_file.items() if name in names or name == "services"}
        sources |= dict.fromkeys(values, file)
    for name in names:
        texts = (
            (options.get(name), option_of(name)),
            (environ.get(variable_of(name)) or None, variable_of(name)),
        )
        for given, source in texts:
            if given is not None:
                values[name] = _read(KINDS[name], given, source)
                sources[name] = source
                break
    if "stop_timeout" in values:
        values["stop_timeout"] = float(values["stop_timeout"])
    return Resolved(Settings(**values), sources)


def _read(kind: Kind, given: object, source: str) -> object:
    try:
        value = kind.read(given) if isinstance(given, str) else given
    except ValueError:
        raise _refuse(source, given, kind.accepted) from None
    return _checked(kind, value, source, given)


def _checked(kind: Kind, value: object, source: str, given: object) -> object:
    if not kind.check(value):
        raise _refuse(source, given, kind.accepted)
    return value


def _refuse(source: str, given: object, accepted: str) -> SplicerError:
    return SplicerError(
        f"bad value for {source}: {_show(given)}", hint=f"accepted: {accepted}", exit_code=USAGE
    )


def _show(value: object) -> str:
    return json.dumps(value, default=str)


def load_file(file: str) -> dict[str, object]:
    """Read and check a configuration file. Returns setting names with values, `services` as a tuple of rules.

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
        if key == "service":
            values["services"] = _read_services(value, file)
        elif key in KINDS:
            values[key] = _checked(KINDS[key], value, f"{key} in {file}", value)
        else:
            raise _unknown(key, f"{file}", [*KINDS, "[[service]]"])
    return values


def _unknown(key: str, place: str, known: Collection[str]) -> SplicerError:
    near = difflib.get_close_matches(key, known, n=1)
    meant = f'did you mean "{near[0]}"? ' if near else ""
    return SplicerError(
        f'unknown key "{key}" in {place}', hint=f"{meant}accepted keys: {', '.join(known)}", exit_code=USAGE
    )


def _read_services(value: object, file: str) -> tuple[ServiceRule, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise SplicerError(
            f"bad value for service in {file}: {_show(value)}",
            hint="accepted: one [[service]] table, in double brackets, for each port",
            exit_code=USAGE,
        )
    rules: list[ServiceRule] = []
    for number, entry in enumerate(value, start=1):
        place = f"[[service]] number {number} in {file}"
        for key, given in entry.items():
            if key not in SERVICE_KINDS:
                raise _unknown(key, place, SERVICE_KINDS)
            _checked(SERVICE_KINDS[key], given, f"{key} of {place}", given)
        if "port" not in entry:
            raise SplicerError(
                f"port is missing in {place}", hint=f"accepted: {_PORT.accepted}", exit_code=USAGE
            )
        if any(rule.port == entry["port"] for rule in rules):
            raise SplicerError(
                f"port {entry['port']} has a second rule: {place}",
                hint="write one [[service]] table for each port",
                exit_code=USAGE,
            )
        rules.append(ServiceRule(**entry))
    return tuple(rules)


def render(resolved: Resolved) -> str:
    """Settings as a TOML file that gives the same settings again, each value with its source in a comment."""
    lines = ["# Effective settings of splicer run, each with where it came from."]
    for name in KINDS:
        value = getattr(resolved.settings, name)
        source = resolved.sources[name]
        lines.append(f"# {name} is not set" if value is None else f"{name} = {_toml(value)}  # {source}")
    for rule in resolved.settings.services:
        lines += ["", f"[[service]]  # {resolved.sources['services']}", f"port = {rule.port}"]
        lines += [
            f"{key} = {_toml(value)}"
            for key, value in (("mode", rule.mode), ("blocking", rule.blocking))
            if value is not None
        ]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    # JSON's strings, numbers and booleans are TOML's, as long as nothing but the printable is in the strings.
    return json.dumps(value, ensure_ascii=False)
