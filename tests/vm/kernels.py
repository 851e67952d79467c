# SPDX-License-Identifier: Apache-2.0
"""Which kernels are tried, what is expected of each, and which tests are run there."""

from __future__ import annotations

from dataclasses import dataclass

# What is expected of `splicer run`: that it starts, and the tests pass; or that it ends with exit code 4 and
# a hint, and leaves nothing.
RUNS, REFUSED = "runs", "refused"

SECURITY = "security"  # a suite of the archive for security updates, where the machine has that
TRIXIE = ("trixie", f"trixie-{SECURITY}")
BOOKWORM = ("bookworm", f"bookworm-{SECURITY}")
BULLSEYE = ("bullseye", f"bullseye-{SECURITY}")


@dataclass(frozen=True)
class Kernel:
    """One kernel of Debian's: the newest whose version begins with `version`, among the packages of `suites`.

    `expected`: RUNS or REFUSED. `append`: more for the kernel's command line. `without`: areas of tests that
    docs/kernels.md says this kernel has not got what they need for.
    """

    name: str
    version: str
    suites: tuple[str, ...]
    expected: str
    described: str
    append: str = ""
    without: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """A regular expression, as apt knows them, for the names of its packages. Cloud kernels are the
        smallest. Signed ones only: under lockdown no other modules can be loaded."""
        number = self.version.replace(".", r"\.")
        return rf"linux-image-{number}(\.[0-9]+)*(-[0-9]+|\+deb[0-9]+(\.[0-9]+)?)-cloud-amd64"


KERNELS = (
    Kernel("5.10", "5.10", BULLSEYE, REFUSED, "Debian 11"),
    Kernel("6.1", "6.1", BOOKWORM, RUNS, "Debian 12", without=("older",)),
    Kernel(
        "6.1-lockdown",
        "6.1",
        BOOKWORM,
        REFUSED,
        "the same, with `lockdown=integrity`",
        append="lockdown=integrity",
        without=("older",),
    ),
    Kernel("6.12.57", "6.12.57", ("bookworm-backports",), RUNS, "before the fix of 6.12.75"),
    Kernel("6.12", "6.12", TRIXIE, RUNS, "Debian 13"),
    Kernel("6.18", "6.18", ("trixie-backports",), RUNS, "the fix of 6.18.14, not the one after it"),
    Kernel("7", "7", ("sid", "trixie-backports"), RUNS, "the newest there is"),
)

# Areas of tests, and the arguments of pytest for each: what depends on the kernel, and ends within minutes.
# Each area is a run by itself, and starts splicer itself.
AREAS = {
    "splicing": ("tests/kernel/test_splicing.py", "-k", "bridge or both_ends or size or eager"),
    "nginx": ("tests/kernel/test_nginx.py",),
    "fionread": ("tests/kernel/test_fionread_readers.py",),
    "order": ("tests/kernel/test_order.py",),
    # Over plain TCP they would test the kernel, and not splicer.
    "semantics": (
        "tests/kernel/test_semantics.py",
        "-k",
        "spliced and (fionread or peek or triggered or stream or sendfile or close or reset or large)",
    ),
    "readers": (
        "tests/conformance/test_dangerous_readers.py",
        "-k",
        "from_the_start or starts_to or haproxy or socat",
    ),
    "lifecycle": (
        "tests/kernel/test_lifecycle.py",
        "-k",
        "stop_under_load or killed_under_load or crash_under_load",
    ),
    # The others want tshark, which guests do not have.
    "tap": ("tests/kernel/test_tap.py", "-k", "text or gives_way_to or nobody"),
    "older": ("tests/kernel/test_census.py", "-k", "spliced or again"),
}

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
