# SPDX-License-Identifier: Apache-2.0
"""The guest: its disk, made by debootstrap and never written to, and one boot of a kernel with it.

What a boot needs comes on two more disks: on the second one a tar with the source tree, modules and the plan;
the third one takes a tar with what the guest found. The guest has no network.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm.packages import Image

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

SUITE = "trixie"
# What splicer and the tests need, as Debian's packages. Only the initramfs needs busybox.
PACKAGES = (
    *("python3", "python3-bpfcc", "libbpf1", "bpftool"),
    *("python3-structlog", "python3-psutil", "python3-docker"),
    *("python3-pytest", "python3-pytest-timeout", "python3-yaml"),
    *("iproute2", "nftables", "nginx-light", "wrk", "socat", "haproxy", "curl", "openssl", "procps"),
    *("kmod", "busybox-static", "ca-certificates"),
)
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
SIZE = "4G"  # of the disk; a file with holes
RESULTS_SIZE = 256 << 20  # bytes, likewise

# Modules to load if the kernel has them as such: its disks' for the initramfs, what the tests use later.
DISK_MODULES = ("virtio_pci", "virtio_blk", "ext4")
TEST_MODULES = (
    *("bridge", "veth", "dummy", "tls", "tun", "inet_diag", "tcp_diag", "unix_diag"),
    *("nf_tables", "nf_conntrack", "nf_nat", "nft_chain_nat", "nft_nat", "nft_masq", "nft_ct", "nft_redir"),
    *("nft_reject_inet", "sch_netem", "sch_fq", "sch_ingress", "cls_bpf", "mptcp_diag"),
)

# Emulation cannot take what newer CPUs have, or takes it slowly. What a watchdog says in it is no news.
CPU = "Nehalem"
APPEND = "console=ttyS0 panic=-1 mitigations=off quiet nowatchdog rcupdate.rcu_cpu_stall_suppress=1"


def _call(*command: str | Path, log: Path) -> None:
    with log.open("ab") as sink:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{command[0]}: exit code {done.returncode}\n{tail}")


# -- the disk ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """The file with the guest's root, and the busybox of the initramfs."""

    image: Path
    busybox: Path


def make_disk(cache: Path, archive: str) -> Disk:
    """From the cache, unless its recipe has changed. Takes some minutes, root, and 3 GB for a while."""
    recipe = json.dumps([SUITE, PACKAGES, LEFT_OUT, SIZE])
    name = f"guest-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    disk = Disk(cache / f"{name}.img", cache / f"{name}.busybox")
    if disk.image.exists():
        return disk
    for old in cache.glob("guest-*"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="guest-", dir=cache) as place:
        root, log = Path(place) / "root", Path(place) / "log"
        include = f"--include={','.join(PACKAGES)}"
        _call("debootstrap", "--variant=minbase", include, SUITE, root, archive, log=log)
        for path in LEFT_OUT:
            shutil.rmtree(root / path)
        shutil.copy(root / "usr/bin/busybox", disk.busybox)
        draft = Path(place) / "image"
        _call("mkfs.ext4", "-q", "-O", "^has_journal", "-d", root, draft, SIZE, log=log)
        draft.replace(disk.image)
    return disk


# -- modules -----------------------------------------------------------------------------------------------


def _read_module(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], capture_output=True, check=True).stdout
    return path.read_bytes()


def collect_modules(directory: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Those of `names` that there are below `directory`, each after all that it depends on."""
    paths = {path.name.partition(".ko")[0].replace("-", "_"): path for path in directory.rglob("*.ko*")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found or name not in paths:
            return
        content = _read_module(paths[name])
        for line in re.findall(rb"\0(?:depends=|softdep=pre: )([^\0]*)\0", content):
            for other in re.split(r"[ ,]", line.decode()):
                add(other.replace("-", "_"))
        found[name] = content

    for name in names:
        add(name)
    return found


# -- what goes in ------------------------------------------------------------------------------------------


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(content), mode, int(time.time())
    archive.addfile(entry, io.BytesIO(content))


def _name_modules(modules: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for number, (name, content) in enumerate(modules.items()):
        yield f"{number:02}-{name}.ko", content


def list_tree(tree: Path) -> list[str]:
    """What is or will be committed of the tree."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in listed if (tree / path).is_file()]


def pack(file: Path, tree: Path, image: Image, plan: dict[str, Any], kept: Path) -> None:
    """The second disk: the tree, modules, what earlier guests with this kernel compiled, and the plan."""
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        for path in list_tree(tree):
            archive.add(tree / path, f"splicer/{path}", recursive=False)
        # Ours, whatever the tree has.
        for path in list_tree(HERE):
            archive.add(HERE / path, f"vm/{path}", recursive=False)
        for name, content in _name_modules(collect_modules(image.modules, TEST_MODULES)):
            _add(archive, f"modules/{name}", content)
        for path in sorted(kept.glob("*.json")):
            archive.add(path, f"results/kept/{path.name}")
        _add(archive, "plan.json", json.dumps(plan).encode())


def make_initramfs(file: Path, image: Image, busybox: Path) -> None:
    """Loads the modules of the disks and hands over to the guest's root."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name in ("bin", "modules", "proc", "dev", "root"):
            (root / name).mkdir()
        shutil.copy(busybox, root / "bin/busybox")
        shutil.copy(HERE / "initramfs.sh", root / "init")
        for path in (root / "bin/busybox", root / "init"):
            path.chmod(0o755)
        for name, content in _name_modules(collect_modules(image.modules, DISK_MODULES)):
            (root / "modules" / name).write_bytes(content)
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        with file.open("wb") as sink:
            command = ["cpio", "--create", "--format=newc", "--quiet"]
            subprocess.run(command, cwd=root, input=names.encode(), stdout=sink, check=True)


# -- one boot ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What is emulated: CPUs and MB of memory; after how many seconds it is given up; and what more there is
    on the kernel's command line."""

    cpus: int = 2
    memory: int = 3072
    timeout: float = 3600.0
    append: str = ""


def boot(image: Image, disk: Disk, payload: Path, results: Path, machine: Machine, show: bool) -> None:
    """Boot, until the guest powers off; `show` its console. What it found is in the directory `results` then,
    and console.txt. Nothing else is there if it did not get to its end."""
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="splicer-vm-") as place:
        initramfs, out = Path(place) / "initramfs", Path(place) / "results"
        make_initramfs(initramfs, image, disk.busybox)
        with out.open("wb") as file:
            file.truncate(RESULTS_SIZE)
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", CPU),
            *("-smp", str(machine.cpus), "-m", str(machine.memory), "-nic", "none", "-no-reboot"),
            *("-display", "none", "-monitor", "none", "-serial", "stdio"),
            *("-kernel", str(image.kernel), "-initrd", str(initramfs)),
            *("-append", f"{APPEND} {machine.append}".strip()),
            # Writes to the guest's root go to a file that nobody sees, so that several guests can share it.
            *("-drive", f"file={disk.image},format=raw,if=virtio,snapshot=on"),
            *("-drive", f"file={payload},format=raw,if=virtio,snapshot=on"),
            *("-drive", f"file={out},format=raw,if=virtio"),
        ]
        try:
            _watch(command, machine.timeout, results / "console.txt", show)
        finally:
            # Nothing but zeros if the guest did not get that far.
            subprocess.run(["tar", "-xf", out, "-C", results], capture_output=True, check=False)


def _watch(command: list[str], timeout: float, log: Path, show: bool) -> None:
    """Run QEMU; kill it when it takes too long or we are interrupted."""
    with (
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
        log.open("wb", buffering=0) as sink,
    ):
        assert process.stdout is not None
        clock = threading.Timer(timeout, process.kill)
        clock.start()
        try:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                sink.write(chunk)
                if show:
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.flush()
        finally:
            clock.cancel()
            process.kill()
