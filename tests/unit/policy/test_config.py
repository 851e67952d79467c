# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from splicer.errors import USAGE, SplicerError
from splicer.policy import config
from splicer.policy.config import RELOADABLE, VALUE_TYPES, Rule, Settings, load_file, reload, render, resolve


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "splicer.toml"
    file.write_text(text)
    return str(file)


def refusal(tmp_path: Path, text: str) -> SplicerError:
    with pytest.raises(SplicerError) as caught:
        load_file(write(tmp_path, text))
    assert caught.value.exit_code == USAGE
    assert "splicer.toml" in caught.value.message
    return caught.value


def test_defaults() -> None:
    resolved = resolve({}, {})
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {"default"}


def test_every_setting_but_the_policies_has_a_kind() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names - {"policies"} == set(VALUE_TYPES)


def test_every_default_is_accepted() -> None:
    for name, kind in VALUE_TYPES.items():
        value = getattr(Settings(), name)
        assert value is None or kind.check(value), name


def test_precedence(tmp_path: Path) -> None:
    file = write(tmp_path, 'mode = "eager"\nblocking = "allow"\nhot_reads = 3\nrun_dir = "/f"\n')
    environ = {"SPLICER_BLOCKING": "refuse", "SPLICER_HOT_READS": "4", "SPLICER_PIN_DIR": ""}
    resolved = resolve({"hot_reads": "5", "mode": None}, environ, config_file=file)
    settings = resolved.settings
    assert (settings.mode, settings.blocking, settings.hot_reads, settings.run_dir) == (
        "eager",
        "refuse",
        5,
        "/f",
    )
    assert settings.pin_dir == Settings().pin_dir
    sources = resolved.sources
    assert [sources[name] for name in ("mode", "blocking", "hot_reads", "pin_dir")] == [
        file,
        "SPLICER_BLOCKING",
        "--hot-reads",
        "default",
    ]


def test_the_file_can_come_from_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, 'default = "off"\n')
    assert resolve({}, {"SPLICER_CONFIG": file}).settings.default == "off"
    other = tmp_path / "other.toml"
    other.write_text('default = "on"\n')
    assert resolve({}, {"SPLICER_CONFIG": file}, config_file=str(other)).settings.default == "on"


def test_types_are_those_of_the_settings(tmp_path: Path) -> None:
    settings = resolve({"debug": True, "stop_timeout": "2"}, {"SPLICER_MAX_CONNECTIONS": "16"}).settings
    assert settings.debug is True
    assert isinstance(settings.stop_timeout, float)
    assert settings.max_connections == 16
    settings = resolve(
        {}, {"SPLICER_DEBUG": "off"}, config_file=write(tmp_path, "stop_timeout = 0\nlease = 300\n")
    ).settings
    assert settings.debug is False
    assert isinstance(settings.stop_timeout, float)
    assert isinstance(settings.lease, float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "fast"),
        ("mode", "off"),
        ("default", "adaptive"),
        ("docker", "on"),
        ("docker", "/run/docker.sock"),
        ("docker", "unix://run/docker.sock"),
        ("docker", "unix:///"),
        ("docker", "ssh://host"),
        ("docker", "unix:///run/a\nb"),
        ("blocking", "yes"),
        ("tcp_inq", "ask"),
        ("fionread", "on"),
        ("max_connections", "15"),
        ("max_connections", "1048577"),
        ("max_connections", "many"),
        ("max_connections", "1e3"),
        ("hot_reads", "0"),
        ("hot_reads", "65536"),
        ("lease", "-1"),
        ("lease", "86401"),
        ("lease", "never"),
        ("stop_timeout", "-1"),
        ("stop_timeout", "nan"),
        ("stop_timeout", "inf"),
        ("log_format", "xml"),
        ("run_dir", "a\nb"),
    ],
)
def test_bad_text_names_its_source(name: str, value: str) -> None:
    option, variable = "--" + name.replace("_", "-"), "SPLICER_" + name.upper()
    for options, environ, source in (({name: value}, {}, option), ({}, {variable: value}, variable)):
        with pytest.raises(SplicerError, match=f"bad value for {source}: ") as caught:
            resolve(options, environ)
        assert caught.value.exit_code == USAGE
        assert caught.value.hint == f"accepted: {VALUE_TYPES[name].accepted}"


def test_an_empty_option_is_a_mistake_and_an_empty_variable_is_none() -> None:
    with pytest.raises(SplicerError, match="--run-dir"):
        resolve({"run_dir": ""}, {})
    assert resolve({}, {"SPLICER_RUN_DIR": ""}).settings.run_dir == "/run/splicer"


def test_a_bad_switch_in_the_environment() -> None:
    with pytest.raises(SplicerError, match="SPLICER_DEBUG"):
        resolve({}, {"SPLICER_DEBUG": "maybe"})


def test_only_looks_at_what_is_asked_for() -> None:
    environ = {"SPLICER_MODE": "nonsense", "SPLICER_RUN_DIR": "/r"}
    assert resolve({}, environ, only=("run_dir",)).settings.run_dir == "/r"


def test_kubernetes_variables_do_not_matter() -> None:
    environ = {"SPLICER_PORT": "tcp://10.0.0.1:80", "SPLICER_SERVICE_HOST": "10.0.0.1"}
    assert resolve({}, environ).settings == Settings()


@pytest.mark.parametrize(
    "value", ["auto", "off", "unix:///run/podman/podman.sock", "tcp://127.0.0.1:2375", "http://localhost:1"]
)
def test_where_the_engine_may_be(value: str) -> None:
    assert resolve({"docker": value}, {}).settings.docker == value
    assert resolve({}, {"SPLICER_DOCKER": value}).settings.docker == value


def test_policies(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [[policy]]
        container = "web-*"
        image = "nginx:*"
        service = "web"
        project = "demo"
        ports = 8080
        mode = "eager"
        blocking = "allow"
        [[policy]]
        cgroup = "system.slice/redis.service"
        ports = "8000-8002"
        mode = "off"
        [[policy]]
        cidr = "10.0.0.0/8"
        ports = [443, "80-81", 80, "90, 91"]
        blocking = "refuse"
        [[policy]]
        cidr = "fd00::1"
        mode = "adaptive"
        [[policy]]
        ports = [65535, 1]
        mode = "off"
        """,
    )
    rules = resolve({}, {}, config_file=file).settings.policies
    assert rules == (
        Rule("web-*", "nginx:*", "web", "demo", ports=(8080,), mode="eager", blocking="allow", number=1),
        Rule(cgroup="system.slice/redis.service", ports=(8000, 8001, 8002), mode="off", number=2),
        Rule(cidr="10.0.0.0/8", ports=(80, 81, 90, 91, 443), blocking="refuse", number=3),
        Rule(cidr="fd00::1", mode="adaptive", number=4),
        Rule(ports=(1, 65535), mode="off", number=5),
    )
    assert {rule.file for rule in rules} == {file}
    assert rules[0].selectors == {
        "container": "web-*",
        "image": "nginx:*",
        "service": "web",
        "project": "demo",
    }
    assert rules[4].source == f"{file} [[policy]] 5"


def test_the_most_ports(tmp_path: Path) -> None:
    text = '[[policy]]\nmode = "off"\nports = '
    (rule,) = resolve({}, {}, config_file=write(tmp_path, text + '"1-256"')).settings.policies
    assert len(rule.ports) == 256
    assert "ports of [[policy]] number 1" in refusal(tmp_path, text + '["1-256", 257]').message


def test_what_a_reload_takes_over() -> None:
    current = Settings(run_dir="/r", hot_reads=4)
    same = reload(current, Settings(run_dir="/r", hot_reads=4))
    assert (same.settings, same.applied, same.needs_restart) == (current, (), ())
    rule = Rule(ports=(80,), mode="off", file="new")
    read = Settings(
        run_dir="/other",
        hot_reads=5,
        mode="eager",
        default="off",
        blocking="allow",
        tcp_inq="refuse",
        lease=30.0,
        policies=(rule,),
    )
    outcome = reload(current, read)
    assert outcome.settings == dataclasses.replace(read, run_dir="/r", hot_reads=4)
    assert set(outcome.applied) == set(RELOADABLE)
    assert outcome.needs_restart == ("run_dir", "hot_reads")
    moved = reload(
        outcome.settings,
        dataclasses.replace(outcome.settings, policies=(Rule(ports=(80,), mode="off", file="x"),)),
    )
    assert (moved.applied, moved.settings.policies[0].file) == ((), "x")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('mode = "fast"', 'mode in .*: "fast"', "adaptive or eager"),
        ('mode = "off"', 'mode in .*: "off"', "--default off"),
        ("mode = 1", "mode in .*: 1", "adaptive or eager"),
        ("mode = ['eager']", r'mode in .*: \["eager"\]', "adaptive or eager"),
        ("default = false", "default in .*: false", "on or off"),
        ("docker = true", "docker in .*: true", "auto, off"),
        ("max_connections = true", "max_connections in .*: true", "16 to 1048576"),
        ('max_connections = "20"', 'max_connections in .*: "20"', "16 to 1048576"),
        ("hot_reads = 0", "hot_reads in .*: 0", "1 to 65535"),
        ("stop_timeout = nan", "stop_timeout in .*: NaN", "seconds"),
        ("debug = 1", "debug in .*: 1", "true or false"),
        ('ready_file = ""', "ready_file in", "a path"),
        ('mdoe = "off"', 'unknown key "mdoe"', 'did you mean "mode"'),
        ("zzz = 1", 'unknown key "zzz"', r"max_connections, .*\[\[policy\]\]"),
        ("[[service]]\nport = 1", 'unknown key "service"', r"\[\[policy\]\]"),
        ("[policy]\nports = 1", "policy in", "double brackets"),
        ("policy = [1]", "policy in", "double brackets"),
        ("[[policy]]\nprots = 1", r'unknown key "prots" in \[\[policy\]\] number 1', 'mean "ports"'),
        (
            '[[policy]]\nmode = "off"',
            r"\[\[policy\]\] number 1 in .* selects nothing",
            "container, image.*ports",
        ),
        ('[[policy]]\nservice = "a"', r"\[\[policy\]\] number 1 in .* says nothing", "mode, blocking"),
        (
            "[[policy]]\nports = 1\nmode = 'off'\n[[policy]]\nports = 0",
            r"ports of \[\[policy\]\] number 2 in .*: 0",
            "8000-8010.*256",
        ),
        ("[[policy]]\nports = 65536", "ports of", "a port"),
        ("[[policy]]\nports = -1", "ports of", "a port"),
        ("[[policy]]\nports = true", "ports of", "a port"),
        ("[[policy]]\nports = []", "ports of", "a port"),
        ("[[policy]]\nports = 1.5", "ports of", "a port"),
        ('[[policy]]\nports = "90-80"', 'ports of .*: "90-80"', "a port"),
        ('[[policy]]\nports = "1-257"', "ports of", "a port"),
        ('[[policy]]\nports = ["http"]', r'ports of .*: \["http"\]', "a port"),
        ("[[policy]]\nports = [[80]]", "ports of", "a port"),
        ('[[policy]]\nports = 1\nmode = "x"', "mode of", "adaptive, eager or off"),
        ("[[policy]]\nports = 1\nblocking = true", "blocking of", "refuse or allow"),
        ('[[policy]]\ncontainer = ""', "container of", "text"),
        ("[[policy]]\nimage = 5", "image of", "text"),
        ('[[policy]]\ncgroup = "/"', "cgroup of", "a cgroup"),
        ('[[policy]]\ncgroup = "a/../b"', "cgroup of", "a cgroup"),
        ('[[policy]]\ncidr = "10.0.0.1/8"', "cidr of .*10.0.0.1/8", "without host bits"),
        ('[[policy]]\ncidr = "localhost"', "cidr of", "a network"),
        ('[[policy]]\ncidr = "fe80::1%eth0"', "cidr of", "a network"),
        ("[[policy]]\ncidr = 10", "cidr of", "a network"),
        (
            '[[policy]]\ncgroup = "a"\nimage = "b"\nmode = "off"',
            r"\[\[policy\]\] number 1 in .* has both cgroup and image",
            "ports only",
        ),
        ('[[policy]]\ncgroup = "a"\ncidr = "::/0"\nmode = "off"', "has both cgroup and cidr", "ports only"),
        ('[[policy]]\nservice = "a"\ncidr = "::/0"\nmode = "off"', "has both cidr and service", "ports only"),
        ("mode = ", "not valid TOML", "--print-config"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str, hint: str) -> None:
    error = refusal(tmp_path, text)
    assert error.hint is not None
    assert re.search(message, error.message), error.message
    assert re.search(hint, error.hint), error.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(SplicerError, match="cannot read the configuration file") as caught:
            load_file(str(path))
        assert caught.value.exit_code == USAGE
    binary = tmp_path / "binary"
    binary.write_bytes(b'mode = "\xff"\n')
    with pytest.raises(SplicerError, match="not valid TOML"):
        load_file(str(binary))


def test_what_is_printed_can_be_read_again(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'cgroup = "/sys/fs/cgroup/a \\"b\\" \\\\ ü"\nready_file = "/tmp/r"\nstop_timeout = 2\ndebug = true\n'
        '[[policy]]\nports = [80, "90-99", 443]\nmode = "eager"\n'
        '[[policy]]\ncontainer = "a \\"b\\" [c]*"\nproject = "ü"\nports = "8000-8010"\nblocking = "allow"\n'
        '[[policy]]\ncgroup = "a.slice"\nmode = "off"\n[[policy]]\ncidr = "fd00::/8"\nmode = "off"\n',
    )
    first = resolve({"default": "off"}, {"SPLICER_HOT_READS": "9"}, config_file=file)
    text = render(first)
    assert 'default = "off"  # --default' in text
    assert 'ports = [80, "90-99", 443]' in text
    assert 'ports = "8000-8010"' in text
    assert "hot_reads = 9  # SPLICER_HOT_READS" in text
    assert f"debug = true  # {file}" in text
    assert f"[[policy]]  # {file}" in text
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert resolve({}, {}, config_file=str(again)).settings == first.settings


def test_what_is_not_set_is_printed_as_a_comment() -> None:
    assert "# ready_file is not set" in render(resolve({}, {}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SPLICER_MOED", "SPLICER_MODE"),
        ("SPLICER_RUNDIR", "SPLICER_RUN_DIR"),
        ("SPLICER_CONFIGURATION", "SPLICER_CONFIG"),
        ("SPLICER_X", ""),
    ],
)
def test_unknown_variables(name: str, meant: str) -> None:
    [unknown] = config.find_unknown_variables({name: "1", "SPLICER_MODE": "eager", "PATH": "/bin"})
    assert (unknown.name, unknown.meant) == (name, meant)
    assert ("did you mean" in unknown.describe()) == bool(meant)


def test_variables_of_kubernetes_and_of_links_are_no_mistake() -> None:
    names = [
        "SPLICER_SERVICE_HOST",
        "SPLICER_SERVICE_PORT",
        "SPLICER_SERVICE_PORT_METRICS",
        "SPLICER_PORT",
        "SPLICER_PORT_9469_TCP",
        "SPLICER_PORT_9469_TCP_ADDR",
        "SPLICER_NAME",
        "SPLICER_ENV_PATH",
        config.CONFIG_VARIABLE,
        *map(config.variable_of, config.VALUE_TYPES),
    ]
    assert config.find_unknown_variables(dict.fromkeys(names, "x")) == []
