# SPDX-License-Identifier: Apache-2.0
"""Who else uses BPF at the hooks that splicer uses: programs on the cgroup, above and below it, sockmaps with
their programs or without, and programs that choose listeners.

Looked up when somebody asks, and at no other time. What the kernel does not tell is said to be unknown.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from splicer.host.cgroups import Cgroup, list_above
from splicer.host.scopes import list_tree
from splicer.kernel import libbpf, objects
from splicer.kernel.programs import PROGRAMS
from splicer.model import Neighbour, Neighbourhood

# enum bpf_attach_type, include/uapi/linux/bpf.h, to the hook's name.
_CGROUP_HOOKS = {
    libbpf.BPF_CGROUP_SOCK_OPS: "sock_ops",
    libbpf.BPF_CGROUP_SETSOCKOPT: "setsockopt",
    21: "getsockopt",
    10: "connect4",
    11: "connect6",
}
_MAP_HOOKS = {libbpf.BPF_SK_MSG_VERDICT: "sk_msg", 4: "skb_parser", 5: "skb_verdict", 38: "skb_verdict"}
_SK_LOOKUP = 36
# enum bpf_prog_type: what can be at the hooks of a cgroup (BPF_PROG_TYPE_CGROUP_SOCK_ADDR is 18).
_ON_CGROUPS = {libbpf.BPF_PROG_TYPE_SOCK_OPS, libbpf.BPF_PROG_TYPE_CGROUP_SOCKOPT, 18}
_SOCKMAPS = {15, libbpf.BPF_MAP_TYPE_SOCKHASH}  # enum bpf_map_type
_TO_NETNS = 5  # enum bpf_link_type
_SPLICERS = {(program.name, program.kind) for program in PROGRAMS}

# A cgroup takes 30 us, if anybody else is there at all.
_MOST_CGROUPS = 4096


@dataclass
class _Own:
    """Ids of what is pinned for splicer."""

    programs: set[int] = field(default_factory=set)
    maps: set[int] = field(default_factory=set)


def find(cgroup: Cgroup, pin_dir: str, *, most: int = _MOST_CGROUPS) -> Neighbourhood:
    """The others, whether splicer runs or not. What is pinned below `pin_dir` is ours, also what is left
    there of earlier generations. Looks at so many cgroups at `most`. Takes CAP_SYS_ADMIN; what fails is in
    `unknown`."""
    unknown: list[str] = []
    try:
        programs = {each.id: each for each in objects.list_programs()}
    except OSError as error:
        return Neighbourhood((), (f"BPF programs: {error.strerror}",))
    own = _find_own(pin_dir)
    found = [
        *_find_on_cgroups(cgroup, programs, own, most, unknown),
        *_find_on_maps(programs, own, unknown),
        *_find_in_namespaces(programs, own, unknown),
    ]
    return Neighbourhood(tuple(dict.fromkeys(found)), tuple(dict.fromkeys(unknown)))


def _find_own(pin_dir: str) -> _Own:
    own = _Own()
    for directory, _, names in os.walk(pin_dir):
        for name in names:
            match objects.read_pin(os.path.join(directory, name)):
                case objects.Program(id=number) | objects.Link(program=number):
                    own.programs.add(number)
                case objects.Table(id=number):
                    own.maps.add(number)
    return own


def _describe(
    number: int, programs: dict[int, objects.Program], hook: str, place: str, where: str, where_id: int
) -> Neighbour:
    program = programs.get(number)
    # It was loaded, or has gone, since the programs were listed.
    name = program.name if program else ""
    is_splicer = program is not None and (program.name, program.type) in _SPLICERS
    return Neighbour(hook, name, number, place, where, where_id, is_splicer)


def _find_on_cgroups(
    cgroup: Cgroup, programs: dict[int, objects.Program], own: _Own, most: int, unknown: list[str]
) -> Iterator[Neighbour]:
    if not any(each.type in _ON_CGROUPS and each.id not in own.programs for each in programs.values()):
        return  # there is nobody, so no walk is needed to find where
    above = list_above(cgroup)
    if not above.is_whole:
        unknown.append(f"cgroups above {above.paths[0]}: they cannot be seen from here")
    for count, path in enumerate([*above.paths[:-1], *_list_below(cgroup.path, most)]):
        if count >= most:
            unknown.append(f"cgroups below {cgroup.path} beyond the first {most}")
            return
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError as error:
            unknown.append(f"cgroup {path}: {error.strerror}")
            continue
        try:
            identifier = os.fstat(directory).st_ino
            for attach_type, hook in _CGROUP_HOOKS.items():
                for number in _query_cgroup(directory, attach_type, unknown):
                    if number not in own.programs:
                        yield _describe(number, programs, hook, "cgroup", path, identifier)
        finally:
            os.close(directory)


def _list_below(path: str, most: int) -> Iterable[str]:
    """The cgroup itself, and all below it."""
    return (path + ("" if below == "/" else below) for _, below in list_tree(path, most + 1))


def _query_cgroup(directory: int, attach_type: int, unknown: list[str]) -> list[int]:
    try:
        return objects.query(directory, attach_type)
    except OSError as error:
        # The kernel has no such hook; the cgroup has gone.
        if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            unknown.append(f"programs on cgroups: {error.strerror}")
        return []


def _find_on_maps(programs: dict[int, objects.Program], own: _Own, unknown: list[str]) -> Iterator[Neighbour]:
    try:
        maps = [each for each in objects.list_maps() if each.type in _SOCKMAPS and each.id not in own.maps]
    except OSError as error:
        unknown.append(f"BPF maps: {error.strerror}")
        return
    for each in maps:
        has_programs = False
        for attach_type, hook in _MAP_HOOKS.items():
            try:
                attached = objects.query_map(each.id, attach_type)
            except OSError as error:
                unknown.append(f"programs on sockmaps: {error.strerror}")
                break
            for number in attached:
                has_programs = True
                # Of ours it is the verdict, on a SOCKHASH that has outlived its pin.
                if number not in own.programs:
                    yield _describe(number, programs, hook, "map", each.name, each.id)
        else:
            if not has_programs:
                yield Neighbour("sockmap", "", 0, "map", each.name, each.id)


def _find_in_namespaces(
    programs: dict[int, objects.Program], own: _Own, unknown: list[str]
) -> Iterator[Neighbour]:
    try:
        links = objects.list_links()
    except OSError as error:
        unknown.append(f"BPF links: {error.strerror}")
        return
    for link in links:
        if link.type == _TO_NETNS and link.attach_type == _SK_LOOKUP and link.program not in own.programs:
            yield _describe(link.program, programs, "sk_lookup", "netns", f"net:[{link.netns}]", link.netns)
