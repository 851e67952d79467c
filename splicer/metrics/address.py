# SPDX-License-Identifier: Apache-2.0
"""Where metrics are served: a loopback address with a port, or a Unix socket. Nothing that others reach."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

OFF = "off"
ACCEPTED = (
    "off, a loopback address with a port (127.0.0.1:9469, [::1]:9469), or the absolute path of a Unix socket"
)
# Address of a Unix socket: 108 bytes with the closing zero (unix(7)).
_PATH_LIMIT = 107


@dataclass(frozen=True)
class Address:
    """Either `path`, of a Unix socket, or `host`, without brackets, and `port`."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


def parse(text: str) -> Address | None:
    """The address that an operator means; None for `off`. Raises ValueError for what is not accepted."""
    if text == OFF:
        return None
    if text.startswith("/"):
        if not text.isprintable() or text.endswith("/") or len(os.fsencode(text)) > _PATH_LIMIT:
            raise ValueError(text)
        return Address(path=text)
    host, separator, port = text.rpartition(":")
    if not separator or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ValueError(text)
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    else:
        host = str(ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host))
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError(text)
    return Address(host, int(port))


def is_accepted(value: object) -> bool:
    """For whoever reads the configuration."""
    if not isinstance(value, str):
        return False
    try:
        parse(value)
    except ValueError:
        return False
    return True
