# SPDX-License-Identifier: Apache-2.0
"""Debian's packages, from where this machine's apt gets its own, through a configuration of apt beside the
machine's: whatever suites are asked for, the machine's sources stay as they are."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vm.kernels import SECURITY, Kernel

# What a package of a kernel needs of others to be a whole one. Since 6.19 it is an empty one by itself.
_PARTS = re.compile(r"linux-(?:binary|modules)-[\w.+~-]+")


class Unavailable(Exception):
    """Debian's packages, or one of them, cannot be had here."""


@dataclass(frozen=True)
class Image:
    """An unpacked kernel: name and version of its package, and where kernel and modules are."""

    package: str
    version: str
    kernel: Path
    modules: Path


def _call(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"{' '.join(command[:2])}: {last}")
    return done.stdout


def find_archive() -> tuple[str, str | None]:
    """Addresses of Debian's archive, and of the one for its security updates if the machine has that."""
    form = "$(REPO_URI) $(RELEASE)"
    lines = _call("apt-get", "indextargets", "--no-release-info", "--format", form, "Created-By: Packages")
    found = {tuple(line.split()) for line in lines.splitlines()}
    security = sorted(address for address, suite in found if suite.endswith(f"-{SECURITY}"))
    main = sorted(address for address, suite in found if re.search(r"/debian/?$", address))
    if not main:
        raise Unavailable("this machine's apt has no source with Debian's packages")
    return main[0], security[0] if security else None


class Apt:
    """apt with sources and lists of its own, below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.main, self.security = find_archive()
        self._directory = directory
        for name in ("etc", "lists/partial", "cache/archives/partial", "state"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "state/status").touch()
        self._options = [
            f"-oDir::Etc::SourceList={directory}/etc/sources.list",
            f"-oDir::Etc::SourceParts={directory}/etc/none",
            f"-oDir::Etc::Preferences={directory}/etc/none",
            f"-oDir::Etc::PreferencesParts={directory}/etc/none",
            f"-oDir::State={directory}/state",
            f"-oDir::State::Lists={directory}/lists",
            f"-oDir::State::Status={directory}/state/status",
            f"-oDir::Cache={directory}/cache",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            # Suites that are no more than kept are not signed anew.
            "-oAcquire::Check-Valid-Until=false",
        ]

    def update(self, suites: Iterable[str]) -> None:
        """Get the lists of these suites. Raises Unavailable."""
        lines = []
        for suite in dict.fromkeys(suites):
            address = self.security if suite.endswith(f"-{SECURITY}") else self.main
            if address:
                lines.append(f"deb {address} {suite} main\n")
        (self._directory / "etc/sources.list").write_text("".join(lines))
        self._get("update")

    def find(self, pattern: str, suites: Iterable[str]) -> dict[str, str]:
        """The fields of the newest package whose name has this form, of those in `suites`."""
        names = self._cache("search", "--names-only", f"^{pattern}$").splitlines()
        found = []
        for text in self._cache("show", *(line.split()[0] for line in names)).split("\n\n") if names else []:
            fields = dict(re.findall(r"^([\w-]+): (.*)$", text, re.MULTILINE))
            if fields:
                found.append(fields)
        if not found:
            raise Unavailable(f"no package like {pattern} in {', '.join(suites)}")
        return max(found, key=lambda fields: [int(part) for part in re.findall(r"\d+", fields["Version"])])

    def fetch(self, kernel: Kernel, place: Path) -> Image:
        """The kernel, unpacked below `place` unless it is there already."""
        suites = [suite for suite in kernel.suites if self.security or not suite.endswith(f"-{SECURITY}")]
        self.update(suites)
        fields = self.find(kernel.pattern, suites)
        root = place / fields["Package"]
        if not (root / "complete").exists():
            shutil.rmtree(root, ignore_errors=True)
            (root / "packages").mkdir(parents=True)
            wanted = [fields["Package"], *_PARTS.findall(fields.get("Depends", ""))]
            self._get("download", *wanted, cwd=root / "packages")
            for package in sorted((root / "packages").glob("*.deb")):
                _call("dpkg-deb", "--extract", str(package), str(root))
            shutil.rmtree(root / "packages")
            (root / "complete").touch()
        kernels = [*root.glob("boot/vmlinuz-*"), *root.glob("usr/lib/modules/*/vmlinuz")]
        modules = [*root.glob("usr/lib/modules/*"), *root.glob("lib/modules/*")]
        if not kernels or not modules:
            raise Unavailable(f"{fields['Package']} has no kernel or no modules")
        return Image(fields["Package"], fields["Version"], kernels[0], modules[0])

    def _get(self, *arguments: str, cwd: Path | None = None) -> None:
        _call("apt-get", *self._options, "-q", *arguments, cwd=cwd)

    def _cache(self, *arguments: str) -> str:
        return _call("apt-cache", *self._options, *arguments)
