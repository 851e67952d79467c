# SPDX-License-Identifier: Apache-2.0
"""What a party is called, and that there is an end to names."""

from __future__ import annotations

import pytest

from splicer.metrics.services import OTHER, Services, name_service
from splicer.model import Owner

ID = "0123456789ab"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Owner(container="shop-web-1", service="web", project="shop", cgroup="/docker/x"), "web"),
        (Owner(container="shop-web-1", cgroup="/docker/x"), "shop-web-1"),
        (Owner(container=ID, cgroup="/docker/x"), "other"),
        (Owner(pod="aa-bb", cgroup="/kubepods/podaa-bb"), "other"),
        (Owner(cgroup="/system.slice/nginx.service"), "nginx.service"),
        (Owner(cgroup="/system.slice/nginx.service/worker"), "nginx.service"),
        (Owner(cgroup="/system.slice/system-getty.slice/getty@tty1.service"), "getty@.service"),
        (
            Owner(cgroup="/system.slice/system-postgresql.slice/postgresql@15-main.service"),
            "postgresql@.service",
        ),
        (Owner(cgroup="/user.slice/user-1000.slice/session-42.scope"), "user.slice"),
        (Owner(cgroup="/user.slice/user-1000.slice/user@1000.service/app.slice/app-x-77.scope"), "app.slice"),
        (Owner(cgroup="/system.slice/run-u1234.service"), "transient"),
        (Owner(cgroup="/system.slice/run-r0123456789abcdef0123456789abcdef.scope"), "transient"),
        (Owner(cgroup="/system.slice/runner.service"), "runner.service"),
        (Owner(cgroup="/init.scope"), "init.scope"),
        (Owner(cgroup="/"), "host"),
        (Owner(cgroup="/jobs/4711"), "other"),
        (Owner(), "unknown"),
    ],
)
def test_names(owner: Owner, name: str) -> None:
    assert name_service(owner) == name


def test_there_is_an_end_to_names() -> None:
    services = Services(lambda cgroup: Owner(container=f"c{cgroup}"), most_names=3)
    assert [services.name_pair(number, 0)[0] for number in (1, 2, 3, 4, 5)] == [
        "c1",
        "c2",
        "c3",
        OTHER,
        OTHER,
    ]
    assert services.name_pair(2, 3) == ("c2", "c3")
    assert services.name_pair(2, 0) == ("c2", "unknown")


def test_there_is_an_end_to_pairs() -> None:
    services = Services(lambda cgroup: Owner(container=f"c{cgroup}"), most_pairs=10)
    named = {services.name_pair(client, server) for client in range(1, 9) for server in range(1, 9)}
    assert len(named) == 10 and (OTHER, OTHER) in named
    assert services.name_pair(1, 1) == ("c1", "c1")


def test_names_of_an_earlier_daemon_are_kept() -> None:
    services = Services(lambda cgroup: Owner(container=f"c{cgroup}"), most_names=2)
    services.take_over([("old", "c9"), (OTHER, OTHER)])
    assert services.name_pair(9, 1) == ("c9", OTHER)
