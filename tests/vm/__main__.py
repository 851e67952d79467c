# SPDX-License-Identifier: Apache-2.0
"""The command line of the kernel matrix."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vm import report
from vm.guest import REPOSITORY, Disk, Machine, boot, make_disk, pack
from vm.kernels import AREAS, BY_NAME, KERNELS, RUNS, Kernel
from vm.packages import Apt, Image, Unavailable, find_archive

FAILURE, USAGE, UNSUPPORTED = 1, 2, 4
PROGRAMS = ("qemu-system-x86_64", "debootstrap", "mkfs.ext4", "cpio", "git")
DEFAULT_CACHE = Path("~/.cache/splicer-vm")
# How many times slower than the machines of `make test` a guest is taken to be (tests/support/pauses.py).
SLOWNESS = 8
AREA_TIMEOUT = 1500  # seconds
ENVIRONMENT = {
    "SPLICER_KERNEL_TESTS": "1",
    "SPLICER_TEST_SLOWNESS": str(SLOWNESS),
    "PYTHONPATH": "/srv/splicer:/srv/vm/once",
    "PYTHONUNBUFFERED": "1",
}

EPILOG = """\
tests/vm/run                              every kernel
tests/vm/run --kernel 6.1 --only nginx    one of them, one area of tests
tests/vm/run --kernel 6.1 -- uname -a     another command in such a guest

exit codes:
  0 every kernel did what is expected of it, without a warning (with a
  command: the command's own); 1 not so, 2 usage, 4 no guests here
"""


def main() -> int:
    options = _parse()
    if options.list:
        for kernel in KERNELS:
            print(f"{kernel.name:14}{kernel.expected:9} {kernel.described}")
        return 0
    unknown = [name for name in options.kernel if name not in BY_NAME]
    unknown += [name for name in options.only if name not in AREAS]
    if unknown:
        return _complain(USAGE, f"no such kernel or area ({', '.join(unknown)})", "tests/vm/run --list")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [] if os.geteuid() == 0 else ["root, for debootstrap"]
    if missing:
        return _complain(UNSUPPORTED, f"missing: {', '.join(missing)}", "sudo scripts/setup.sh vm")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    kernels = [BY_NAME[name] for name in options.kernel] or list(KERNELS)
    options.cache = options.cache.expanduser()
    options.cache.mkdir(parents=True, exist_ok=True)
    try:
        _tell("the guest's disk")
        with _locked(options.cache):
            disk = make_disk(options.cache, find_archive()[0])
        if options.command:
            return _run_command(kernels[0], disk, options)
        rows = []
        for kernel in kernels:
            rows.append(_try_kernel(kernel, disk, options))
            if options.save and report.CUT not in rows[-1]["wrong"]:
                report.save(rows[-1:])
            print(report.tabulate(rows[-1:]), file=sys.stderr, flush=True)
    except (Unavailable, RuntimeError) as error:
        return _complain(FAILURE, str(error))
    print(json.dumps({"schema": 1, "kernels": rows}, indent=1) if options.json else report.tabulate(rows))
    return FAILURE if any(row["wrong"] for row in rows) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/vm/run",
        description="Boot Debian's kernels under QEMU and run a part of the tests in each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kernel", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    add("--only", action="append", default=[], metavar="AREA", help="only these tests; may be repeated")
    add("--cache", type=Path, default=DEFAULT_CACHE, help=f"kernels and the disk (default: {DEFAULT_CACHE})")
    add("--tree", type=Path, default=REPOSITORY, help="the source tree to test (default: this one)")
    add("--cpus", type=int, default=2, help="of a guest (default: 2)")
    add("--memory", type=int, default=3072, metavar="MB", help="of a guest (default: 3072)")
    add("--timeout", type=float, default=3600.0, metavar="SECONDS", help="of a guest (default: 3600)")
    add("--append", default="", help="more for the kernel's command line")
    add("--results", type=Path, help="keep what the guest found in this directory")
    add("--save", action="store_true", help="write tests/vm/results.json and the table in docs/kernels.md")
    add("--json", action="store_true", help="one JSON object instead of the table")
    add("--bare", action="store_true", help="with a command: do not compile splicer's programs first")
    add("--verbose", action="store_true", help="show the guest's console")
    add("--list", action="store_true", help="the names of the kernels, and what is expected of them")
    arguments = sys.argv[1:]
    command = []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, command = arguments[:place], arguments[place + 1 :]
    options = parser.parse_args(arguments)
    options.command = command
    if command and len(options.kernel) != 1:
        parser.error("a command needs one --kernel")
    if options.save and command:
        parser.error("--save is for the tests")
    return options


def _pytest(area: str) -> list[str]:
    options = ["-p", "no:cacheprovider", "-v", "--durations=8", f"--junitxml=/srv/results/{area}.xml"]
    return ["/usr/bin/python3", "-m", "pytest", *options, *AREAS[area]]


def _boot(
    kernel: Kernel, disk: Disk, options: argparse.Namespace, plan: dict[str, Any], results: Path
) -> Image:
    """One guest; what it found is in `results` then."""
    _tell(f"{kernel.name}: packages")
    cache = options.cache
    with _locked(cache):
        image = Apt(cache / "apt" / kernel.name).fetch(kernel, cache / "kernels")
    _tell(f"{kernel.name}: booting {image.package} {image.version}")
    kept = cache / "kept" / image.package
    kept.mkdir(parents=True, exist_ok=True)
    machine = Machine(options.cpus, options.memory, options.timeout, f"{kernel.append} {options.append}")
    show = options.verbose or bool(options.command)
    with tempfile.TemporaryDirectory(prefix="splicer-vm-") as place:
        payload = Path(place) / "payload"
        pack(payload, options.tree, image, plan | {"environment": ENVIRONMENT}, kept)
        try:
            boot(image, disk, payload, results, machine, show)
        finally:
            for path in (results / "kept").glob("*.json"):
                shutil.copy(path, kept)
    return image


def _try_kernel(kernel: Kernel, disk: Disk, options: argparse.Namespace) -> dict[str, Any]:
    areas = report.name_areas(kernel, options.only)
    steps = [{"name": area, "command": _pytest(area), "timeout": AREA_TIMEOUT} for area in areas]
    # Where it is refused, that comes first.
    plan = {"compile": kernel.expected == RUNS, "start": True, "steps": steps}
    results = options.results or options.cache / "results" / kernel.name
    image = _boot(kernel, disk, options, plan, results)
    command = f"make test-vm KERNEL={kernel.name}"
    if options.only:
        command += f' ARGS="{" ".join(f"--only {area}" for area in areas)}"'
    return report.gather(kernel, image, results, command)


def _run_command(kernel: Kernel, disk: Disk, options: argparse.Namespace) -> int:
    step = {"name": "command", "command": options.command, "timeout": int(options.timeout)}
    plan = {"compile": not options.bare, "start": False, "steps": [step]}
    with tempfile.TemporaryDirectory(prefix="splicer-vm-") as place:
        results = options.results or Path(place) / "results"
        _boot(kernel, disk, options, plan, results)
        if not (results / "dmesg.txt").exists():
            return _complain(FAILURE, report.CUT)
        for line in report.find_trouble((results / "dmesg.txt").read_text()):
            _tell(f"kernel: {line}")
        return int(report.read_found(results)["steps"][0]["code"])


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Two at a time take turns where they fill the cache."""
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell(text: str) -> None:
    print(f"vm: {text}", file=sys.stderr, flush=True)


def _complain(code: int, message: str, hint: str = "") -> int:
    print(f"tests/vm/run: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
