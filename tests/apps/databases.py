# SPDX-License-Identifier: Apache-2.0
"""Redis, alone and with a replica; PostgreSQL under pgbench; MariaDB; memcached."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from apps.case import Case, Failed, Outcome, find_program
from apps.stage import PROGRAMS, Running, Stage

REDIS_PORT, POSTGRES_PORT, MEMCACHED_PORT, MARIADB_PORT = 6379, 5432, 11211, 3306
REDIS_OPTIONS = (
    "--save",
    "",
    "--appendonly",
    "no",
    "--protected-mode",
    "no",
    "--enable-debug-command",
    "yes",
)
REDIS_VALUES = 20_000

CLIENTS = 8
SCALE = 2
ROWS = 100_000


# -- Redis ---------------------------------------------------------------------------------------------------


def _start_redis(stage: Stage, host: str, *options: str) -> Running:
    address = stage.address(host)
    running = stage.start(
        *("redis-server", "--bind", address, "--port", str(REDIS_PORT), *REDIS_OPTIONS),
        *("--dir", stage.place(f"redis-{host}"), *options),
        host=host,
    )
    stage.wait_listening(running, REDIS_PORT, host)
    return running


def _ask_redis(stage: Stage, host: str, *command: str) -> str:
    return stage.call("redis-cli", "-h", stage.address(host), "-p", str(REDIS_PORT), *command).strip()


def _count_benchmark(stage: Stage, host: str, tests: str, pipeline: int, number: int) -> dict[str, bool]:
    """Which of the tests answered all of `number` requests."""
    output = stage.call(
        *("redis-benchmark", "-h", stage.address(host), "-p", str(REDIS_PORT), "-t", tests, "-r", "1000"),
        *("-n", str(number), "-c", "20", "-P", str(pipeline), "-d", "300", "--csv"),
    )
    rows = [line.split(",") for line in output.splitlines()[1:]]
    return {row[0].strip('"').split()[0]: float(row[1].strip('"')) > 0 for row in rows}


def _run_redis(stage: Stage) -> Outcome:
    _start_redis(stage, "a")
    number = round(stage.seconds * 3000)
    tests = "ping,set,get,incr,lpush,rpop,sadd,hset,spop,zadd,lrange_100,mset"
    single = _count_benchmark(stage, "a", tests, 1, number)
    piped = _count_benchmark(stage, "a", tests, 16, number * 2)
    # Each INCR takes one of 1000 keys at random; together they say how many there were.
    get = "redis.call('get', string.format('counter:%012d', i))"
    script = f"local s = 0 for i = 0, 999 do s = s + ({get} or 0) end return s"
    facts = {
        "tests": single,
        "piped": piped,
        "increments": int(_ask_redis(stage, "a", "eval", script, "0")),
        "errors": _read_info(stage, "a", "total_error_replies"),
    }
    if facts["increments"] != number * 3:
        raise Failed(f"{facts['increments']} increments were done instead of {number * 3}")
    return Outcome(f"{len(single) + len(piped)} benchmarks, {number * 3} INCRs", facts)


def _read_info(stage: Stage, host: str, field: str) -> str:
    found = re.search(rf"^{field}:(.*)$", _ask_redis(stage, host, "info"), re.MULTILINE)
    return found[1].strip() if found else ""


def _wait(what: str, condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"not within {timeout:g} s: {what}")
        time.sleep(0.1)


def _wait_in_step(stage: Stage) -> None:
    """Return when the replica on b has all that the master on a has."""

    def is_in_step() -> bool:
        told = re.search(r"offset=(\d+)", _read_info(stage, "a", "slave0"))
        return (
            _read_info(stage, "b", "master_link_status") == "up"
            and told is not None
            and told[1] == _read_info(stage, "a", "master_repl_offset")
        )

    _wait("the replica is in step", is_in_step)


def _make_protocol() -> bytes:
    """SET commands with random values, the same each time, as redis-cli --pipe wants them."""
    chance = random.Random(6379)
    parts = []
    for number in range(REDIS_VALUES):
        value = chance.randbytes(chance.choice((10, 500, 3000)))
        key = b"value:%d" % number
        parts.append(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(key), key, len(value), value))
    return b"".join(parts)


def _run_redis_replica(stage: Stage) -> Outcome:
    _start_redis(stage, "a", "--repl-diskless-sync-delay", "0")
    told = stage.call(
        *("redis-cli", "-h", stage.address("a"), "-p", str(REDIS_PORT), "--pipe"), stdin=_make_protocol()
    )
    loaded = _ask_redis(stage, "a", "debug", "digest")
    replica = ("--replicaof", f"{stage.address('a')} {REDIS_PORT}")
    digests: list[tuple[str, ...]] = []
    running = _start_redis(stage, "b", *replica)
    _wait_in_step(stage)
    digests.append((loaded, _ask_redis(stage, "b", "debug", "digest")))
    number = round(stage.seconds * 4000)
    for pipeline in (1, 16):
        _count_benchmark(stage, "a", "set,incr,lpush,sadd,hset,zadd,mset", pipeline, number)
        _wait_in_step(stage)
        digests.append(tuple(_ask_redis(stage, host, "debug", "digest") for host in ("a", "b")))
    # Once more from nothing, while writes go on.
    stage.stop(running)
    (stage.directory / "redis-b").rename(stage.directory / "redis-b-before")
    _start_redis(stage, "b", *replica)
    _count_benchmark(stage, "a", "set,lpush,zadd", 4, number)
    _wait_in_step(stage)
    digests.append(tuple(_ask_redis(stage, host, "debug", "digest") for host in ("a", "b")))
    equal = [one == other for one, other in digests]
    return Outcome(
        f"{sum(equal)} of {len(equal)} digests equal",
        {
            "loaded": loaded,
            "errors while loading": re.findall(r"errors: \d+, replies: \d+", told),
            "replica equals master": equal,
            "full syncs": _read_info(stage, "a", "sync_full"),
        },
    )


# -- PostgreSQL ----------------------------------------------------------------------------------------------


def _find_postgresql() -> Path | None:
    """Where the server's programs are; the newest version's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if found:
        return found[-1].parent
    elsewhere = find_program("initdb")
    return Path(elsewhere).parent if elsewhere else None


def name_missing_postgresql() -> list[str]:
    return [] if _find_postgresql() else ["initdb (postgresql)"]


def start_postgresql(stage: Stage) -> tuple[Path, tuple[str, ...]]:
    """A server of its own on host a, that accepts connections; where its programs are, and options by which
    clients find it."""
    programs = _find_postgresql()
    assert programs is not None
    data = stage.directory / "postgresql"
    options = ("-U", "apps", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-locale")
    stage.call(programs / "initdb", "-D", data, *options)
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all 0.0.0.0/0 trust\n")
    address = stage.address("a")
    server = stage.start(
        *(programs / "postgres", "-D", data, "-h", address, "-p", str(POSTGRES_PORT)),
        *("-k", "", "-c", "fsync=off", "-c", "shared_buffers=32MB"),
        # Fast shutdown.
        stop_signal=signal.SIGINT,
    )
    stage.wait_listening(server, POSTGRES_PORT)
    to = ("-h", address, "-p", str(POSTGRES_PORT), "-U", "apps")
    _wait("PostgreSQL accepts connections", lambda: _accepts(stage, programs, to))
    return programs, to


def _run_postgresql(stage: Stage) -> Outcome:
    programs, to = start_postgresql(stage)

    def query(text: str) -> str:
        return stage.call("psql", *to, "-d", "postgres", "-AtXq", "-v", "ON_ERROR_STOP=1", "-c", text).strip()

    pgbench = programs / "pgbench" if (programs / "pgbench").exists() else Path("pgbench")
    stage.call(pgbench, *to, "-i", "-q", "-s", str(SCALE), "postgres")
    failed, done = [], 0
    for mode in ("simple", "prepared"):
        output = stage.call(
            *(pgbench, *to, "-M", mode, "-c", str(CLIENTS), "-j", "2", "-n"),
            *("-T", str(max(1, round(stage.seconds / 2))), "postgres"),
        )
        found = re.search(r"number of transactions actually processed: (\d+)", output)
        done += int(found[1]) if found else 0
        failed += re.findall(r"number of failed transactions: (\d+)", output)
    sums = query(
        "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches),"
        " (select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history),"
        " (select count(*) from pgbench_history)"
    ).split("|")
    # Much in either direction: rows out, in again, and compared.
    rows = f"select n, repeat(md5(n::text), 1 + n % 20) as t from generate_series(1, {ROWS}) n"
    query(f"create table wide as {rows}")
    query("create table back (like wide)")
    copied = stage.digest("psql", *to, "-d", "postgres", "-AtXqc", "copy wide to stdout")
    dump = stage.directory / "wide"
    stage.call("psql", *to, "-d", "postgres", "-AtXqc", f"\\copy wide to '{dump}'")
    stage.call("psql", *to, "-d", "postgres", "-AtXqc", f"\\copy back from '{dump}'")
    different = query("select count(*) from (select * from wide except select * from back) each")
    consistent = len(set(sums[:4])) == 1 and int(sums[4]) == done
    return Outcome(
        f"sums {'agree' if consistent else 'DIFFER'}, {failed.count('0')} of 2 loads",
        {
            "consistent": consistent,
            "answered": done > 0,
            "failed": failed,
            "copied": copied,
            "rows that came back changed": different,
        },
        {"transactions": done, "sums": sums},
    )


def _accepts(stage: Stage, programs: Path, to: tuple[str, ...]) -> bool:
    try:
        stage.call(programs / "pg_isready", *to)
    except Failed:
        return False
    return True


# -- MariaDB -------------------------------------------------------------------------------------------------


def start_mariadb(stage: Stage) -> tuple[str, ...]:
    """A server of its own on host a; options by which its clients find it."""
    data, address = stage.place("mariadb"), stage.address("a")
    stage.call(
        *("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db"),
        *("--auth-root-authentication-method=normal", "--skip-name-resolve"),
    )
    setup = stage.write(
        "setup.sql",
        "create database apps;\ncreate user apps identified by '';\ngrant all on *.* to apps;\n",
    )
    server = stage.start(
        *("mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={data}/socket"),
        *(
            f"--bind-address={address}",
            f"--port={MARIADB_PORT}",
            "--skip-name-resolve",
            f"--init-file={setup}",
        ),
        *("--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"),
        *("--innodb-log-file-size=16M", "--max-allowed-packet=64M"),
    )
    stage.wait_listening(server, MARIADB_PORT, timeout=30.0)
    return ("--no-defaults", f"--host={address}", f"--port={MARIADB_PORT}", "--user=apps")


def _run_mariadb(stage: Stage) -> Outcome:
    to = start_mariadb(stage)

    def query(text: str) -> str:
        return stage.call("mariadb", *to, "-BNr", "apps", "-e", text).strip()

    rows = f"select seq as n, repeat(md5(seq), 1 + seq % 20) as t from seq_1_to_{ROWS // 4}"
    query(f"create table wide (n int primary key) as {rows}")
    copied = stage.digest("mariadb", *to, "-BNrq", "apps", "-e", "select * from wide order by n")
    dump = stage.call("mariadb-dump", *to, "--skip-dump-date", "--skip-comments", "apps", "wide")
    query("create database back")
    stage.call("mariadb", *to, "back", stdin=dump.encode())
    different = query(
        "select (select count(*) from wide), (select count(*) from wide join back.wide b using (n, t))"
    ).split()
    number = round(stage.seconds * 500)
    insert = "insert into counter (n, t) values (1, repeat('x', 300))"
    stage.call(
        *("mariadb-slap", *to, "--create-schema=slap", f"--concurrency={CLIENTS}", "--no-drop"),
        "--create=create table counter (id int auto_increment primary key, n int, t text)",
        *(f"--query={insert}; select n from counter where id = 1", "--delimiter=;"),
        f"--number-of-queries={number * 2}",
    )
    counted = query("select count(*), sum(n) from slap.counter")
    by_php = json.loads(
        stage.call("php", PROGRAMS / "mysqli.php", stage.address("a"), str(MARIADB_PORT), "apps", "400")
    )
    return Outcome(
        f"{different[1]} of {different[0]} rows came back, {by_php['wrong']} wrong by PHP",
        {"copied": copied, "rows": different, "counted": counted, "php": by_php},
    )


# -- memcached -----------------------------------------------------------------------------------------------


def _run_memcached(stage: Stage) -> Outcome:
    address = stage.address("a")
    server = stage.start(
        "memcached", "-l", address, "-p", str(MEMCACHED_PORT), "-U", "0", "-m", "400", "-t", "2"
    )
    stage.wait_listening(server, MEMCACHED_PORT)
    rounds = str(round(stage.seconds * 150))
    program = ("/usr/bin/python3", "-I", PROGRAMS / "cache.py")
    counted = json.loads(stage.call(*program, address, str(MEMCACHED_PORT), str(CLIENTS), rounds))
    return Outcome(f"{counted['get']} values right, {counted['wrong']} wrong", counted)


CASES = (
    Case("redis-benchmark", _run_redis, ("redis-server", "redis-benchmark", "redis-cli")),
    Case("redis-replica", _run_redis_replica, ("redis-server", "redis-benchmark", "redis-cli")),
    Case("postgresql", _run_postgresql, ("psql",), find_missing=name_missing_postgresql),
    Case(
        "mariadb",
        _run_mariadb,
        ("mariadbd", "mariadb-install-db", "mariadb", "mariadb-dump", "mariadb-slap", "php"),
    ),
    Case("memcached", _run_memcached, ("memcached", "/usr/bin/python3")),
)
