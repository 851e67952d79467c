#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# scripts/setup.sh run    .venv and what `splicer run` needs
# scripts/setup.sh test   also what the tests and the benchmark need
# scripts/setup.sh e2e    also what the tests with containers need: a Docker and a Podman that they start themselves;
#                         and the small programs of tests/apps, so that `make test` has all it needs
# scripts/setup.sh apps   also the programs that `make test-apps` runs, databases and compilers among them
# scripts/setup.sh stack  what the tests need, and the programs of `make bench-stack`: PHP, MariaDB, Redis, PostgreSQL
# scripts/setup.sh vm     no .venv; what `make test-vm` needs to make guests and boot them
#
# Debian 12 and later, Ubuntu 24.04 and later install what is missing through apt and pip. On any
# other Linux the same pieces are looked for and, where one is missing, named. Running it again is
# quick: a stamp in .venv says for which state of this file and pyproject.toml it was done.
set -euo pipefail
cd "$(dirname "$0")/.."

# The distribution's interpreter, whatever `python3` is in PATH: python3-bpfcc belongs to it.
readonly PYTHON=/usr/bin/python3
readonly VENV=.venv
# sbin holds ip, nft, nginx and bpftool, and is not in every user's PATH.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

# The same numbers as the command's own exit codes.
readonly FAILURE=1 USAGE=2 UNSUPPORTED=4

say() { printf 'setup: %s\n' "$1" >&2; }

die() { # code message [hint]
    say "$2"
    if [[ -n "${3:-}" ]]; then
        printf 'hint: %s\n' "$3" >&2
    fi
    exit "$1"
}

# --- what there is -----------------------------------------------------------------------------

has_python() { [[ -x $PYTHON ]]; }
has_venv() { "$PYTHON" -I -c 'import ensurepip, venv' 2>/dev/null; }
# find_spec, not import: importing bcc loads LLVM. BPF tells it from PyPI's package of the same name.
has_bcc() { bcc_directory >/dev/null; }
bcc_directory() {
    "$PYTHON" -I - 2>/dev/null <<'PY'
import importlib.util, os, sys
spec = importlib.util.find_spec("bcc")
here = os.path.dirname(spec.origin) if spec and spec.origin else ""
if not os.path.exists(os.path.join(here, "libbcc.py")):
    sys.exit(1)
print(here)
PY
}
has_libbpf() { [[ $(ldconfig -p 2>/dev/null) == *libbpf.so.1* ]]; }
has_command() { command -v "$1" >/dev/null; }
# Ubuntu's bpftool is a wrapper that is there and does not work without the kernel's own package.
has_compose() { has_command docker-compose || docker compose version >/dev/null 2>&1; }
has_bpftool() { bpftool version >/dev/null 2>&1; }
# Of the distribution's own Python: what is in PATH may be another.
has_testsuite() {
    has_python && "$PYTHON" -I -c 'import importlib.util as u; assert u.find_spec("test.test_socket")' 2>/dev/null
}
has_ruby_grpc() { has_command ruby && ruby -e 'require "grpc"' 2>/dev/null; }
# Of the distribution's own Python, as above: its packages of clients belong to it.
has_module() {
    has_python && "$PYTHON" -I -c 'import importlib.util as u, sys; sys.exit(not u.find_spec(sys.argv[1]))' "$1"
}
has_php_extension() { compgen -G "/usr/lib/php/*/$1.so" >/dev/null; }
has_postgresql() { compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && has_command psql; }

has() {
    case $1 in
        python) has_python ;;
        venv) has_python && has_venv ;;
        bcc) has_python && has_bcc ;;
        libbpf) has_libbpf ;;
        bpftool) has_bpftool ;;
        compose) has_compose ;;
        testsuite) has_testsuite ;;
        postgresql) has_postgresql ;;
        ruby-grpc) has_ruby_grpc ;;
        # Its command has the version in its name.
        php-fpm) compgen -G '/usr/sbin/php-fpm[0-9]*' >/dev/null ;;
        php-mysql) has_php_extension mysqli ;;
        # Podman's helpers are not in PATH.
        netavark | aardvark-dns) [[ -x /usr/lib/podman/$1 || -x /usr/libexec/podman/$1 ]] ;;
        php-redis) has_php_extension redis ;;
        libmariadb-java) [[ -e /usr/share/java/mariadb-java-client.jar ]] ;;
        libpostgresql-jdbc-java) [[ -e /usr/share/java/postgresql.jar ]] ;;
        python3-psycopg) has_module psycopg ;;
        python3-psycopg2) has_module psycopg2 ;;
        python3-psycopg-pool) has_module psycopg_pool ;;
        python3-redis) has_module redis ;;
        python3-mysqldb) has_module MySQLdb ;;
        python3-pymysql) has_module pymysql ;;
        python3-gunicorn) has_module gunicorn ;;
        *) has_command "$1" ;;
    esac
}

missing_pieces() {
    local piece
    for piece in "${pieces[@]}"; do
        has "$piece" || printf '%s\n' "$piece"
    done
}

# --- installing it -----------------------------------------------------------------------------

has_candidate() { [[ $(LC_ALL=C apt-cache policy "$1" 2>/dev/null) == *"Candidate: "[^\(]* ]]; }

package_of() {
    case $1 in
        python) echo python3 ;;
        venv) echo python3-venv ;;
        bcc) echo python3-bpfcc ;;
        libbpf) echo libbpf1 ;;
        ip) echo iproute2 ;;
        nft) echo nftables ;;
        # Debian 13 has the client in a package of its own; before it came with the daemon.
        docker) if has_candidate docker-cli; then echo docker-cli; else echo docker.io; fi ;;
        dockerd) echo docker.io ;;
        # Version 2 where there is one: Ubuntu's docker-compose is version 1 and does not run on its Python.
        compose) if has_candidate docker-compose-v2; then echo docker-compose-v2; else echo docker-compose; fi ;;
        unshare) echo util-linux ;;
        qemu-system-x86_64) echo qemu-system-x86 ;;
        mkfs.ext4) echo e2fsprogs ;;
        systemd-analyze) echo systemd ;;
        # Python's own tests are a package for each version of it.
        testsuite) "$PYTHON" -I -c 'import sys; print("libpython%d.%d-testsuite" % sys.version_info[:2])' ;;
        redis-benchmark) echo redis-tools ;;
        h2load) echo nghttp2-client ;;
        node) echo nodejs ;;
        javac) echo default-jdk-headless ;;
        mariadbd) echo mariadb-server ;;
        php) echo php-cli ;;
        go) echo golang-go ;;
        varnishd) echo varnish ;;
        bpftool)
            if has_candidate bpftool; then
                echo bpftool
            else
                echo linux-tools-common "linux-tools-$(uname -r)"
            fi
            ;;
        *) echo "$1" ;;
    esac
}

refuse_old_python() {
    local found
    found=$("$PYTHON" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$PYTHON" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        die $UNSUPPORTED "splicer needs Python 3.11 or later, and $PYTHON is $found" \
            "use Debian 12 or Ubuntu 24.04 or later; a second Python will not do, bcc belongs to the system's"
    fi
}

# Packages start their services when they are installed. A policy-rc.d that says no is Debian's own
# way to prevent it; one that somebody else put there is left alone.
readonly POLICY=/usr/sbin/policy-rc.d
policy_is_ours=

forbid_service_start() {
    if [[ ! -e $POLICY ]]; then
        policy_is_ours=yes
        trap allow_service_start EXIT
        printf '#!/bin/sh\n# Temporary: made by splicer'\''s scripts/setup.sh\nexit 101\n' >"$POLICY"
        chmod 755 "$POLICY"
    fi
}

allow_service_start() {
    if [[ -n $policy_is_ours ]]; then
        rm -f "$POLICY"
        policy_is_ours=
    fi
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l \
        apt-get install -y --no-install-recommends -o Dpkg::Use-Pty=0 -q "$@" </dev/null >"$log" 2>&1
}

install_packages() { # pieces
    local piece package service known=yes
    local -a new_services=()
    local -a packages
    for piece in "$@"; do
        case $piece in
            nginx) new_services+=(nginx) ;;
            dockerd) new_services+=(docker.socket docker containerd) ;;
            redis-server | postgresql | haproxy | memcached) new_services+=("$piece") ;;
            mariadbd) new_services+=(mariadb) ;;
            varnishd) new_services+=(varnish varnishncsa) ;;
            prometheus) new_services+=(prometheus) ;;
            podman) new_services+=(podman.socket podman podman-restart podman-auto-update podman-auto-update.timer) ;;
        esac
        for package in $(package_of "$piece"); do
            packages+=("$package")
            has_candidate "$package" || known=
        done
    done
    log=$(mktemp)
    say "installing ${packages[*]}"
    forbid_service_start
    if [[ -z $known ]] || ! apt_install "${packages[@]}"; then
        # A third-party source that fails to update is none of our business, as long as the
        # packages can be installed afterwards.
        say "updating the package lists"
        apt-get update -q >"$log" 2>&1 || say "apt-get update complained; going on"
        # Names can change with the lists (bpftool).
        packages=()
        for piece in "$@"; do
            for package in $(package_of "$piece"); do
                packages+=("$package")
            done
        done
        if ! apt_install "${packages[@]}"; then
            tail -n 15 "$log" >&2
            die $FAILURE "apt could not install ${packages[*]}" "the whole output is in $log"
        fi
    fi
    rm -f "$log"
    allow_service_start
    for service in /lib/systemd/system/php*-fpm.service; do
        if [[ " $* " == *" php-fpm "* && -e $service ]]; then
            new_services+=("$(basename "$service" .service)")
        fi
    done
    # The benchmark starts an nginx of its own and the tests a dockerd; installing one must not leave a
    # server behind that appears at the next boot.
    for service in "${new_services[@]}"; do
        if has_command systemctl; then
            systemctl disable --quiet "$service" >/dev/null 2>&1 || true
        elif [[ $service != *.* ]]; then
            update-rc.d "$service" disable >/dev/null 2>&1 || true
        fi
    done
}

ensure_pieces() {
    local -a missing
    mapfile -t missing < <(missing_pieces)
    if ((${#missing[@]} == 0)); then
        return
    fi
    if ! has_command apt-get; then
        die $UNSUPPORTED "missing: ${missing[*]}, and this is not Debian or Ubuntu" \
            "install them with the system's package manager (bcc is python3-bcc on Fedora and Arch), then run this again"
    fi
    if [[ $EUID -ne 0 ]]; then
        die $FAILURE "missing: ${missing[*]}, and only root can install them" "sudo scripts/setup.sh $level"
    fi
    # Refuse before anything is installed: on Ubuntu 22.04 nothing that apt has can help.
    if has_python; then refuse_old_python; fi
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_pieces)
    if ((${#missing[@]} != 0)); then
        die $UNSUPPORTED "still missing after installing: ${missing[*]}" \
            "try: apt-get install $(for piece in "${missing[@]}"; do package_of "$piece"; done | tr '\n' ' ')"
    fi
}

# --- the virtual environment -------------------------------------------------------------------

# Everything the environment depends on: a change in any of it means doing it again.
fingerprint() {
    {
        cat pyproject.toml scripts/setup.sh
        "$PYTHON" -I -c 'import sys; print(sys.version)'
        pwd
        bcc_directory
    } | sha256sum | cut -d' ' -f1
}

ensure_environment() {
    local wanted stamp="$VENV/.setup-$level" target=. other
    wanted=$(fingerprint)
    if [[ -x $VENV/bin/splicer && -e $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    # An environment made elsewhere, or by another interpreter, cannot be mended.
    if [[ -e $VENV ]] && ! "$VENV/bin/python" -c "
import os, sys
ok = os.path.realpath(sys.executable) == os.path.realpath('$PYTHON') and sys.prefix == os.path.abspath('$VENV')
sys.exit(not ok)" 2>/dev/null; then
        say "$VENV belongs to another interpreter or directory: making it anew"
        rm -rf "$VENV"
    fi
    if [[ ! -x $VENV/bin/pip ]]; then
        say "making $VENV"
        "$PYTHON" -m venv --system-site-packages "$VENV"
    fi
    if [[ $level != run ]]; then target='.[dev]'; fi
    say "installing splicer into $VENV"
    if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target" >&2; then
        die $FAILURE "pip could not install splicer and what it needs" \
            "pip needs to reach PyPI or an index of yours (PIP_INDEX_URL)"
    fi
    printf '%s\n' "$wanted" >"$stamp"
    # What serves the tests serves `splicer run` as well; the environment of both kinds of tests is the same.
    if [[ $level != run ]]; then
        for other in run test e2e apps stack; do
            [[ $stamp == "$VENV/.setup-$other" ]] || cp "$stamp" "$VENV/.setup-$other"
        done
    fi
    say "ready: $VENV/bin/splicer"
}

level=${1:-run}
pieces=(python venv bcc libbpf)
test_pieces=(ip nft bpftool nginx wrk socat haproxy tmux tshark redis-server)
e2e_pieces=(docker dockerd compose debootstrap slirp4netns iptables tcpdump unshare systemd-analyze lintian)
e2e_pieces+=(podman crun netavark aardvark-dns catatonit)
# Its package has promtool as well.
e2e_pieces+=(prometheus)
# What test_apps.py, a part of `make test`, runs besides the above; a test compares.
small_pieces=(testsuite curl openssl redis-server redis-benchmark strace)
apps_pieces=(iperf3 memcached postgresql mariadbd php php-mysql h2load node javac go ruby-grpc)
# For `tests/apps/run --disturb`.
apps_pieces+=(php-fpm varnishd libpostgresql-jdbc-java libmariadb-java)
apps_pieces+=(python3-gunicorn python3-psycopg2 python3-psycopg python3-pymysql)
stack_pieces=(redis-server postgresql mariadbd php-fpm php-mysql php-redis python3-psycopg python3-psycopg-pool)
stack_pieces+=(python3-redis python3-mysqldb python3-pymysql python3-gunicorn)
vm_pieces=(python git qemu-system-x86_64 debootstrap mkfs.ext4 cpio)
case $level in
    run) ;;
    test) pieces+=("${test_pieces[@]}") ;;
    e2e) pieces+=("${test_pieces[@]}" "${small_pieces[@]}" "${e2e_pieces[@]}") ;;
    apps) pieces+=("${test_pieces[@]}" "${small_pieces[@]}" "${apps_pieces[@]}") ;;
    stack) pieces+=("${test_pieces[@]}" "${stack_pieces[@]}") ;;
    vm) pieces=("${vm_pieces[@]}") ;;
    *) die $USAGE "unknown level: $level" "scripts/setup.sh run|test|e2e|apps|stack|vm" ;;
esac
# Two at the same time (make -j, two terminals) take turns.
exec 9<scripts/setup.sh
flock 9
[[ $(uname -s) == Linux ]] || die $UNSUPPORTED "splicer runs on Linux only"
ensure_pieces
refuse_old_python
# Guests have an environment of their own.
[[ $level == vm ]] || ensure_environment
