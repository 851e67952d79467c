# SPDX-License-Identifier: Apache-2.0
"""Fills the databases that page.php and app.py ask."""

from __future__ import annotations

import json
import os

import MySQLdb
import psycopg
import redis

PEOPLE = 2000
MARIADB = (
    "create table articles (id int primary key, topic int, title text, body text, key (topic))",
    "insert into articles select seq, seq % 40, concat('Article ', md5(seq)), "
    " repeat(md5(seq), 30 + seq % 100) from seq_1_to_2000",
    "create table comments (id int primary key, article int, author text, said text, key (article))",
    "insert into comments select seq, 1 + seq % 2000, md5(seq), "
    " repeat(md5(-seq), 1 + seq % 8) from seq_1_to_40000",
    "create table users (id int primary key, name text, mail text, settings text)",
    "insert into users select seq, md5(seq), concat(md5(seq), '@example.org'), repeat(md5(seq), 8)"
    " from seq_1_to_2000",
    "create table carts (id int primary key, user int, item text, amount int, key (user))",
    "insert into carts select seq, 1 + seq % 2000, repeat(md5(seq), 2), seq % 7 from seq_1_to_16000",
)
POSTGRESQL = (
    "create table customers (id int primary key, name text, mail text, notes text, visits int)",
    "insert into customers select n, md5(n::text), md5(n::text) || '@example.org', "
    " repeat(md5(n::text), 10), 0 from generate_series(1, 2000) n",
    "create table products (id int primary key, name text, price numeric, description text)",
    "insert into products select n, md5(n::text), n * 1.25, repeat(md5(n::text), 8 + n % 8)"
    " from generate_series(1, 500) n",
    "create table orders (id int primary key, customer int, product int, amount int, made timestamptz,"
    " note text)",
    "insert into orders select n, 1 + n % 2000, 1 + n % 500, n % 9, now(), repeat(md5(n::text), 2)"
    " from generate_series(1, 50000) n",
    "create index on orders (customer)",
    "analyze",
)


def main() -> None:
    mariadb = MySQLdb.connect(
        host=os.environ["MARIADB"], user="stack", passwd="stack", db="stack", autocommit=True
    )
    for statement in MARIADB:
        mariadb.cursor().execute(statement)
    host = os.environ["POSTGRESQL"]
    with psycopg.connect(f"host={host} user=stack dbname=postgres", autocommit=True) as postgresql:
        for statement in POSTGRESQL:
            postgresql.execute(statement)
    cache = redis.Redis(host=os.environ["REDIS"])
    for number in range(1, PEOPLE + 1):
        session = {"name": f"Person {number}", "token": "0123456789abcdef" * 4, "seen": list(range(90))}
        cache.set(f"session:{number}", json.dumps(session))


main()
