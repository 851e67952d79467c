# SPDX-License-Identifier: Apache-2.0
"""A client that asks again and again, one question at a time, and writes a line for each: "= ok", or "= " and
what went wrong. After that it connects anew.

ask.py KIND ADDRESS PORT

KIND is the client: psycopg, psycopg2, pymysql or mariadb ask a database, http asks for a page, upload sends a
body in pieces and wants each back before the next, recv sends to an echo server.
"""

from __future__ import annotations

import http.client
import itertools
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

PAUSE = 0.005  # seconds
PIECE = 64  # bytes
UPLOAD = 1024  # bytes; see upload.py
LONGEST = 110  # characters of a complaint

numbers = itertools.count(1)


def ask_database(connection: object) -> Iterator[bool]:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for number in numbers:
        cursor.execute("select %s", (number,))
        yield int(cursor.fetchone()[0]) == number


def ask_psycopg(address: str, port: int) -> Iterator[bool]:
    import psycopg

    return ask_database(
        psycopg.connect(host=address, port=port, user="apps", dbname="postgres", autocommit=True)
    )


def ask_psycopg2(address: str, port: int) -> Iterator[bool]:
    import psycopg2

    connection = psycopg2.connect(host=address, port=port, user="apps", dbname="postgres")
    connection.autocommit = True
    return ask_database(connection)


def ask_pymysql(address: str, port: int) -> Iterator[bool]:
    import pymysql

    return ask_database(pymysql.connect(host=address, port=port, user="apps", database="apps"))


def ask_mariadb(address: str, port: int) -> Iterator[bool]:
    """The program of this name, which gets its statements through a pipe. It does not connect again then, so
    another one is started after a mistake."""
    to = ("--no-defaults", f"--host={address}", f"--port={port}", "--user=apps")
    with subprocess.Popen(
        ["mariadb", *to, "-BNr", "--unbuffered", "--force", "apps"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as child:
        assert child.stdin and child.stdout
        try:
            for number in numbers:
                child.stdin.write(f"select {number};\n")
                answer = ""
                # Before its complaint comes the statement, between lines.
                while not answer.startswith(("ERROR", str(number))):
                    line = child.stdout.readline()
                    if not line:
                        raise RuntimeError(f"it ended: {answer}")
                    answer = line.strip()
                if answer != str(number):
                    raise RuntimeError(re.sub(" at line [0-9]+", "", answer))
                yield True
        finally:
            child.kill()


def ask_http(address: str, port: int) -> Iterator[bool]:
    connection = http.client.HTTPConnection(address, port)
    for _ in numbers:
        connection.request("GET", "/page.php")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}")
        yield True


def ask_upload(address: str, port: int) -> Iterator[bool]:
    connection = socket.create_connection((address, port))
    head = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    for number in numbers:
        data = b"%0*d" % (UPLOAD, number)
        connection.sendall(head + b"%x\r\n%s\r\n" % (len(data), data))
        head, back = b"", b""
        while data not in back:
            came = connection.recv(4096)
            if not came or b"500 Internal" in came:
                raise RuntimeError("HTTP 500" if came else "the server closed the connection")
            back += came
        yield True


def ask_recv(address: str, port: int) -> Iterator[bool]:
    connection = socket.create_connection((address, port))
    for number in numbers:
        data = b"%0*d" % (PIECE, number)
        connection.sendall(data)
        back = b""
        while len(back) < len(data):
            came = connection.recv(4096)
            if not came:
                raise RuntimeError("the server closed the connection")
            back += came
        yield back == data


def tell(what: str) -> None:
    print(f"= {what[:LONGEST]}", flush=True)


def ask(kind: Callable[[str, int], Iterator[bool]], address: str, port: int) -> None:
    answers: Iterator[bool] | None = None
    while True:
        time.sleep(PAUSE)
        try:
            if answers is None:
                answers = kind(address, port)
            tell("ok" if next(answers) else "a wrong answer")
        except RuntimeError as complaint:  # ours
            tell(str(complaint))
            answers = None
        except Exception as complaint:
            words = " ".join(str(complaint).split())
            tell(f"{type(complaint).__name__}: {words}")
            answers = None


# As in any program that has something to do when a signal comes.
signal.signal(signal.SIGUSR1, lambda *_: None)
ask(globals()[f"ask_{sys.argv[1]}"], sys.argv[2], int(sys.argv[3]))
