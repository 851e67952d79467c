# SPDX-License-Identifier: Apache-2.0
"""Where the servers of the soak listen, and the policies that come and go for them."""

from __future__ import annotations

from soak.field import Field

MIXED, POLICY, EAGER, BLOCKING = 7000, 7001, 7002, 7003  # ports
LISTENERS = [
    {"host": "::", "port": MIXED, "dual": True},
    {"host": "0.0.0.0", "port": POLICY},
    {"host": "::", "port": EAGER, "dual": True},
]
BASE = f'[[policy]]\nports = {EAGER}\nmode = "eager"\n'
MISTAKES = ("= =", "mode = 'sometimes'\n", "[[policy]]\nmode = 'off'\n")


def list_policies(host: int, cgroup: str) -> list[str]:
    """Configurations, some of which single out a host, or a cgroup by its path."""
    return [
        f'[[policy]]\ncidr = "{Field.address(host)}"\nmode = "off"\n',
        f'[[policy]]\ncidr = "{Field.address(host, 6)}"\nmode = "off"\n',
        '[[policy]]\ncidr = "127.0.0.0/8"\nmode = "off"\n[[policy]]\ncidr = "::1"\nmode = "off"\n',
        f'[[policy]]\nports = {POLICY}\nmode = "off"\n',
        f'[[policy]]\nports = {POLICY}\nmode = "eager"\n',
        f'[[policy]]\nports = [{MIXED}, {EAGER}]\nmode = "off"\n',
        f'[[policy]]\nports = {BLOCKING}\nblocking = "allow"\n',
        f'[[policy]]\ncgroup = "{cgroup}"\nmode = "off"\n',
        'default = "off"\n',
        f'default = "off"\n[[policy]]\ncgroup = "{cgroup}"\nmode = "adaptive"\n',
        'mode = "eager"\n',
    ]
