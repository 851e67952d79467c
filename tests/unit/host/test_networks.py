# SPDX-License-Identifier: Apache-2.0
"""What network namespaces look like: from made-up messages and, with root, from the kernel's."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from support.namespaces import keep_namespace

from splicer.host.namespaces import read_cookie
from splicer.host.networks import Lookout, Network, assemble, read_attributes, split_messages

UP, LOOPBACK, CARRIER = 1, 8, 1 << 16
ADDRESS, LOCAL, LABEL = 1, 2, 3
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="setns(2) takes root")


def pack(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def link(index: int, flags: int) -> bytes:
    return struct.pack("=BxHiII", 0, 1, index, flags, 0) + attribute(3, b"name\0")


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def address(index: int, **values: str) -> bytes:
    kinds = {"address": ADDRESS, "local": LOCAL}
    body = struct.pack("=4BI", 2, 24, 0, 0, index) + attribute(LABEL, b"eth0\0")
    for name, text in values.items():
        body += attribute(kinds[name], ipaddress.ip_address(text).packed)
    return body


@pytest.mark.parametrize(
    ("flags", "up"),
    [(UP | CARRIER, True), (UP, False), (CARRIER, False), (0, False), (UP | CARRIER | 2, True)],
)
def test_a_link_is_up_if_it_is_set_up_and_has_a_carrier(flags: int, up: bool) -> None:
    seen = assemble([link(2, flags)], [address(2, address="10.0.0.1", local="10.0.0.1")])
    assert seen == Network({pack("10.0.0.1"): up}, False)


@pytest.mark.parametrize(
    ("flags", "up"), [(LOOPBACK | UP | CARRIER, True), (LOOPBACK, False), (UP | CARRIER, False)]
)
def test_the_loopback_device(flags: int, up: bool) -> None:
    assert assemble([link(1, flags)], []).loopback == up


def test_whose_address_it_is() -> None:
    """On a point-to-point link IFA_ADDRESS is the other end's. IPv6 has no IFA_LOCAL there, as a rule."""
    seen = assemble(
        [link(2, UP | CARRIER)],
        [address(2, address="10.0.0.9", local="10.0.0.1"), address(2, address="fd00::1"), address(2)],
    )
    assert set(seen.addresses) == {pack("10.0.0.1"), pack("fd00::1")}


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_an_address_that_two_links_have(order: tuple[int, int]) -> None:
    links = [link(2, UP | CARRIER), link(3, 0)]
    seen = assemble(links, [address(index, local="10.0.0.1") for index in order])
    assert seen.addresses == {pack("10.0.0.1"): True}


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_what_is_cut_short_is_no_harm(cut: int) -> None:
    body = address(2, address="10.0.0.9", local="10.0.0.1")
    message = struct.pack("=IHHII", 16 + len(body), 20, 2, 0, 0) + body
    assert list(split_messages(message * 2)) == [(20, 2, body)] * 2
    list(split_messages(message[:cut]))
    read_attributes(body[:cut], 8)
    assert list(split_messages(bytes(64))) == []
    assert read_attributes(bytes(64), 8) == {}


class Namespace(NamedTuple):
    """Another network namespace, and a way to run `ip` in it."""

    path: str
    cookie: int
    ip: Callable[..., None]
    end: Callable[[], None]


@pytest.fixture
def neighbour() -> Iterator[Namespace]:
    setup = (
        "ip link set lo up && ip link add eth0 type veth peer name other && ip link set other up &&"
        " ip link set eth0 up && ip addr add 10.9.0.1/24 dev eth0 && ip addr add fd09::1/64 dev eth0 nodad"
    )
    with keep_namespace(setup) as (path, end):

        def ip(*words: str) -> None:
            subprocess.run(["nsenter", f"--net={path}", "ip", *words], check=True)

        yield Namespace(path, read_cookie(path), ip, end)


@pytest.fixture
def lookout() -> Iterator[Lookout]:
    try:
        made = Lookout()
    except OSError as error:
        pytest.skip(f"no namespace can be made here ({error})")
    with contextlib.closing(made):
        yield made


V4, V6 = pack("10.9.0.1"), pack("fd09::1")


@needs_root
def test_what_is_lost_is_not_seen_any_more(neighbour: Namespace, lookout: Lookout) -> None:
    def look() -> Network:
        seen = lookout.look(neighbour.cookie)
        assert seen is not None
        return seen

    assert lookout.look(neighbour.cookie) is None, "it was not admitted"
    assert not lookout.admit(neighbour.cookie + 1, neighbour.path)
    assert lookout.admit(neighbour.cookie, neighbour.path)
    seen = look()
    assert seen.loopback and seen.addresses[V4] and seen.addresses[V6]
    neighbour.ip("link", "set", "eth0", "down")
    seen = look()
    assert seen.loopback and seen.addresses[V4] is False and V6 not in seen.addresses
    neighbour.ip("link", "set", "eth0", "up")
    neighbour.ip("link", "set", "other", "down")
    assert look().addresses[V4] is False, "it has no carrier"
    neighbour.ip("addr", "del", "10.9.0.1/24", "dev", "eth0")
    assert V4 not in look().addresses
    neighbour.ip("link", "set", "lo", "down")
    assert not look().loopback


@needs_root
def test_many_links_and_addresses(neighbour: Namespace, lookout: Lookout) -> None:
    """More than the kernel tells at once."""
    lookout.admit(neighbour.cookie, neighbour.path)
    for number in range(60):
        neighbour.ip("link", "add", f"d{number}", "type", "veth", "peer", "name", f"e{number}")
        neighbour.ip("addr", "add", f"10.8.0.{number + 1}/32", "dev", f"d{number}")
    seen = lookout.look(neighbour.cookie)
    assert seen is not None
    assert {pack(f"10.8.0.{number + 1}") for number in range(60)} < set(seen.addresses)


@needs_root
def test_news_of_those_that_were_admitted(neighbour: Namespace, lookout: Lookout) -> None:
    if not lookout.hears:
        pytest.skip("CAP_NET_BROADCAST is missing")
    neighbour.ip("link", "set", "eth0", "down")
    assert lookout.hear() == set()
    lookout.admit(neighbour.cookie, neighbour.path)
    for change in (
        ("link", "set", "eth0", "up"),
        ("addr", "del", "10.9.0.1/24", "dev", "eth0"),
        ("addr", "add", "fd09::2/64", "dev", "lo", "nodad"),
        ("link", "del", "eth0"),
    ):
        lookout.hear()
        neighbour.ip(*change)
        assert select.select([lookout], [], [], 5.0)[0], change
        assert lookout.hear() == {neighbour.cookie}, change


@needs_root
def test_nobody_is_kept_alive(neighbour: Namespace, lookout: Lookout) -> None:
    """A namespace goes away when its last process ends, and so does its number."""
    lookout.admit(neighbour.cookie, neighbour.path)
    assert lookout.look(neighbour.cookie) is not None
    neighbour.end()
    deadline = time.monotonic() + 10
    while lookout.look(neighbour.cookie) is not None:
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.02)


@needs_root
def test_nothing_is_left_behind(lookout: Lookout) -> None:
    before, own = os.listdir("/proc/self/fd"), os.readlink("/proc/thread-self/ns/net")
    Lookout().close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert os.readlink("/proc/thread-self/ns/net") == own
