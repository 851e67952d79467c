# SPDX-License-Identifier: Apache-2.0
"""The labels of containers that splicer reads: splicer.enable, splicer.mode and splicer.ports.

Whoever starts a container sets them, and they cannot be changed while it lives. They are read strictly: a
typing error must not splice a container that its operator wanted to be left alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PREFIX = "splicer."
ENABLE = "splicer.enable"  # true or false: splice this container's connections, or leave it alone
MODE = "splicer.mode"  # adaptive, eager or off; alone it implies enable=true
PORTS = "splicer.ports"  # only connections to these server ports; alone it implies enable=true

MOST_PORTS = 128
_SHOWN = 80

_MODES = ("adaptive", "eager", "off")
_ACCEPTED = {
    ENABLE: "true or false",
    MODE: "adaptive, eager or off",
    PORTS: f'up to {MOST_PORTS} ports from 1 to 65535, such as "8080", "80,443" or "8000-8010"',
}
_KNOWN = ", ".join(_ACCEPTED)
_WORDS = {ENABLE: ("true", "false"), MODE: _MODES}


@dataclass(frozen=True)
class LabelPolicy:
    """What labels ask for. `mode` None: what --mode says. `ports` are server ports, ascending; empty: all."""

    mode: str | None
    ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A label that cannot be used as it is, what would be accepted in its place, and what may have been
    meant: a label, or a value of this one; empty if nothing is like it."""

    label: str
    value: str
    accepted: str
    meant: str = field(default="", compare=False)


def read(labels: Mapping[str, str]) -> tuple[LabelPolicy | None, tuple[Problem, ...]]:
    """What the labels of one container ask for (None: nothing), and what is wrong with them.

    A value that cannot be read switches the container off, whatever its other labels say. A key below
    `splicer.` that is unknown is a problem too, and changes nothing.
    """
    problems = [
        Problem(_shorten(label), _shorten(value), f"the labels {_KNOWN}", _guess_label(label))
        for label, value in sorted(labels.items())
        if label not in _ACCEPTED and (label.startswith(PREFIX) or _is_a_slip(label))
    ]
    given = {label: labels[label] for label in _ACCEPTED if label in labels}
    unreadable = [
        Problem(label, _shorten(value), _ACCEPTED[label], _guess_value(label, value))
        for label, value in given.items()
        if not _is_good(label, value)
    ]
    problems += unreadable
    if unreadable:
        return LabelPolicy("off"), tuple(problems)
    if not given:
        return None, tuple(problems)
    mode = given.get(MODE)
    if given.get(ENABLE, "").lower() == "false":
        mode = "off"
    ports = read_ports(given[PORTS], MOST_PORTS) if PORTS in given else ()
    return LabelPolicy(mode, ports), tuple(problems)


def name_unreadable(problems: Iterable[Problem]) -> list[str]:
    """The labels whose values cannot be read. Each of them by itself switches the container off."""
    return [problem.label for problem in problems if problem.label in _ACCEPTED]


def _guess_value(label: str, value: str) -> str:
    near = difflib.get_close_matches(value[:_SHOWN].strip().lower(), _WORDS.get(label, ()), n=1)
    return near[0] if near else ""


def _guess_label(label: str) -> str:
    """By what stands behind `splicer.`, in which all labels are alike."""
    tails = [known.removeprefix(PREFIX) for known in _ACCEPTED]
    near = difflib.get_close_matches(label[:_SHOWN].lower().rpartition(".")[2], tails, n=1)
    return PREFIX + near[0] if near else ""


def _is_a_slip(label: str) -> bool:
    """Not below `splicer.`, and all the same one of ours with a typing error, such as spliser.mode."""
    head = label[:_SHOWN].lower().rpartition(".")[0]
    return bool(difflib.get_close_matches(head, (PREFIX[:-1],), n=1, cutoff=0.85) and _guess_label(label))


def _shorten(text: str) -> str:
    # Whoever starts a container may write a megabyte there; it goes into the log and into answers.
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _is_good(label: str, value: str) -> bool:
    if label == ENABLE:
        return value.lower() in ("true", "false")
    if label == MODE:
        return value in _MODES
    try:
        read_ports(value, MOST_PORTS)
    except ValueError:
        return False
    return True


def read_ports(text: str, limit: int) -> tuple[int, ...]:
    """Ports of a text such as "80, 8000-8010", ascending, each once.

    Raises ValueError if it is anything else, names no port, or more than `limit` of them.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip(" ") for piece in part.partition("-"))
        low = _read_port(first)
        high = _read_port(last) if dash else low
        if high < low:
            raise ValueError(f"{low} is above {high}")
        if high - low >= limit:
            raise ValueError(f"more than {limit} ports")
        found.update(range(low, high + 1))
        if len(found) > limit:
            raise ValueError(f"more than {limit} ports")
    return tuple(sorted(found))


def _read_port(text: str) -> int:
    # int() also takes "+80", "8_0" and other scripts' digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError(f"{text!r} is not a port")
    return int(text)
