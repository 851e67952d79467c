# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from splicer.config import KINDS, ServiceRule, Settings, load_file, render, resolve
from splicer.errors import USAGE, SplicerError


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


def test_every_setting_but_the_services_has_a_kind() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names - {"services"} == set(KINDS)


def test_every_default_is_accepted() -> None:
    for name, kind in KINDS.items():
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
    file = write(tmp_path, 'mode = "off"\n')
    assert resolve({}, {"SPLICER_CONFIG": file}).settings.mode == "off"
    other = tmp_path / "other.toml"
    other.write_text('mode = "eager"\n')
    assert resolve({}, {"SPLICER_CONFIG": file}, config_file=str(other)).settings.mode == "eager"


def test_types_are_those_of_the_settings(tmp_path: Path) -> None:
    settings = resolve({"debug": True, "stop_timeout": "2"}, {"SPLICER_MAX_CONNECTIONS": "16"}).settings
    assert settings.debug is True
    assert isinstance(settings.stop_timeout, float)
    assert settings.max_connections == 16
    settings = resolve(
        {}, {"SPLICER_DEBUG": "off"}, config_file=write(tmp_path, "stop_timeout = 0\n")
    ).settings
    assert settings.debug is False
    assert isinstance(settings.stop_timeout, float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "fast"),
        ("blocking", "yes"),
        ("max_connections", "15"),
        ("max_connections", "1048577"),
        ("max_connections", "many"),
        ("max_connections", "1e3"),
        ("hot_reads", "0"),
        ("hot_reads", "65536"),
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
        assert caught.value.hint == f"accepted: {KINDS[name].accepted}"


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


def test_services(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[[service]]\nport = 8080\nmode = "eager"\nblocking = "allow"\n'
        "[[service]]\nport = 1\n[[service]]\nport = 65535\n",
    )
    services = resolve({}, {}, config_file=file).settings.services
    assert services == (ServiceRule(8080, "eager", "allow"), ServiceRule(1), ServiceRule(65535))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('mode = "fast"', 'mode in .*: "fast"', "adaptive, eager or off"),
        ("mode = 1", "mode in .*: 1", "adaptive, eager or off"),
        ("mode = ['off']", r'mode in .*: \["off"\]', "adaptive, eager or off"),
        ("max_connections = true", "max_connections in .*: true", "16 to 1048576"),
        ('max_connections = "20"', 'max_connections in .*: "20"', "16 to 1048576"),
        ("hot_reads = 0", "hot_reads in .*: 0", "1 to 65535"),
        ("stop_timeout = nan", "stop_timeout in .*: NaN", "seconds"),
        ("debug = 1", "debug in .*: 1", "true or false"),
        ('ready_file = ""', "ready_file in", "a path"),
        ('mdoe = "off"', 'unknown key "mdoe"', 'did you mean "mode"'),
        ("zzz = 1", 'unknown key "zzz"', r"max_connections, .*\[\[service\]\]"),
        ("[service]\nport = 1", "service in", "double brackets"),
        ("service = [1]", "service in", "double brackets"),
        ("[[service]]\nprot = 1", r'unknown key "prot" in \[\[service\]\] number 1', 'mean "port"'),
        ('[[service]]\nmode = "off"', r"port is missing in \[\[service\]\] number 1", "1 to 65535"),
        ("[[service]]\nport = 0", r"port of \[\[service\]\] number 1 in .*: 0", "1 to 65535"),
        ("[[service]]\nport = 65536", "port of", "1 to 65535"),
        ("[[service]]\nport = true", "port of", "1 to 65535"),
        ('[[service]]\nport = 1\nmode = "x"', "mode of", "adaptive, eager or off"),
        (
            "[[service]]\nport = 7\n[[service]]\nport = 7",
            r"port 7 has a second rule: \[\[service\]\] number 2",
            "one",
        ),
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
        '[[service]]\nport = 80\nmode = "eager"\n'
        '[[service]]\nport = 81\nblocking = "allow"\n[[service]]\nport = 82\n',
    )
    first = resolve({"mode": "off"}, {"SPLICER_HOT_READS": "9"}, config_file=file)
    text = render(first)
    assert 'mode = "off"  # --mode' in text
    assert "hot_reads = 9  # SPLICER_HOT_READS" in text
    assert f"debug = true  # {file}" in text
    assert f"[[service]]  # {file}" in text
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert resolve({}, {}, config_file=str(again)).settings == first.settings


def test_what_is_not_set_is_printed_as_a_comment() -> None:
    assert "# ready_file is not set" in render(resolve({}, {}))
