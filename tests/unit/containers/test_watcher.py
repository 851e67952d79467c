# SPDX-License-Identifier: Apache-2.0
"""Whatever the engine tells, forgets or suffers, the inventory ends up as what is there."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from support import daemon
from support.engine import FakeEngine, name_id
from support.pauses import Stopwatch

from splicer.containers.engine import Engine, InspectedContainer
from splicer.containers.watcher import Timing, Watcher
from splicer.host.scopes import Scopes
from splicer.model import Container

from ..conftest import Log

QUICK = Timing(pause=0.02, everything=60.0, shortest_backoff=0.05, longest_backoff=0.2, glance=0.02)


def wait_until(holds: Callable[[], object], seconds: float = 15.0) -> None:
    daemon.wait_until("it comes to that", holds, timeout=seconds, pause=0.005)


class Bench:
    """A fake engine, and watchers of it. Cgroup and namespace of a container follow from its pid."""

    def __init__(self, fake: FakeEngine, log: Log) -> None:
        self.fake = fake
        self.log = log
        self.changes = 0
        self.patience = 5.0
        self.unlocated: set[str] = set()
        self.watchers: list[Watcher] = []

    def start(self, docker: str | None = None, timing: Timing = QUICK, **more: Any) -> Watcher:
        options: dict[str, Any] = {
            "environ": {},
            "connect": self.connect,
            "locate": self.locate,
            "is_current": self.is_current,
            "timing": timing,
        }
        watcher = Watcher(
            docker or self.fake.url, Scopes("/nowhere"), self.on_change, self.log, **{**options, **more}
        )
        self.watchers.append(watcher)
        watcher.start()
        return watcher

    def begin(self, timing: Timing = QUICK) -> Watcher:
        """A watcher that knows of a container, has told so, and follows the events."""
        self.fake.run(1)
        watcher = self.start(timing=timing)
        assert watcher.wait_first(15)
        wait_until(lambda: self.changes == 1)
        self.fake.wait_for_stream()
        return watcher

    def connect(self, endpoint: str, environ: Mapping[str, str]) -> Engine:
        return Engine(endpoint, environ, timeout=self.patience, idle=self.patience)

    def on_change(self) -> None:
        self.changes += 1

    def locate(self, found: InspectedContainer, _scopes: Scopes) -> Container:
        known = found.id not in self.unlocated
        return Container(
            id=found.id,
            name=found.name,
            image=found.image,
            labels=found.labels,
            pid=found.pid,
            cgroup_id=found.pid + 5000 if known else 0,
            netns=found.pid + 9000 if known else 0,
            network_mode=found.network_mode,
        )

    def is_current(self, container: Container) -> bool:
        there = self.fake.containers.get(container.id)
        return there is not None and there["State"]["Pid"] == container.pid

    def truth(self) -> dict[str, tuple[str, int, int]]:
        return {
            each["Id"]: (each["Name"][1:], each["State"]["Pid"], each["State"]["Pid"] + 5000)
            for each in list(self.fake.containers.values())
            if each["State"]["Pid"]
        }

    def agrees(self, watcher: Watcher) -> bool:
        inventory = watcher.read_inventory()
        if inventory is None:
            return False
        return {each.id: (each.name, each.pid, each.cgroup_id) for each in inventory.values()} == self.truth()

    def settle(self, watcher: Watcher, seconds: float = 15.0) -> None:
        """Wait until the inventory is right, and see that it stays so."""
        wait_until(lambda: self.agrees(watcher), seconds)
        time.sleep(0.1)
        assert self.agrees(watcher)

    def inspects(self) -> int:
        paths = [urlsplit(each).path for each in list(self.fake.requests)]
        return sum(each.endswith("/json") and not each.endswith("/containers/json") for each in paths)

    def logged(self) -> list[str]:
        """Names of what was logged, but for what is only of use in debugging."""
        return [event for level, event, _ in self.log.events if level != "debug"]


@pytest.fixture
def bench(run_dir: str, log: Log) -> Iterator[Bench]:
    fake = FakeEngine(f"{run_dir}/e.sock")
    made = Bench(fake, log)
    yield made
    for watcher in made.watchers:
        watcher.stop()
    fake.stop()


# -- the first list ------------------------------------------------------------------------------------------


def test_what_was_there_before(bench: Bench) -> None:
    for number in range(40):
        bench.fake.run(number)
    bench.fake.die(name_id(7))
    watcher = bench.start()
    assert watcher.wait_first(15)
    inventory = watcher.read_inventory()
    assert inventory is not None
    assert len(inventory) == 39, "the first inventory is all of it"
    assert bench.agrees(watcher)
    wait_until(lambda: bench.changes == 1)
    state = watcher.describe()
    assert state["state"] == "connected"
    assert state["endpoint"] == bench.fake.url
    assert state["containers"] == 39
    assert state["error"] == ""
    assert 0 <= state["since_seconds"] < 5
    assert bench.log.events == [("info", "docker_connected", {"endpoint": bench.fake.url, "containers": 39})]
    assert "/events" in bench.fake.requests[1], "events first, so that nothing is missed"
    assert bench.fake.methods == {"GET"}


def test_no_containers_is_an_answer_too(bench: Bench) -> None:
    watcher = bench.start()
    assert watcher.read_inventory() is None or watcher.read_inventory() == {}
    assert watcher.wait_first(15)
    assert watcher.read_inventory() == {}
    wait_until(lambda: bench.changes == 1)


def test_off(bench: Bench) -> None:
    watcher = bench.start("off")
    assert watcher.wait_first(0)
    assert watcher.read_inventory() == {}
    assert watcher.describe() == {
        "state": "off",
        "endpoint": "",
        "containers": 0,
        "since_seconds": pytest.approx(0, abs=5),
        "error": "",
    }
    watcher.stop()
    assert bench.fake.requests == []
    assert bench.log.events == []


# -- orders of events ----------------------------------------------------------------------------------------


@pytest.fixture
def watcher(bench: Bench) -> Watcher:
    return bench.begin()


@pytest.fixture
def patient(bench: Bench) -> Watcher:
    """One that asks about a container that is not all there for 3 seconds."""
    return bench.begin(replace(QUICK, pause=0.1))


def test_a_start_is_known_at_once(bench: Bench, watcher: Watcher) -> None:
    for number in range(10, 15):
        with Stopwatch() as watch:
            bench.fake.run(number)
            wait_until(lambda: bench.agrees(watcher))
        assert watch.seconds < 1.0


def test_a_death_is_known_at_once(bench: Bench, watcher: Watcher) -> None:
    bench.fake.die(name_id(1))
    bench.settle(watcher)
    bench.fake.remove(name_id(1))
    bench.settle(watcher)
    assert watcher.read_inventory() == {}


def test_death_seen_before_start(bench: Bench, watcher: Watcher) -> None:
    identifier = bench.fake.run(2, emit=False)
    bench.fake.emit("die", identifier)
    bench.fake.emit("start", identifier)
    bench.settle(watcher)
    bench.fake.remove(identifier, emit=False)
    bench.fake.emit("start", identifier)
    bench.fake.emit("destroy", identifier)
    bench.fake.emit("die", identifier)
    bench.settle(watcher)


def test_gone_before_anybody_asks(bench: Bench, watcher: Watcher) -> None:
    changes = bench.changes
    bench.fake.emit("start", name_id(99))
    wait_until(lambda: bench.fake.count(f"{name_id(99)}/json"))
    bench.settle(watcher)
    assert bench.changes == changes


def test_a_restart_loop(bench: Bench, watcher: Watcher) -> None:
    for turn in range(100):
        bench.fake.die(name_id(1))
        bench.fake.run(1, pid=2000 + turn)
    bench.settle(watcher)
    bench.fake.die(name_id(1))
    bench.settle(watcher)
    assert bench.inspects() < 40


def test_the_same_id_with_another_process(bench: Bench, watcher: Watcher) -> None:
    bench.fake.run(1, pid=4242, name="reused", labels={"splicer.enable": "false"})
    bench.settle(watcher)
    inventory = watcher.read_inventory()
    assert inventory is not None
    assert inventory[name_id(1)].labels == {"splicer.enable": "false"}
    assert inventory[name_id(1)].netns == 4242 + 9000


def test_rename(bench: Bench, watcher: Watcher) -> None:
    bench.fake.run(1, name="other", emit=False)
    bench.fake.emit("rename", name_id(1))
    bench.settle(watcher)


def test_networks_come_and_go(bench: Bench, watcher: Watcher) -> None:
    sidecar = bench.fake.run(2, mode=f"container:{name_id(1)}")
    bench.settle(watcher)
    for action in ("connect", "disconnect"):
        before = [bench.fake.count(f"{each}/json") for each in (name_id(1), sidecar)]
        bench.fake.emit(action, name_id(1), "network")
        wait_until(
            lambda before=before: all(
                bench.fake.count(f"{each}/json") > count
                for each, count in zip((name_id(1), sidecar), before, strict=True)
            )
        )


def test_what_says_nothing_new_costs_nothing(bench: Bench, watcher: Watcher) -> None:
    before = len(bench.fake.requests)
    for _ in range(50):
        bench.fake.emit("exec_start: healthcheck", name_id(1))
        bench.fake.emit("health_status: healthy", name_id(1))
    time.sleep(0.2)
    assert len(bench.fake.requests) == before


def test_a_burst_of_a_thousand(bench: Bench, watcher: Watcher) -> None:
    before = bench.inspects()
    with bench.fake.together():
        for number in range(1000):
            identifier = bench.fake.run(10 + number)
            if number % 100:
                bench.fake.remove(identifier)
    bench.settle(watcher)
    assert len(bench.truth()) == 11
    assert bench.inspects() - before < 200
    assert bench.fake.count("/containers/json") < 30


def test_a_thousand_events_of_one(bench: Bench, watcher: Watcher) -> None:
    before = bench.inspects()
    with bench.fake.together():
        for _ in range(1000):
            bench.fake.emit("start", name_id(1))
    time.sleep(0.2)
    assert bench.inspects() - before < 30


@pytest.mark.parametrize("seed", range(3))
def test_any_order(bench: Bench, watcher: Watcher, seed: int) -> None:
    """Events come late, in another order, twice or not at all; only the last of each container does come."""
    chance = random.Random(seed)
    late: list[tuple[str, str]] = []
    touched: set[str] = set()
    for _ in range(300):
        number = chance.randrange(1, 12)
        identifier = name_id(number)
        action = chance.choice(["start", "die", "rename", "destroy"])
        if action in ("start", "rename"):
            bench.fake.run(number, pid=chance.randrange(1, 1 << 20), name=f"n{chance.random()}", emit=False)
        elif action == "die" and identifier in bench.fake.containers:
            bench.fake.die(identifier, emit=False)
        elif action == "destroy":
            bench.fake.remove(identifier, emit=False)
        touched.add(identifier)
        late += [(action, identifier)] * chance.randrange(3)
        if chance.random() < 0.3:
            chance.shuffle(late)
            for each in late:
                bench.fake.emit(*each)
            late.clear()
            time.sleep(chance.random() * 0.01)
    for identifier in touched:
        bench.fake.emit("start" if identifier in bench.truth() else "die", identifier)
    bench.settle(watcher)


# -- the list ------------------------------------------------------------------------------------------------


def test_what_no_event_told(bench: Bench) -> None:
    bench.fake.run(1)
    bench.fake.run(2)
    bench.fake.run(3)
    watcher = bench.start(timing=Timing(pause=0.01, everything=0.1))
    assert watcher.wait_first(15)
    bench.fake.run(1, pid=7777, emit=False)
    bench.fake.remove(name_id(2), emit=False)
    bench.fake.run(3, name="renamed", emit=False)
    bench.fake.run(4, emit=False)
    bench.settle(watcher)


def test_a_list_that_is_as_before_costs_one_request(bench: Bench) -> None:
    for number in range(30):
        bench.fake.run(number)
    watcher = bench.start(timing=Timing(pause=0.01, everything=0.05))
    assert watcher.wait_first(15)
    wait_until(lambda: bench.changes == 1)
    changes, inspects, lists = bench.changes, bench.inspects(), bench.fake.count("/containers/json")
    inventory = watcher.read_inventory()
    wait_until(lambda: bench.fake.count("/containers/json") > lists + 3)
    assert (bench.changes, bench.inspects()) == (changes, inspects)
    assert watcher.read_inventory() is inventory


def test_one_container_that_cannot_be_inspected(bench: Bench, patient: Watcher) -> None:
    bench.fake.statuses[f"{name_id(1)}/json"] = 500
    bench.fake.run(1, pid=3333)
    bench.fake.run(2)
    wait_until(lambda: len(patient.read_inventory() or ()) == 2)
    inventory = patient.read_inventory()
    assert inventory is not None
    assert inventory[name_id(1)].pid == 1001, "what was known of it is kept"
    assert patient.describe()["state"] == "connected"
    bench.fake.statuses.clear()
    bench.settle(patient)


def test_a_container_that_is_not_all_there_yet(bench: Bench, patient: Watcher) -> None:
    bench.unlocated.add(name_id(2))
    bench.fake.run(2)
    wait_until(lambda: len(patient.read_inventory() or ()) == 2)
    bench.unlocated.clear()
    bench.settle(patient, 10)


def test_one_that_never_will_be_is_asked_about_a_few_times(bench: Bench, watcher: Watcher) -> None:
    bench.unlocated.add(name_id(2))
    bench.fake.run(2)
    wait_until(lambda: bench.fake.count(f"{name_id(2)}/json") == 5)
    time.sleep(1.0)
    assert bench.fake.count(f"{name_id(2)}/json") == 5


# -- the engine in trouble -----------------------------------------------------------------------------------


def test_absent_and_appearing_later(bench: Bench) -> None:
    bench.fake.stop()
    watcher = bench.start()
    assert watcher.wait_first(15), "nobody waits for an engine that is not there"
    assert watcher.read_inventory() is None
    time.sleep(0.5)
    state = watcher.describe()
    assert (state["state"], state["containers"]) == ("absent", 0)
    assert "No such file" in state["error"]
    assert bench.log.names() == ["docker_absent"], "once, not with every attempt"
    bench.fake.run(1)
    bench.fake.start()
    bench.settle(watcher)
    assert watcher.describe()["state"] == "connected"
    assert watcher.describe()["error"] == ""
    assert bench.log.names() == ["docker_absent", "docker_connected"]


def test_auto(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splicer.containers.engine.SOCKETS", ("unix:///nowhere/docker.sock", bench.fake.url))
    bench.fake.stop()
    watcher = bench.start("auto")
    wait_until(lambda: watcher.describe()["error"])
    assert watcher.describe()["endpoint"] == ""
    assert "/nowhere/docker.sock" in watcher.describe()["error"]
    bench.fake.start()
    wait_until(lambda: watcher.describe()["state"] == "connected")
    assert watcher.describe()["endpoint"] == bench.fake.url


def test_auto_does_not_change_over_while_its_engine_restarts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, run_dir: str
) -> None:
    other = FakeEngine(f"{run_dir}/other.sock")
    try:
        monkeypatch.setattr("splicer.containers.engine.SOCKETS", (bench.fake.url, other.url))
        bench.fake.run(1)
        watcher = bench.start("auto")
        bench.settle(watcher)
        bench.fake.stop()
        wait_until(lambda: watcher.describe()["state"] == "lost")
        time.sleep(0.3)
        assert other.requests == []
        assert bench.agrees(watcher)
    finally:
        other.stop()


def test_a_restart_of_the_engine(bench: Bench, watcher: Watcher) -> None:
    inventory = watcher.read_inventory()
    bench.fake.stop()
    wait_until(lambda: watcher.describe()["state"] == "lost")
    assert watcher.read_inventory() is inventory, "what it said last still holds"
    assert watcher.describe()["containers"] == 1
    time.sleep(0.5)
    bench.fake.run(1, pid=8888)
    bench.fake.run(2)
    bench.fake.start()
    bench.settle(watcher)
    assert watcher.describe()["state"] == "connected"
    assert bench.logged() == ["docker_connected", "docker_lost", "docker_connected"]


def test_a_new_socket_is_tried_at_once(bench: Bench) -> None:
    bench.fake.run(1)
    watcher = bench.start(timing=Timing(pause=0.01, shortest_backoff=30, longest_backoff=30, glance=0.05))
    bench.settle(watcher)
    bench.fake.stop()
    wait_until(lambda: watcher.describe()["state"] == "lost")
    bench.fake.run(2)
    bench.fake.start()
    bench.settle(watcher, 10)


def test_the_stream_is_cut(bench: Bench, watcher: Watcher) -> None:
    time.sleep(1.1)  # shorter, and it would count as an engine in trouble
    bench.fake.run(2, emit=False)
    bench.fake.run(1, pid=5, emit=False)
    bench.fake.send(b'{"Type":"container","Act')
    bench.fake.cut()
    bench.settle(watcher)
    assert "docker_lost" not in bench.log.names()


def test_a_stream_that_is_cut_all_the_time(bench: Bench) -> None:
    bench.fake.run(1)
    watcher = bench.start()
    ended = time.monotonic() + 1.0
    while time.monotonic() < ended:
        bench.fake.cut()
        time.sleep(0.01)
    assert bench.fake.count("/events") < 40
    bench.fake.run(2)
    bench.settle(watcher)
    assert watcher.describe()["state"] == "connected"


def test_garbage_in_the_stream(bench: Bench, watcher: Watcher) -> None:
    bench.fake.run(2, emit=False)
    bench.fake.send(b"oops\n")
    bench.settle(watcher)


def test_an_idle_stream_is_taken_up_where_it_was(bench: Bench) -> None:
    bench.fake.run(1)
    # The headers have to come within that time, too.
    watcher = bench.start(connect=lambda url, environ: Engine(url, environ, timeout=5.0, idle=2.0))
    assert watcher.wait_first(15)
    lists = bench.fake.count("/containers/json")
    for number in range(2, 5):
        streams = bench.fake.count("/events")
        bench.fake.run(number)
        wait_until(lambda streams=streams: bench.fake.count("/events") > streams)
    bench.fake.run(5)
    bench.settle(watcher)
    assert bench.fake.count("/events") > 3
    assert any("since=" in each for each in bench.fake.requests)
    assert bench.fake.count("/containers/json") == lists
    assert "docker_lost" not in bench.log.names()


def test_gone_half_way_through_the_list(bench: Bench, watcher: Watcher) -> None:
    for number in range(2, 40):
        bench.fake.run(number, emit=False)
    bench.fake.calls[f"{name_id(30)}/json"] = bench.fake.cut
    bench.fake.hang.add(f"{name_id(35)}/json")
    inventory = watcher.read_inventory()
    assert inventory is not None

    def is_lost() -> bool:
        # Whether so many hints are taken together, and lead to the list, is a matter of luck.
        for number in range(500, 540):
            bench.fake.emit("die", name_id(number))
        time.sleep(0.1)
        return watcher.describe()["state"] == "lost"

    wait_until(is_lost)
    after = watcher.read_inventory()
    assert after is not None
    assert inventory.items() <= after.items(), "nothing is lost with the engine"
    bench.fake.calls.clear()
    bench.fake.hang.clear()
    bench.settle(watcher)


def test_an_engine_that_hangs(bench: Bench) -> None:
    bench.patience = 0.5
    bench.fake.run(1)
    watcher = bench.start()
    bench.settle(watcher)
    bench.fake.hang |= {"/json", "/events", "/version"}
    bench.fake.emit("start", name_id(1))
    wait_until(lambda: watcher.describe()["state"] == "lost")
    assert "does not answer" in watcher.describe()["error"]
    assert bench.agrees(watcher)
    bench.patience = 5.0
    bench.fake.hang.clear()
    bench.fake.run(2)
    bench.settle(watcher)


def test_an_engine_that_refuses(bench: Bench) -> None:
    bench.fake.statuses["/version"] = 403
    watcher = bench.start()
    assert watcher.wait_first(15)
    assert watcher.describe()["state"] == "absent"
    assert "403" in watcher.describe()["error"]
    bench.fake.statuses.clear()
    wait_until(lambda: watcher.describe()["state"] == "connected")


def test_what_nobody_thought_of_does_not_end_the_thread(bench: Bench, watcher: Watcher) -> None:
    real, broken = bench.locate, True

    def locate(found: InspectedContainer, scopes: Scopes) -> Container:
        if broken:
            raise RuntimeError("a bug")
        return real(found, scopes)

    watcher._reconciler._locate = locate
    bench.fake.run(2)
    wait_until(lambda: watcher.describe()["state"] == "lost")
    assert "docker_failed" in bench.log.names()
    broken = False
    bench.settle(watcher)


# -- the end -------------------------------------------------------------------------------------------------


def test_stop(bench: Bench, watcher: Watcher) -> None:
    with Stopwatch() as watch:
        watcher.stop()
    assert watch.seconds < 1.0
    wait_until(lambda: not any(each.name.startswith("watcher") for each in threading.enumerate()))
    changes = bench.changes
    bench.fake.run(2)
    time.sleep(0.1)
    assert bench.changes == changes
    assert watcher.describe()["containers"] == 1
    watcher.stop()


def test_stop_without_an_engine(bench: Bench) -> None:
    bench.fake.stop()
    watcher = bench.start(timing=Timing(shortest_backoff=30))
    assert watcher.wait_first(15)
    with Stopwatch() as watch:
        watcher.stop()
    assert watch.seconds < 1.0


def test_stop_does_not_wait_for_an_engine_that_hangs(bench: Bench) -> None:
    bench.fake.hang.add("/version")
    watcher = bench.start(connect=lambda url, environ: Engine(url, environ, timeout=3.0))
    time.sleep(0.1)
    with Stopwatch() as watch:
        watcher.stop()
    assert watch.seconds < 1.5
    assert not watcher.wait_first(0) or watcher.read_inventory() is None
    assert bench.log.events == []


def test_nothing_leaks(bench: Bench, watcher: Watcher) -> None:
    def churn(first: int, count: int) -> None:
        for number in range(first, first + count):
            bench.fake.run(number)
            bench.fake.remove(name_id(number - 3))
            if number % 25 == 0:
                bench.settle(watcher)

    churn(100, 100)
    bench.settle(watcher)
    fds = len(os.listdir("/proc/self/fd"))
    churn(200, 500)
    bench.settle(watcher)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds)
    reconciler = watcher._reconciler
    assert len(reconciler._known) <= 40
    wait_until(lambda: len(reconciler._again) == len(reconciler._waiting) == 0)
