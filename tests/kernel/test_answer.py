# SPDX-License-Identifier: Apache-2.0
"""FIONREAD where splicer answers it (bpf/answer.c): right for every reader of a spliced socket, and for as
long as there is one.

Where it does not answer, because the kernel counts everything by itself or refuses the programs, the tests of
the answers say so and why, and those of the refusal run.
"""

from __future__ import annotations

import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.connection import count_waiting
from support.daemon import Daemon, call, wait_until
from support.host import Host
from support.lab import Lab
from support.loans import borrow
from support.nginx import running_nginx
from support.players import HABITS, JUGGLER, Pair, stopped
from support.tiers import thorough

from splicer.kernel import answer, libbpf, probes

UNSUPPORTED = 4
SERVICE = 7701  # a port without a policy of its own
MESSAGES = 12  # of each of three connections, for readers of what is said to be there
BODIES = {"20k": 20_000, "70k": 70_000, "300k": 300_000, "1m": 1_000_000}
NGINX = """
    sendfile on;
    server {{ listen {address}:{origin}; root {files}; }}
    upstream origin {{ server {address}:{origin}; keepalive 8; keepalive_requests 1000000; }}
    server {{
        listen {address}:{proxy};
        proxy_max_temp_file_size 0;
        location / {{ proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
"""
ORIGIN, PROXY = 7711, 7712
# One connection, many requests; a body that does not come is an error after ten seconds.
CLIENT = """
import http.client, sys
address, path = sys.argv[1:3]
port, size, count = map(int, sys.argv[3:])
connection = http.client.HTTPConnection(address, port, timeout=10)
for number in range(count):
    connection.request("GET", path)
    body = connection.getresponse().read()
    assert body == b"0123456789" * (size // 10), f"request {number}: {len(body)} bytes, or others"
print(count)
"""


def read_reason(daemon: Daemon) -> str:
    """Why splicer does not answer, or an empty text."""
    status = daemon.status()
    if status["fionread"] == "kernel":
        return "the kernel counts both kinds of bytes by itself (class C)"
    if status["fionread"] == "splicer":
        return ""
    return (
        "the kernel does not let splicer answer: "
        + daemon.log.read_text().partition('"why": "')[2].split('"')[0]
    )


@pytest.fixture
def answered(shared_host: Host) -> None:
    """A kernel on which there is nothing to see is one that said so to the daemon. Programs that load and do
    not answer right are a failure, never a reason to pass over a test."""
    reason = read_reason(shared_host.daemon)
    if not reason:
        return
    assert "is still of class" not in reason, reason
    pytest.skip(f"does not apply on this kernel: {reason}")


def hot_pairs(host: Host, lab: Lab, count: int = 3, *, program: Path = HABITS) -> list[Pair]:
    """Spliced connections between one client and one server."""
    client, server = host.peer(lab, "a", program=program), host.peer(lab, "b", program=program)
    pairs = [host.connect(client, server, lab.address("b")) for _ in range(count)]
    for pair in pairs:
        host.make_hot(pair)
    return pairs


def count_redirected(host: Host, pair: Pair) -> int:
    return int(host.flow(pair)["redirected_messages"])


# what the class is, and who answers


def test_status_says_what_is_attached(host: Host) -> None:
    """Programs that answer are attached if and only if the status says that splicer answers. By itself the
    kernel is of the class that the status names; with the answers, sockets of splicer's are of class C."""
    status = host.daemon.status()
    links = {each.name for each in (host.pin_dir / "links").iterdir()}
    attached = links & set(answer.NAMES)
    assert attached == (set(answer.NAMES) if status["fionread"] == "splicer" else set())
    assert probes.find_class().name == status["kernel_class"]
    assert (status["fionread"] == "kernel") == (status["kernel_class"] == "C")
    if attached:
        ends = libbpf.Map.open(str(host.pin_dir / "maps/ends"))
        try:
            assert probes.find_class(ends).name == "C"
        finally:
            ends.close()
    log = host.daemon.log.read_text()
    assert ('"fionread_answered"' in log) == bool(attached)
    assert ('"fionread_not_answered"' in log) == (status["fionread"] == "nobody")


def test_off_is_off() -> None:
    """With --fionread off nothing is attached. Class A is refused then, and nothing stays behind."""
    with Host("--fionread", "off", start=False) as host:
        if probes.find_class().name != "A":
            status = host.start().status()
            assert status["fionread"] in ("nobody", "kernel")
            assert not [each for each in (host.pin_dir / "links").iterdir() if each.name in answer.NAMES]
            return
        places = (f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}")
        done = call("run", f"--cgroup={host.cgroup.path}", *places, "--docker=off", "--fionread=off")
        assert done.code == UNSUPPORTED, done
        message, hint = done.stderr.splitlines()[-2:]
        assert "class A" in message and "fionread = off" in message
        assert "--fionread auto" in hint
        assert host.bpffs.pins() == []


@pytest.mark.usefixtures("answered")
def test_another_setting_is_another_build(lab: Lab) -> None:
    """Going from `off` to `auto` and back, where the class allows it, replaces the programs in good order."""
    if probes.find_class().name == "A":
        pytest.skip("does not apply on this kernel: class A is refused with --fionread off (test_off_is_off)")
    with Host() as host:
        pair = host.hot_pair(lab)
        for setting in ("off", "auto"):
            host.daemon.kill()
            host.daemon.ready_file.unlink()
            status = host.start("--fionread", setting).status()
            assert status["fionread"] == ("splicer" if setting == "auto" else "nobody")
            assert '"generation_replaced"' in host.daemon.log.read_text()
            pair.pingpong(50)
        pair.verify()


# readers that read what FIONREAD says


@pytest.mark.parametrize("edge", [False, True], ids=["poll", "edge"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("size", [1, 500, pytest.param(20_000, marks=thorough("between the two")), 200_000])
@pytest.mark.usefixtures("answered")
def test_reader_of_what_is_said(host: Host, lab: Lab, edge: bool, late: bool, size: int) -> None:
    """It sleeps in epoll, asks how much there is, and reads so much: it gets everything, whether it asked
    before the bytes came or comes when they wait. All of it was redirected."""
    pairs = hot_pairs(host, lab)
    before = [count_redirected(host, pair) for pair in pairs]
    reader, conns = pairs[0].server.peer, [pair.server.conn for pair in pairs]

    def send() -> None:
        for _ in range(MESSAGES):
            for pair in pairs:
                pair.client.send(size)

    if late:
        send()
        reader.call("recv_told", conns=conns, count=MESSAGES * size, edge=edge)
    else:
        reader.begin("recv_told", conns=conns, count=MESSAGES * size, edge=edge)
        assert reader.is_waiting(0.1)
        send()
        reader.finish()
    for pair, earlier in zip(pairs, before, strict=True):
        pair.verify()
        if size < 200_000:  # more than what may be unread, if the reader gets no CPU meanwhile
            assert count_redirected(host, pair) >= earlier + MESSAGES


@pytest.mark.usefixtures("answered")
def test_talk_is_never_denied(lab: Lab) -> None:
    """Both ends read a byte and then what FIONREAD says, large messages, while their connections are being
    spliced: never is it 0 while something waits. (Java's available(); without the answers it may be.)"""
    with Host() as host:
        client, server = (host.peer(lab, place, program=HABITS) for place in "ab")
        for _ in range(4):
            pairs = [host.connect(client, server, lab.address("b")) for _ in range(6)]
            conns = [pair.client.conn for pair in pairs]
            client.begin("talk", conns=conns, rounds=6, size=100_000, opens=True, timeout=60.0)
            answers = [pair.server.conn for pair in pairs]
            server.begin("talk", conns=answers, rounds=6, size=100_000, opens=False, timeout=60.0)
            assert [each["denials"] for each in (client.finish(), server.finish())] == [0, 0]
            for pair in pairs:
                pair.verify()
                pair.close()
        assert host.daemon.totals()["spliced"] > 0


# what it counts


@pytest.mark.usefixtures("answered")
def test_both_kinds_of_bytes_and_the_end(host: Host, lab: Lab) -> None:
    """Redirected bytes; bytes from TCP behind them, since an option has begun the way back; the FIN, which is
    no byte. After each read it is what is left."""
    [pair] = hot_pairs(host, lab, 1, program=JUGGLER)
    for size in (100, 5000, 1):
        pair.client.send(size)
    assert pair.server.wait_fionread(count=5101) == 5101
    assert pair.server.recv(50) == 50
    assert pair.server.fionread() == 5051
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 7)
    wait_until("it goes back", lambda: host.flow(pair)["state"] == "draining")
    before = pair.server.count_through_tcp()
    pair.client.send(3000)
    assert pair.server.wait_fionread(count=8051) == 8051
    assert pair.server.count_through_tcp() == before + 3000
    pair.client.shutdown(how=socket.SHUT_WR)
    assert "RDHUP" in pair.server.wait_events(events=["RDHUP"])
    assert pair.server.fionread() == 8051
    assert pair.server.recv(8051) == 8051
    assert pair.server.fionread() == 0
    assert pair.server.expect_eof()
    pair.verify()


@pytest.mark.usefixtures("answered")
def test_bytes_from_tcp_at_an_end_that_is_in(lab: Lab) -> None:
    """No daemon is there to take the end out, and all that was redirected is read: what TCP brings counts."""
    with Host() as host:
        [pair] = hot_pairs(host, lab, 1)
        pair.client.send(10)
        assert pair.server.wait_fionread(count=10) == 10
        host.daemon.kill()
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 7)
        assert pair.server.recv(10) == 10
        assert host.count_spliced() == 2
        for total in (300, 600):
            pair.client.send(300)
            assert pair.server.wait_fionread(count=total) == total
        pair.client.shutdown(how=socket.SHUT_WR)
        assert "RDHUP" in pair.server.wait_events(events=["RDHUP"])
        assert pair.server.fionread() == 600
        assert pair.server.recv(600) == 600
        assert pair.server.fionread() == 0
        host.daemon.ready_file.unlink()
        host.start()
        pair.verify()


@pytest.mark.usefixtures("answered")
def test_many_messages(host: Host, lab: Lab) -> None:
    """As many as may be unread, and no byte is left out."""
    [pair] = hot_pairs(host, lab, 1)
    for _ in range(1000):
        pair.client.send(3)
    assert pair.server.wait_fionread(count=3000) == 3000
    assert pair.server.recv(1000) == 1000
    assert pair.server.fionread() == 2000
    assert pair.server.recv(2000) == 2000
    pair.verify()


def test_sockets_of_others_are_left_alone(host: Host, lab: Lab) -> None:
    """A datagram socket, one that is not connected, plain TCP: the kernel's answer. So it is for what others
    have put into a sockmap of theirs: see test_status_says_what_is_attached."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        for size in (10, 20):
            sender.sendto(bytes(size), receiver.getsockname())
        assert count_waiting(receiver) == 10
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(OSError):
        count_waiting(listener)
    pair = host.pair(lab)
    pair.client.send(123)
    assert pair.server.wait_fionread(count=123) == 123


ASK_AS_32_BIT = """
import ctypes, mmap, os, struct, sys
# push rbx; mov eax, 54 (ioctl); mov ebx, edi; mov ecx, esi; int 0x80; pop rbx; ret. rdx is in its place.
code = bytes.fromhex("53b83600000089fb89f1cd805bc3")
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
page = libc.mmap(None, 4096, 7, 0x62, -1, 0)  # PRIVATE | ANONYMOUS | 32BIT
ctypes.memmove(page, code, len(code))
ask = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_uint64)(page)
done = ask(int(sys.argv[1]), 0x541B, page + 2048)
print(done, ctypes.c_int.from_address(page + 2048).value)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="does not apply on this kernel: not x86-64")
@pytest.mark.usefixtures("answered")
def test_32_bit_caller(host: Host, lab: Lab) -> None:
    """By the entry for 32-bit programs, which goes another way through the kernel."""
    [pair] = hot_pairs(host, lab, 1, program=JUGGLER)
    pair.client.send(700)
    assert pair.server.wait_fionread(count=700) == 700
    with borrow(pair.server.peer.pid, pair.server.fileno()) as sock:
        command = [sys.executable, "-c", ASK_AS_32_BIT, str(sock.fileno())]
        done = subprocess.run(command, pass_fds=[sock.fileno()], capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGSEGV:
        pytest.skip("does not apply on this kernel: it runs no 32-bit programs (IA32_EMULATION)")
    assert done.stdout.split() == ["0", "700"], done
    assert pair.server.recv(700) == 700
    pair.verify()


# for how long


@contextmanager
def _sending(pairs: list[Pair], size: int) -> Iterator[Callable[[], None]]:
    """A function that sends one message on each connection; the reader must get all of them at the end."""
    reader, sent = pairs[0].server.peer, 0
    total = 400

    def send() -> None:
        nonlocal sent
        for pair in pairs:
            pair.client.send(size)
        sent += 1

    conns = [pair.server.conn for pair in pairs]
    # Patient enough for a compiler in emulation.
    reader.begin("recv_told", conns=conns, count=total * size, edge=True, patience=400.0)
    yield send
    while sent < total:
        send()
    reader.finish(30.0)
    for pair in pairs:
        pair.verify()


@pytest.mark.usefixtures("answered")
def test_killed_and_taken_over_under_a_reader(lab: Lab) -> None:
    """An edge-triggered reader of what FIONREAD says misses nothing while the daemon is killed, is away, and
    the next one takes over."""
    with Host() as host:
        pairs = hot_pairs(host, lab)
        with _sending(pairs, 300) as send:
            for _ in range(3):
                for _ in range(30):
                    send()
                host.daemon.kill()
                for _ in range(30):
                    send()
                    time.sleep(0.005)
                host.daemon.ready_file.unlink()
                host.start()
                assert host.is_answered
                assert '"generation_taken_over"' in host.daemon.log.read_text()


@pytest.mark.usefixtures("answered")
def test_upgraded_under_a_reader(lab: Lab) -> None:
    """The same, with another build: the old one's programs answer until its last end is out."""
    with Host() as host:
        pairs = hot_pairs(host, lab)
        with _sending(pairs, 300) as send:
            for _ in range(60):
                send()
            host.daemon.kill()
            host.daemon.ready_file.unlink()
            host.start("--max-connections", "4096")
            assert '"generation_replaced"' in host.daemon.log.read_text()


@pytest.mark.usefixtures("answered")
def test_ends_that_are_left_keep_their_answer(lab: Lab) -> None:
    """A reader takes nothing while splicer stops, so its end stays spliced. FIONREAD is right for what waits,
    and for what is redirected when splicer has gone, for an edge-triggered reader as well. A start, a stop
    and an unload leave that alone; the first one after the sockets are closed takes it away."""
    with Host("--stop-timeout", "1") as host:
        pairs = hot_pairs(host, lab)
        server, conns = pairs[0].server.peer, [pair.server.conn for pair in pairs]
        for pair in pairs:
            pair.client.send(100)
            assert pair.server.wait_fionread(count=100) == 100
        with stopped(server):
            assert host.daemon.stop() == 0
        assert '"unread_connections": 3' in host.daemon.tail()
        assert [each.name for each in host.pin_dir.iterdir()] == ["left-1"]
        assert f"FIONREAD is answered for {2 * len(pairs)} sockets" in host.unload()
        host.start()
        assert sorted(each.name for each in host.pin_dir.glob("left-*")) == ["left-1"]
        assert host.daemon.stop() == 0
        assert [each.name for each in host.pin_dir.iterdir()] == ["left-1"]

        server.begin("recv_told", conns=conns, count=100 + 40 * 300, edge=True)
        for _ in range(40):
            for pair in pairs:
                pair.client.send(300)
            time.sleep(0.002)
        server.finish()
        for pair in pairs:
            pair.client.send(55)
            assert pair.server.wait_fionread(count=55) == 55
            pair.server.recv(55)
            pair.verify()
        host.stop_peers()
        assert "left-1" in host.unload()
        assert host.bpffs.pins() == []


# nginx


@pytest.fixture
def nginx(host: Host, lab: Lab, tmp_path: Path) -> Iterator[str]:
    """The address of an nginx that is an origin of BODIES, and a proxy in front of that."""
    files = tmp_path / "files"
    files.mkdir()
    for name, size in BODIES.items():
        (files / name).write_bytes(b"0123456789" * (size // 10))
    address = lab.address("b")
    servers = NGINX.format(address=address, files=files, origin=ORIGIN, proxy=PROXY)
    with running_nginx(host, lab, "b", PROXY, tmp_path / "nginx", servers):
        yield address


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.usefixtures("answered")
def test_nginx_proxy(host: Host, lab: Lab, nginx: str, body: str) -> None:
    """Bodies of every size come through a proxy on kept connections, which are spliced on both sides of it.
    nginx reads what FIONREAD says."""
    size, count = BODIES[body], 40 if BODIES[body] < 200_000 else 20
    arguments = [nginx, f"/{body}", str(PROXY), str(size), str(count)]
    before = host.daemon.totals()["redirected_bytes"]
    with ExitStack() as stack:
        clients = [
            stack.enter_context(host.running(lab, "a", [sys.executable, "-c", CLIENT, *arguments]))
            for _ in range(2)
        ]
        said = [client.communicate(timeout=80)[0] for client in clients]
    assert said == [f"{count}\n"] * 2
    redirected = host.daemon.totals()["redirected_bytes"] - before
    # Large bodies are streams, and go back to TCP for a while: some of their bytes come either way.
    assert redirected > (count * size if size < 200_000 else 0)
