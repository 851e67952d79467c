# SPDX-License-Identifier: Apache-2.0
"""A WSGI application with a pool of connections to each of PostgreSQL, MariaDB and Redis. The environment
names them, and the driver for MariaDB."""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import os
import queue
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs

import psycopg_pool
import redis

POOL = int(os.environ["POOL"])
CUSTOMER = "select * from customers where id = %s"
ORDERED = "select o.*, p.name, p.price from orders o join products p on p.id = o.product"
ORDERS = f"{ORDERED} where o.customer = %s"
OFFERS = "select id, name, price, description from products where id between %s and %s"
LIST = f"{ORDERED} where o.id between %s and %s"
TEASERS = "select id, title, left(body, 400) from articles where topic = %s limit 8"


class Drivers:
    """Connections of a driver that has no pool of its own."""

    def __init__(self, name: str) -> None:
        driver = importlib.import_module(name)
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(POOL):
            connection = driver.connect(
                host=os.environ["MARIADB"], user="stack", passwd="stack", db="stack", autocommit=True
            )
            self._idle.put(connection)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        connection = self._idle.get()
        try:
            yield connection
        finally:
            self._idle.put(connection)


postgresql = psycopg_pool.ConnectionPool(
    f"host={os.environ['POSTGRESQL']} user=stack dbname=postgres", min_size=POOL, max_size=POOL
)
mariadb = Drivers(os.environ["DRIVER"])
cache = redis.Redis(
    connection_pool=redis.BlockingConnectionPool(host=os.environ["REDIS"], max_connections=POOL)
)


def render(rows: Iterable[Sequence[Any]]) -> str:
    lines = ("<li>" + html.escape(", ".join(map(str, row))) + "</li>" for row in rows)
    return "<ul>\n" + "\n".join(lines) + "\n</ul>\n"


def make_page(number: int) -> str:
    session = json.loads(cache.get(f"session:{number}") or "{}")
    fragment: bytes | None = cache.get(f"app:{number}")
    with postgresql.connection() as connection:
        customer = connection.execute(CUSTOMER, (number,)).fetchall()
        orders = connection.execute(ORDERS, (number,)).fetchall()
        connection.execute("update customers set visits = visits + 1 where id = %s", (number,))
        # Three in ten fragments have expired.
        if fragment is None or random.randint(1, 10) <= 3:
            offers = connection.execute(OFFERS, (number % 480 + 1, number % 480 + 10)).fetchall()
            with mariadb.connection() as other:
                cursor = other.cursor()
                cursor.execute(TEASERS, (number % 40,))
                teasers = cursor.fetchall()
                cursor.close()
            fragment = (render(offers) + render(teasers)).encode()
            cache.setex(f"app:{number}", 600, fragment)
    cache.incr(f"visits:{number}")
    return (
        f"<h1>{html.escape(session['name'])}</h1>\n" + fragment.decode() + render(customer) + render(orders)
    )


def make_list(number: int) -> str:
    with postgresql.connection() as connection:
        rows = connection.execute(LIST, (number, number + 299)).fetchall()
    return json.dumps(rows, default=str)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    number = int(parse_qs(environ["QUERY_STRING"])["id"][0])
    kind = "json" if environ["PATH_INFO"] == "/app/list" else "html"
    body = (make_list(number) if kind == "json" else make_page(number)).encode()
    start_response("200 OK", [("Content-Type", f"text/{kind}"), ("Content-Length", str(len(body)))])
    return [body]
