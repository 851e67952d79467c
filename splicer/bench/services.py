# SPDX-License-Identifier: Apache-2.0
"""A stack of programs as a host with containers has it: each in a network namespace and a cgroup of its own,
with pools of connections between them. The pages that they make are in pages/."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from splicer.bench.testbed import Namespace, Testbed, TestbedError

PAGES = Path(__file__).resolve().parent / "pages"
# The distribution's, to which the packages of the clients belong.
PYTHON = "/usr/bin/python3"
PATIENCE = 30.0  # seconds
WORKERS = 2


@dataclass(frozen=True)
class Service:
    """A program that others connect to; its name is that of its cgroup as well."""

    name: str
    address: str
    port: int


NGINX = Service("nginx", "10.77.0.10", 8080)
PHP = Service("php-fpm", "10.77.0.11", 9000)
PYTHON_APP = Service("gunicorn", "10.77.0.12", 8000)
MARIADB = Service("mariadb", "10.77.0.13", 3306)
REDIS = Service("redis", "10.77.0.14", 6379)
POSTGRESQL = Service("postgresql", "10.77.0.15", 5432)
SERVICES = (NGINX, PHP, PYTHON_APP, MARIADB, REDIS, POSTGRESQL)
# Drivers for MariaDB that the Python application can use, by the names of their modules.
DRIVERS = {"mysqlclient": "MySQLdb", "pymysql": "pymysql"}

# Of the Python application; PyMySQL says that it is another.
CLIENTS = {"psycopg": "psycopg", "redis-py": "redis"}

NGINX_CONF = """\
daemon off;
user root;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    keepalive_requests 1000000000;
    upstream php {{ server {php}; keepalive {connections}; }}
    upstream app {{ server {app}; keepalive {connections}; }}
    server {{
        listen {own} backlog=4096;
        location /php/ {{
            fastcgi_pass php;
            fastcgi_keep_conn on;
            fastcgi_param SCRIPT_FILENAME {pages}/page.php;
            fastcgi_param REQUEST_METHOD $request_method;
            fastcgi_param QUERY_STRING $query_string;
            fastcgi_param REQUEST_URI $request_uri;
            fastcgi_param SERVER_PROTOCOL $server_protocol;
            fastcgi_param REDIS {redis};
            fastcgi_param MARIADB {mariadb};
        }}
        location /app/ {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
        }}
        location = /served {{ stub_status; }}
    }}
}}
"""

PHP_CONF = """\
[global]
error_log = /proc/self/fd/2
[www]
listen = {own}
pm = static
pm.max_children = {connections}
"""

MARIADB_INIT = """\
create database stack;
create user stack@'%' identified by 'stack';
grant all on stack.* to stack@'%';
"""


class Services:
    """The stack, until its context is left. nginx has so many `connections` to each of the others at most,
    and there are as many processes of PHP. Each process of the Python application has a pool of half as many
    to each database."""

    def __init__(self, bed: Testbed, connections: int, driver: str, python: str = PYTHON) -> None:
        """`python` runs the application, with the clients that it has."""
        self._bed = bed
        self._python = python
        self._connections = connections
        self._driver = DRIVERS[driver]
        self._user = pwd.getpwnam("nobody")
        self._places: dict[Service, Path] = {}
        self.namespaces: dict[Service, Namespace] = {}
        self.pids: dict[Service, int] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Raises TestbedError when one of them does not start."""
        # The programs are no longer root when they look for their files here.
        self._bed.directory.chmod(0o711)
        self._pages = self._bed.directory / "pages"
        shutil.copytree(PAGES, self._pages)
        for service in SERVICES:
            self.namespaces[service] = self._bed.add_host(service.name, service.address)
            place = self._places[service] = self._bed.directory / service.name
            place.mkdir()
            shutil.chown(place, self._user.pw_uid, self._user.pw_gid)
        with contextlib.ExitStack() as stack:
            for service, command in (
                (REDIS, self._prepare_redis()),
                (MARIADB, self._prepare_mariadb()),
                (POSTGRESQL, self._prepare_postgresql()),
            ):
                stack.enter_context(self._running(service, command))
            self._bed.run(self._as_nobody(PYTHON, "-I", self._pages / "seed.py"), self.namespaces[PYTHON_APP])
            for service, command in (
                (PHP, self._prepare_php()),
                (PYTHON_APP, self._prepare_python()),
                (NGINX, self._prepare_nginx()),
            ):
                stack.enter_context(self._running(service, command))
            yield

    @contextlib.contextmanager
    def _running(self, service: Service, command: Sequence[str]) -> Iterator[None]:
        log = self._bed.directory / f"{service.name}.log"
        with log.open("wb") as output:
            # PHP opens it anew.
            os.fchown(output.fileno(), self._user.pw_uid, self._user.pw_gid)
            child = self._bed.start(
                command, self.namespaces[service], stdout=output, stderr=output, group=service.name
            )
        self.pids[service] = child.pid
        try:
            self._wait_listening(service, child, log)
            yield
        finally:
            self._bed.stop(child)

    def _wait_listening(self, service: Service, child: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._listens(service):
            if child.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()[-8:]
                raise TestbedError(f"{service.name} does not start: " + "\n".join(said))
            time.sleep(0.05)

    def _listens(self, service: Service) -> bool:
        with self.namespaces[service].entered(), socket.socket() as probe:
            return probe.connect_ex((service.address, service.port)) == 0

    def _as_nobody(self, *command: str | Path) -> list[str]:
        ids = [f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups"]
        environment = {
            "HOME": self._bed.directory,
            "PYTHONDONTWRITEBYTECODE": "1",
            "REDIS": REDIS.address,
            "MARIADB": MARIADB.address,
            "POSTGRESQL": POSTGRESQL.address,
            "DRIVER": self._driver,
            "POOL": str(max(self._connections // WORKERS, 1)),
        }
        variables = (f"{name}={value}" for name, value in environment.items())
        return ["setpriv", *ids, "env", f"--chdir={self._bed.directory}", *variables, *map(str, command)]

    # -- one by one ------------------------------------------------------------------------------------------

    def _prepare_redis(self) -> list[str]:
        return self._as_nobody(
            *("redis-server", "--bind", REDIS.address, "--port", str(REDIS.port), "--protected-mode", "no"),
            *("--save", "", "--appendonly", "no", "--dir", self._places[REDIS]),
        )

    def _prepare_mariadb(self) -> list[str]:
        place = self._places[MARIADB]
        data, init = place / "data", self._bed.directory / "mariadb.sql"
        init.write_text(MARIADB_INIT)
        install = ("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db")
        self._bed.run(
            self._as_nobody(*install, "--auth-root-authentication-method=normal"), self.namespaces[MARIADB]
        )
        return self._as_nobody(
            *("mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={place / 'socket'}"),
            *(f"--pid-file={place / 'pid'}", f"--bind-address={MARIADB.address}", f"--port={MARIADB.port}"),
            *("--skip-name-resolve", f"--init-file={init}", "--innodb-flush-log-at-trx-commit=0"),
            f"--max-connections={8 * self._connections + 32}",
        )

    def _prepare_postgresql(self) -> list[str]:
        data = self._places[POSTGRESQL] / "data"
        programs = find_postgresql()
        options = ("-U", "stack", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-locale")
        self._bed.run(self._as_nobody(programs / "initdb", "-D", data, *options), self.namespaces[POSTGRESQL])
        with (data / "pg_hba.conf").open("a") as file:
            file.write("host all all 0.0.0.0/0 trust\n")
        return self._as_nobody(
            *(programs / "postgres", "-D", data, "-h", POSTGRESQL.address, "-p", str(POSTGRESQL.port)),
            *("-k", "", "-c", "fsync=off", "-c", f"max_connections={8 * self._connections + 32}"),
        )

    def _prepare_php(self) -> list[str]:
        settings = PHP_CONF.format(own=_name(PHP), connections=self._connections)
        return self._as_nobody(find_php(), "--nodaemonize", "--fpm-config", self._write("php.conf", settings))

    def _prepare_python(self) -> list[str]:
        return self._as_nobody(
            *(self._python, "-m", "gunicorn", "--chdir", self._pages, "--bind", _name(PYTHON_APP)),
            *("--workers", str(WORKERS), "--worker-class", "gthread"),
            *("--threads", str(self._connections), "--keep-alive", "75", "--graceful-timeout", "2"),
            "app:application",
        )

    def _prepare_nginx(self) -> list[str]:
        settings = NGINX_CONF.format(
            own=_name(NGINX),
            php=_name(PHP),
            app=_name(PYTHON_APP),
            pages=self._pages,
            redis=REDIS.address,
            mariadb=MARIADB.address,
            connections=self._connections,
        )
        self._write("nginx.conf", settings)
        return ["nginx", "-p", f"{self._bed.directory}/", "-c", "nginx.conf", "-e", "stderr"]

    def _write(self, name: str, text: str) -> Path:
        path = self._bed.directory / name
        path.write_text(text)
        return path


def _name(service: Service) -> str:
    return f"{service.address}:{service.port}"


def find_postgresql() -> Path:
    """Where the newest server's programs are. Raises TestbedError."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if not found:
        raise TestbedError("PostgreSQL is missing", hint="make setup-stack")
    return found[-1].parent


def find_php() -> Path:
    """Raises TestbedError."""
    found = sorted(Path("/usr/sbin").glob("php-fpm[0-9]*"))
    if not found:
        raise TestbedError("PHP-FPM is missing", hint="make setup-stack")
    return found[-1]


def describe(python: str = PYTHON) -> Mapping[str, str]:
    """The versions of the programs, by the names of their services, and of Python's clients by
    theirs. Raises TestbedError if one is missing."""
    commands: dict[Service, tuple[str | Path, ...]] = {
        NGINX: ("nginx", "-v"),
        PHP: (find_php(), "-v"),
        PYTHON_APP: (python, "-m", "gunicorn", "--version"),
        MARIADB: ("mariadbd", "--version"),
        REDIS: ("redis-server", "--version"),
        POSTGRESQL: (find_postgresql() / "postgres", "--version"),
    }
    found = {service.name: _ask_version(command) for service, command in commands.items()}
    for name, module in CLIENTS.items():
        found[name] = _ask_version((python, "-c", f"import {module}; print({module}.__version__)"))
    return found


def _ask_version(command: Sequence[str | Path]) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise TestbedError(
            f"{Path(command[0]).name} does not run ({error})", hint="make setup-stack"
        ) from None
    return read_version(done.stdout)


def read_version(text: str) -> str:
    """The first thing in a text that looks like one: digits and dots, and what hangs on to them."""
    words = text.replace("/", " ").replace("v=", " ").replace("(", " ").replace(")", " ").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "?").partition("-")[0]
