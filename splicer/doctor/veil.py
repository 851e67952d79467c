# SPDX-License-Identifier: Apache-2.0
"""Takes out of a document what may be nobody else's business, and leaves what it is about.

What is kept is listed, and not what is taken out: a key that nobody thought of is replaced. One text is
replaced by one word throughout, so that it can still be seen who is who.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from typing import Any

# Keys whose texts are words of splicer's or the kernel's, or numbers.
KEPT = frozenset(
    (
        "adoption",
        "blocking",
        "blocking_readers",
        "can_run",
        "default",
        "event",
        "fionread",
        "hook",
        "kernel",
        "kernel_class",
        "kind",
        "level",
        "machine",
        "meaning",
        "mode",
        "place",
        "python",
        "reason",
        "state",
        "tcp_inq",
        "timestamp",
        "type",
        "version",
    )
)
# Keys whose texts are sentences of ours: what is in them besides is looked for.
SENTENCES = frozenset(
    (
        "text",
        "mend",
        "more",
        "verdict",
        "trouble",
        "hint",
        "why",
        "note",
        "notes",
        "failed",
        "error",
        "evidence",
    )
)
_NETWORK_KEYS = frozenset(("local", "remote", "peer", "address", "addresses"))
_OUR_KEY = re.compile(r"[a-z][a-z0-9_]*")
_OUR_NUMBER = re.compile(r"[0-9]+")
_V4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_V6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?![\w:])")
# Paths that are the same everywhere.
_COMMON_PATH = re.compile(
    r"/(?:proc|usr|lib|boot|dev|sys)(?:/|$)(?!fs/cgroup/.)|/(?:var/)?run/(?:docker|podman/podman)\.sock$|"
    r"/(?:run|var/cache|sys/fs/bpf)/splicer(?:/|$)|/sys/fs/cgroup$"
)
_PATH = re.compile(r"(?<![\w/.])/[^\s,;:()'\"]+")


class Veil:
    """Replaces texts, the same one by the same word."""

    def __init__(self, kept: Collection[str] = KEPT) -> None:
        """`kept` are the keys whose texts stay."""
        self.kept = kept
        self._words: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._known: tuple[int, re.Pattern[str]] | None = None

    def cover(self, document: Any, key: str = "") -> Any:
        """A document as JSON has it, with what is private replaced. `key` is what it is the value of."""
        if isinstance(document, Mapping):
            named = [(self._cover_key(str(name)), str(name), value) for name, value in document.items()]
            # A key that was replaced is no word for what it is the key of.
            return {key: self.cover(value, name if key == name else "value") for key, name, value in named}
        if isinstance(document, list | tuple):
            return [self.cover(each, key) for each in document]
        if not isinstance(document, str) or not document or key in self.kept:
            return document
        if key in SENTENCES:
            return self.cover_sentence(document)
        if key in _NETWORK_KEYS:
            return self._cover_addresses(document)
        return self._replace(key or "name", document)

    def cover_sentence(self, text: str) -> str:
        """Addresses, paths, and all that was replaced elsewhere so far. Other words stay."""
        if self._words:
            text = self._find_known().sub(lambda found: self._words[found[0]], text)
        text = _PATH.sub(lambda found: self._cover_path(found[0]), text)
        return self._cover_addresses(text)

    def _find_known(self) -> re.Pattern[str]:
        """Short ones are in every second word."""
        if self._known is None or self._known[0] != len(self._words):
            longest = sorted((each for each in self._words if len(each) > 2), key=len, reverse=True)
            pattern = "|".join(map(re.escape, longest)) or "(?!)"
            self._known = len(self._words), re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")
        return self._known[1]

    def _cover_key(self, name: str) -> str:
        return name if _OUR_KEY.fullmatch(name) or _OUR_NUMBER.fullmatch(name) else self._replace("key", name)

    def _cover_path(self, path: str) -> str:
        return path if _COMMON_PATH.match(path) else self._replace("path", path)

    def _cover_addresses(self, text: str) -> str:
        text = _V4.sub(lambda found: self._cover_address(found[0]), text)
        return _V6.sub(lambda found: self._cover_address(found[0]), text)

    def _cover_address(self, text: str) -> str:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return text
        if address.is_loopback or address.is_unspecified:
            return text
        return self._replace("address", text)

    def _replace(self, kind: str, text: str) -> str:
        word = self._words.get(text)
        if word is None:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            word = self._words[text] = f"{kind}-{self._counts[kind]}"
        return word
