# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles, compose file and the examples for orchestrators agree with the code and with each other."""

from __future__ import annotations

import configparser
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import splicer
from splicer import errors
from splicer.cli.main import COMMANDS, make_parser
from splicer.doctor.prerequisites import CAPABILITIES
from splicer.policy.config import CONFIG_VARIABLE, VALUE_TYPES, Settings, variable_of

TOP = Path(__file__).resolve().parents[2]
EXAMPLES = TOP / "examples"
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
# What loading takes, and opening the namespaces of other users' processes.
# The last one is for leases, and missed by nothing else.
NEEDED = {name.removeprefix("CAP_") for name in CAPABILITIES} | {"NET_RAW"}
HEALTH = ["splicer", "status", "--brief"]

COMPOSE = yaml.safe_load((TOP / "docker-compose.yml").read_text())
STACK = yaml.safe_load((EXAMPLES / "swarm/stack.yml").read_text())
CLUSTER = {
    each["kind"]: each for each in yaml.safe_load_all((EXAMPLES / "kubernetes/splicer.yaml").read_text())
}
POD = CLUSTER["DaemonSet"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
DOCKERFILES = (TOP / "Dockerfile", EXAMPLES / "compose/Dockerfile")


def _read_unit() -> configparser.SectionProxy:
    # Each setting stands once, but for none of them does configparser know what a unit is.
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_file(io.StringIO((EXAMPLES / "systemd/splicer.service").read_text()))
    return parser["Service"]


UNIT = _read_unit()


def _targets(volumes: list[str]) -> dict[str, bool]:
    """Mount points of short volume syntax; True: read-only."""
    found = {}
    for volume in volumes:
        plain = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume)
        source, target, *options = plain.split(":")
        assert source.startswith("/") or source in COMPOSE["volumes"]
        found[target] = "ro" in options
    return found


def _command_is_valid(arguments: list[str]) -> bool:
    return make_parser().parse_args(arguments).command in COMMANDS


# -- Dockerfiles ------------------------------------------------------------------------------------------


def test_one_base_image() -> None:
    bases = {re.search(r"^ARG BASE=(\S+)$", path.read_text(), re.M)[1] for path in DOCKERFILES}
    assert len(bases) == 1
    assert all(re.findall(r"^FROM (\S+)", path.read_text(), re.M)[-1] == "${BASE}" for path in DOCKERFILES)


def test_the_image_has_what_the_package_depends_on() -> None:
    text = (TOP / "Dockerfile").read_text()
    names = {re.split(r"[<>=]", name)[0] for name in PROJECT["dependencies"]}
    # What is an extra elsewhere: a sidecar cannot be added to.
    names |= {"bpfcc", "prometheus-client"}
    assert set(re.findall(r"python3-([\w-]+)", text)) - {"pip", "setuptools"} == names


def test_all_say_the_same_version() -> None:
    version = PROJECT["version"]
    assert splicer.__version__ == version
    assert f"ARG VERSION={version}\n" in (TOP / "Dockerfile").read_text()
    assert CONTAINER["image"] == STACK["services"]["splicer"]["image"] == f"splicer:{version}"
    for name in ("kubernetes", "swarm"):
        text = (TOP / "examples" / name / "README.md").read_text()
        assert set(re.findall(r"splicer:(\d\S*)", text)) == {version}
    pages = (TOP / "docs/operations.md").read_text()
    assert re.findall(r"^  version  (\S+)$|^(\d+\.\d+\.\d+)$", pages, re.M) == [(version, ""), ("", version)]
    # What is on its way to the next release stands above the last one.
    released = re.findall(r"^## (\d\S*)", (TOP / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == version


def test_the_image_asks_splicer_for_its_health() -> None:
    text = (TOP / "Dockerfile").read_text()
    assert 'CMD ["splicer", "status", "--brief"]' in text
    assert _command_is_valid(HEALTH[1:])


def test_the_builder_gets_what_is_copied() -> None:
    ignored = (TOP / ".dockerignore").read_text().splitlines()
    for path in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(.*)", path.read_text(), re.M):
            for source in line.split()[:-1]:
                assert (TOP / source).exists(), source
                assert any(f"!{part}" in ignored for part in (source, str(Path(source).parent))), source


# -- the sidecar ------------------------------------------------------------------------------------------


def test_capabilities_are_the_same_everywhere() -> None:
    sidecar, swarm = COMPOSE["services"]["splicer"], STACK["services"]["splicer"]
    kubernetes = CONTAINER["securityContext"]["capabilities"]
    assert set(sidecar["cap_add"]) == set(swarm["cap_add"]) == set(kubernetes["add"]) == NEEDED
    assert sidecar["cap_drop"] == swarm["cap_drop"] == kubernetes["drop"] == ["ALL"]
    assert {name.removeprefix("CAP_") for name in UNIT["CapabilityBoundingSet"].split()} == NEEDED


@pytest.mark.parametrize("service", [COMPOSE["services"]["splicer"], STACK["services"]["splicer"]])
def test_places_are_mounted_where_splicer_looks(service: dict[str, Any]) -> None:
    targets = _targets(service["volumes"])
    assert targets[Settings.cgroup]
    assert not targets[str(Path(Settings.pin_dir).parent)]
    assert not targets.get(Settings.run_dir, targets["/run"])
    assert service["read_only"]


def test_places_are_mounted_in_the_pod() -> None:
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert mounts[Settings.cgroup]["readOnly"]
    for path in (str(Path(Settings.pin_dir).parent), Settings.run_dir, Settings.cache_dir):
        assert not mounts[path].get("readOnly", False)
    names = {mount["name"] for mount in mounts.values()}
    assert names == {volume["name"] for volume in POD["volumes"]}
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]


def test_every_variable_reaches_the_sidecar() -> None:
    """But those that say where things are in the container, which the mounts settle."""
    settled = {"run_dir", "pin_dir", "cache_dir", "ready_file"}
    known = {variable_of(name) for name in VALUE_TYPES if name not in settled} | {CONFIG_VARIABLE}
    assert {entry.partition("=")[0] for entry in COMPOSE["services"]["splicer"]["environment"]} == known
    page = (EXAMPLES / "compose/README.md").read_text()
    assert {name for name in known if f"`{name}" in page} == known


def test_the_next_sidecar_need_not_compile() -> None:
    assert f"cache:{Settings.cache_dir}" in COMPOSE["services"]["splicer"]["volumes"]


def test_stopping_is_given_the_time_it_may_take() -> None:
    seconds = [
        int(COMPOSE["services"]["splicer"]["stop_grace_period"].removesuffix("s")),
        int(STACK["services"]["splicer"]["stop_grace_period"].removesuffix("s")),
        int(POD["terminationGracePeriodSeconds"]),
        int(UNIT["TimeoutStopSec"]),
    ]
    assert min(seconds) >= 2 * Settings.stop_timeout


def test_the_demonstration_starts_after_the_sidecar_is_healthy() -> None:
    services = COMPOSE["services"]
    assert services["web"]["depends_on"]["splicer"]["condition"] == "service_healthy"
    assert [name for name, service in services.items() if "profiles" not in service] == ["splicer"]


# -- orchestrators ------------------------------------------------------------------------------------------


def test_the_pod_calls_splicer_with_options_it_has() -> None:
    assert _command_is_valid(CONTAINER["args"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert CONTAINER[probe]["exec"]["command"] == HEALTH


def test_the_configuration_in_the_cluster_is_valid(tmp_path: Path) -> None:
    from splicer.policy import config

    file = tmp_path / "splicer.toml"
    text = CLUSTER["ConfigMap"]["data"]["splicer.toml"]
    file.write_text(text)
    assert config.resolve({}, {}, config_file=str(file)).settings.policies == ()
    # The example in its comments is one, too.
    file.write_text(re.sub(r"^# (?=\[\[|cidr|mode)", "", text, flags=re.M))
    assert len(config.resolve({}, {}, config_file=str(file)).settings.policies) == 1


def test_the_cluster_gives_it_no_rights() -> None:
    assert CLUSTER.keys() == {"Namespace", "ConfigMap", "DaemonSet"}
    assert POD["automountServiceAccountToken"] is False
    assert POD["hostPID"] is True
    assert "hostNetwork" not in POD


@pytest.mark.parametrize("version", ["1.30", "1.31", "1.32", "1.33", "1.34"])
@pytest.mark.parametrize("kind", sorted(CLUSTER))
def test_kubernetes_accepts_it(kind: str, version: str) -> None:
    kubernetes_validate.validate(CLUSTER[kind], version, strict=True)


def test_the_unit_knows_the_exit_codes() -> None:
    assert {int(code) for code in UNIT["RestartPreventExitStatus"].split()} == {
        errors.USAGE,
        errors.UNSUPPORTED,
    }


def test_the_unit_calls_splicer_with_options_it_has() -> None:
    program, *arguments = UNIT["ExecStart"].split()
    assert program.endswith("/bin/splicer")
    assert _command_is_valid(arguments)
    assert UNIT["Type"] == "notify"
    assert f"/run/{UNIT['RuntimeDirectory']}" == Settings.run_dir
    assert f"/var/cache/{UNIT['CacheDirectory']}" == Settings.cache_dir
