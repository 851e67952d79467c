# SPDX-License-Identifier: Apache-2.0
"""The programs that `tests/apps/run --disturb` disturbs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from apps.databases import (
    MARIADB_PORT,
    POSTGRES_PORT,
    name_missing_postgresql,
    start_mariadb,
    start_postgresql,
)
from apps.disturb import GATE_PORT, PYTHON, SERVER_PORT, Scene, Subject
from apps.origin import start_nginx
from apps.stage import PROGRAMS, Running

FRONT_PORT = 7002
JARS = (Path("/usr/share/java/mariadb-java-client.jar"), Path("/usr/share/java/postgresql.jar"))
# With which a Java thread is woken that sleeps in a system call on a socket that another one closes:
# src/java.base/unix/native/libnio/ch/NativeThread.c of the JDK.
JAVA_SIGNAL = 62

PHP = """\
[global]
error_log = {directory}/php.log
[www]
listen = {address}:{port}
pm = static
pm.max_children = 1
"""

# Bodies are read while they come, so that what the program waits for is a request's rest.
FASTCGI = """
    upstream php {{ server {address}:{gate}; keepalive 1; }}
    server {{
        listen {address}:{front};
        location / {{
            fastcgi_pass php;
            fastcgi_keep_conn on;
            fastcgi_param SCRIPT_FILENAME {page};
            fastcgi_param REQUEST_METHOD $request_method;
            fastcgi_param SERVER_PROTOCOL $server_protocol;
        }}
    }}
"""

ORIGIN = """
    server {{
        listen {address}:{port};
        location / {{ return 200 {body}; }}
    }}
"""

VCL = """\
vcl 4.1;
backend origin {{ .host = "{address}"; .port = "{gate}"; }}
sub vcl_recv {{ return (pass); }}
"""


def _ask_mariadb(kind: str, scene: Scene) -> Running:
    start_mariadb(scene.stage)
    scene.open_gate(MARIADB_PORT, "client")
    return scene.start_asker(kind, GATE_PORT)


def _ask_postgresql(kind: str, scene: Scene) -> Running:
    start_postgresql(scene.stage)
    scene.open_gate(POSTGRES_PORT, "client")
    return scene.start_asker(kind, GATE_PORT)


def _start_java(scene: Scene, url: str) -> Running:
    stage = scene.stage
    classes = stage.shared / "query"
    if not classes.exists():
        stage.own_directory(classes)
        stage.call("javac", "-encoding", "UTF-8", "-d", classes, PROGRAMS / "Query.java", timeout=120)
    path = ":".join(map(str, (classes, *JARS)))
    return stage.start("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", path, "Query", url)


def _ask_mariadb_by_jdbc(scene: Scene) -> Running:
    start_mariadb(scene.stage)
    scene.open_gate(MARIADB_PORT, "client")
    return _start_java(scene, f"jdbc:mariadb://{scene.address}:{GATE_PORT}/apps?user=apps")


def _ask_postgresql_by_jdbc(scene: Scene) -> Running:
    start_postgresql(scene.stage)
    scene.open_gate(POSTGRES_PORT, "client")
    return _start_java(scene, f"jdbc:postgresql://{scene.address}:{GATE_PORT}/postgres?user=apps")


def _start_gunicorn(worker: str, scene: Scene) -> Running:
    scene.start_server(
        SERVER_PORT,
        *(*PYTHON, "-m", "gunicorn", "--chdir", PROGRAMS, "--bind", f"{scene.address}:{SERVER_PORT}"),
        *("--workers", "1", "--worker-class", worker, "--threads", "2" if worker == "gthread" else "1"),
        *("--timeout", "600", "--graceful-timeout", "2", "upload:application"),
    )
    scene.open_gate(SERVER_PORT, "server")
    return scene.start_asker("upload", GATE_PORT)


def _start_php(scene: Scene) -> Running:
    stage, address = scene.stage, scene.address
    page = stage.write("page.php", "<?php echo 'page';")
    settings = PHP.format(directory=stage.directory, address=address, port=SERVER_PORT)
    file = stage.write("php.conf", settings)
    scene.start_server(SERVER_PORT, *_find_php(), "--nodaemonize", "--fpm-config", file)
    scene.open_gate(SERVER_PORT, "server")
    servers = FASTCGI.format(address=address, gate=GATE_PORT, front=FRONT_PORT, page=page)
    start_nginx(stage, "front", servers, "a", FRONT_PORT)
    return scene.start_asker("http", FRONT_PORT)


def _start_varnish(scene: Scene) -> Running:
    stage, address = scene.stage, scene.address
    start_nginx(
        stage,
        "origin",
        ORIGIN.format(address=address, port=SERVER_PORT, body="0123456789" * 200),
        "a",
        SERVER_PORT,
    )
    scene.open_gate(SERVER_PORT, "client")
    file = stage.write("varnish.vcl", VCL.format(address=address, gate=GATE_PORT))
    scene.start_server(
        FRONT_PORT,
        *("varnishd", "-F", "-j", "none", "-a", f"{address}:{FRONT_PORT}", "-f", file),
        *("-n", stage.place("varnish"), "-s", "malloc,16m", "-p", "thread_pool_min=10"),
    )
    return scene.start_asker("http", FRONT_PORT)


def _start_socat(scene: Scene) -> Running:
    address = scene.address
    scene.start_server(SERVER_PORT, *PYTHON, PROGRAMS / "echo.py", "serve", address, str(SERVER_PORT))
    scene.open_gate(SERVER_PORT, "client")
    listen = f"TCP-LISTEN:{FRONT_PORT},bind={address},reuseaddr,fork"
    scene.start_server(FRONT_PORT, "socat", listen, f"TCP:{address}:{GATE_PORT}")
    return scene.start_asker("recv", FRONT_PORT)


def _ask_echo(scene: Scene) -> Running:
    address = scene.address
    scene.start_server(SERVER_PORT, *PYTHON, PROGRAMS / "echo.py", "serve", address, str(SERVER_PORT))
    scene.open_gate(SERVER_PORT, "client")
    return scene.start_asker("recv", GATE_PORT)


def _find_php() -> list[Path]:
    """The newest PHP-FPM; its command has the version in its name."""
    return sorted(Path("/usr/sbin").glob("php-fpm[0-9]*"))[-1:]


def _name_missing_php() -> list[str]:
    return [] if _find_php() else ["php-fpm"]


def _name_missing_jars() -> list[str]:
    return [str(jar) for jar in JARS if not jar.exists()]


def _needs(module: str) -> Callable[[], list[str]]:
    """A module of the distribution's own Python, whose packages go where any of its versions finds them."""
    place = Path("/usr/lib/python3/dist-packages", module)
    return lambda: [] if place.exists() else [f"python3-{module}"]


def _name_missing_jdbc() -> list[str]:
    return name_missing_postgresql() + _name_missing_jars()


MARIADB = ("mariadbd", "mariadb-install-db")

SUBJECTS = (
    Subject("python-recv", "Python's `socket.recv`", _ask_echo, ()),
    Subject(
        "mariadb", "`mariadb`, the client", partial(_ask_mariadb, "mariadb"), (*MARIADB, "mariadb"), signal=28
    ),
    Subject(
        "pymysql",
        "PyMySQL, no time limit",
        partial(_ask_mariadb, "pymysql"),
        MARIADB,
        find_missing=_needs("pymysql"),
    ),
    Subject(
        "jdbc-mariadb",
        "JDBC: MariaDB Connector/J",
        _ask_mariadb_by_jdbc,
        (*MARIADB, "java", "javac"),
        signal=JAVA_SIGNAL,
        find_missing=_name_missing_jars,
    ),
    Subject(
        "jdbc-postgresql",
        "JDBC: PostgreSQL",
        _ask_postgresql_by_jdbc,
        ("java", "javac"),
        signal=JAVA_SIGNAL,
        find_missing=_name_missing_jdbc,
    ),
    Subject(
        "psycopg",
        "psycopg",
        partial(_ask_postgresql, "psycopg"),
        (),
        find_missing=lambda: name_missing_postgresql() + _needs("psycopg")(),
    ),
    Subject(
        "psycopg2",
        "psycopg2",
        partial(_ask_postgresql, "psycopg2"),
        (),
        find_missing=lambda: name_missing_postgresql() + _needs("psycopg2")(),
    ),
    Subject(
        "gunicorn-sync",
        "gunicorn, sync, in a request",
        partial(_start_gunicorn, "sync"),
        (),
        find_missing=_needs("gunicorn"),
    ),
    Subject(
        "gunicorn-gthread",
        "gunicorn, gthread, in a request",
        partial(_start_gunicorn, "gthread"),
        (),
        find_missing=_needs("gunicorn"),
    ),
    Subject(
        "php-fpm",
        "PHP-FPM, in a request",
        _start_php,
        ("nginx",),
        # By which its master has it retire: `systemctl reload php8.2-fpm`.
        signal=signal.SIGQUIT,
        find_missing=_name_missing_php,
    ),
    Subject(
        "php-fpm-idle",
        "PHP-FPM, between requests",
        _start_php,
        ("nginx",),
        signal=signal.SIGQUIT,
        left=0,
        find_missing=_name_missing_php,
    ),
    Subject(
        "varnish",
        "Varnish, towards its origin, in a body",
        _start_varnish,
        ("varnishd", "nginx"),
        signal=0,
        left=1000,
    ),
    Subject("socat", "socat", _start_socat, ("socat",), signal=signal.SIGCHLD),
)
