# SPDX-License-Identifier: Apache-2.0
"""`--default off` leaves what is not labelled completely alone, on the whole host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cgroup import find_v2_root
from support.daemon import wait_until
from support.docker import Engine
from support.stack import Network, Stack

CONNECTIONS = 8


@pytest.fixture
def everywhere(engine: Engine) -> Iterator[Stack]:
    """The one test that attaches to the root, as users do; for some seconds, and switched off by default."""
    stack = Stack(engine, SPLICER_CGROUP=str(find_v2_root()), SPLICER_DEFAULT="off")
    try:
        stack.up("splicer")
        yield stack
    finally:
        stack.down()


def test_only_what_is_labelled_is_spliced(engine: Engine, everywhere: Stack) -> None:
    network = Network(engine, "web")
    try:
        network.serve("labelled", "--label=splicer.enable=true")
        network.start_load("load", "http://web:8080/", connections=CONNECTIONS)
        wait_until("connections", lambda: len(everywhere.flows("load")) >= CONNECTIONS, pause=0.1)
        in_map = 0
        for _ in range(10):
            in_map += everywhere.count_in_sockhash()
        assert network.finish_load("load")["errors"] == 0
        assert in_map == 0
        totals = everywhere.status()["totals"]
        assert (totals["spliced"], totals["redirected_messages"]) == (0, 0)

        network.start_load("load", "http://labelled:8080/", connections=CONNECTIONS)
        wait_until("spliced", lambda: everywhere.count_spliced("labelled") == CONNECTIONS, pause=0.1)
        assert everywhere.count_in_sockhash() == 2 * CONNECTIONS
        assert network.finish_load("load")["errors"] == 0
    finally:
        network.remove()
