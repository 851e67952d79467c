# SPDX-License-Identifier: Apache-2.0
"""Readers that believe FIONREAD, on kernels where it does not count all that waits at a spliced end (class B:
see KNOWN_ISSUES.md): in the two situations in which they were left waiting."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from support.daemon import call
from support.enlisting import sweeping
from support.host import Host
from support.lab import Lab
from support.pauses import Stopwatch
from support.players import HABITS, Pair, stopped
from support.tiers import thorough

from splicer.kernel.sweep import WatchFindings

CONNECTIONS = 3
SIZE = 500  # bytes of a message
# Messages before splicer stops, while it waits for the reader, and afterwards.
BEFORE, MEANWHILE, AFTERWARDS = 20, 10, 20
UNREAD = SIZE * (BEFORE + MEANWHILE + AFTERWARDS)


def _send(pairs: list[Pair], messages: int, pause: float = 0.0) -> None:
    """Messages on each connection in turn."""
    for _ in range(messages):
        for pair in pairs:
            pair.client.send(SIZE)
        time.sleep(pause)


def _count_redirected(host: Host, pairs: list[Pair]) -> list[int]:
    return [(host.find_flow(pair) or {}).get("redirected_messages", 0) for pair in pairs]


def _stop(host: Host, pairs: list[Pair]) -> None:
    """SIGTERM to `splicer run`, which waits for the reader until it may wait no longer."""
    host.daemon.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    _send(pairs, MEANWHILE, pause=0.02)
    assert host.daemon.alive, "it did not wait for the reader"
    assert host.daemon.wait() == 0
    assert f'"unread_connections": {CONNECTIONS}' in host.daemon.tail()


def _unload(host: Host, pairs: list[Pair]) -> None:
    """SIGKILL, and `splicer unload`, which waits in the same way."""
    host.daemon.kill()
    _send(pairs, MEANWHILE, pause=0.02)
    done = call("unload", f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}", "--stop-timeout=1")
    assert done.code == 0, done
    assert f"{CONNECTIONS} connections have unread redirected bytes" in done.stdout
    host.daemon.ready_file.unlink(missing_ok=True)


def _unload_late(host: Host, pairs: list[Pair]) -> None:
    """The same by somebody who is held up between the beginning of the stop and the first look at a socket,
    for longer than a pair has to find rest."""
    host.daemon.kill()
    with sweeping(host) as sweeper:
        watch = sweeper.watch_all

        def watch_and_pause() -> WatchFindings:
            findings = watch()
            time.sleep(0.3)
            return findings

        sweeper.watch_all = watch_and_pause  # type: ignore[method-assign]
        assert sweeper.drain(0.5).left == CONNECTIONS
    _unload(host, pairs)


@pytest.mark.parametrize(
    ("leave", "edge"),
    [
        pytest.param(leave, edge, id=f"{name}-{kind}", marks=() if always else thorough("each has its turn"))
        for name, leave, usual in (
            ("stop", _stop, True),
            ("unload", _unload, False),
            ("late", _unload_late, True),
        )
        for kind, edge in (("level", False), ("edge", True))
        for always in (edge is usual,)
    ],
)
def test_reader_that_is_stopped_while_splicer_stops(
    lab: Lab, leave: Callable[[Host, list[Pair]], None], edge: bool
) -> None:
    """Redirected bytes wait for a process that does not run until splicer has gone, and its peers go on
    sending. When it runs again it gets all of them, and what comes later."""
    with Host("--stop-timeout", "5") as host:
        sender, reader = host.peer(lab, "a"), host.peer(lab, "b", program=HABITS)
        pairs = [host.connect(sender, reader, lab.address("b")) for _ in range(CONNECTIONS)]
        for pair in pairs:
            host.make_hot(pair)
        conns = [pair.server.conn for pair in pairs]
        before = _count_redirected(host, pairs)
        reader.begin("recv_told", conns=conns, count=UNREAD, edge=edge)
        assert reader.is_waiting(0.2)
        with stopped(reader):
            _send(pairs, BEFORE)
            assert _count_redirected(host, pairs) == [count + BEFORE for count in before]
            leave(host, pairs)
            assert host.list_pins() == []
            _send(pairs, AFTERWARDS)
        # It gives up by itself when nothing came for some seconds.
        reader.finish()
        reader.begin("recv_told", conns=conns, count=20 * SIZE, edge=edge)
        _send(pairs, 20, pause=0.01)
        reader.finish()
        for pair in pairs:
            pair.pingpong(20)
            pair.verify()


TIMES, TALKS, ROUNDS, MESSAGE = 4, 12, 12, 200_000
ENOUGH = 8  # connections that were spliced while bytes moved
PATIENCE = 10  # times as often, for talks that were over before they could be spliced
# A watch that has seen such an end for 40 ms has it taken out by the next sweep: a tenth of a second where
# there is CPU time for it, three of them where ten others want it.
LONGEST_DENIAL = 1.0  # seconds


def test_reader_of_what_is_available(lab: Lab) -> None:
    """Large messages go round on connections while these are being spliced. Both ends read a byte and then
    what FIONREAD says. While it says 0 such a reader goes on byte by byte, and never seems to be stuck: no
    connection may be left so."""
    with Host() as host:
        client, server = (host.peer(lab, place, program=HABITS) for place in "ab")
        spliced = 0
        for number in range(PATIENCE * TIMES):
            if number >= TIMES and spliced >= ENOUGH:
                break
            pairs = [host.connect(client, server, lab.address("b")) for _ in range(TALKS)]
            with Stopwatch() as watch:
                for end, opens in (("client", True), ("server", False)):
                    conns = [getattr(pair, end).conn for pair in pairs]
                    peer = client if opens else server
                    peer.begin("talk", conns=conns, rounds=ROUNDS, size=MESSAGE, opens=opens)
                seen = [client.finish(), server.finish()]
            spliced = host.daemon.totals()["spliced"]
            print(f"{seen}, {spliced} times spliced by now")
            assert max(each["longest"] for each in seen) < LONGEST_DENIAL + watch.paused, seen
            for pair in pairs:
                pair.verify()
                pair.close()
        assert spliced >= ENOUGH, "hardly anything was spliced while bytes moved"
