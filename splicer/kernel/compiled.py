# SPDX-License-Identifier: Apache-2.0
"""What comes out of the compiler: the shapes of maps, and instructions that refer to maps by number."""

from __future__ import annotations

import base64
import dataclasses
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from splicer.kernel import libbpf
from splicer.kernel.libbpf import MapShape
from splicer.kernel.programs import ANSWERS, MAPS, PROGRAMS, TAP, TAP_MAPS

_INSTRUCTION = 8  # bytes


def find_references(code: bytes | bytearray) -> Iterator[int]:
    """Where, in bytes from the start, instructions name a map: 32 bits each."""
    place = 0
    while place < len(code):
        wide = code[place] == libbpf.LD_IMM64
        if wide and code[place + 1] >> 4 in (libbpf.PSEUDO_MAP_FD, libbpf.PSEUDO_MAP_VALUE):
            yield place + 4
        place += 2 * _INSTRUCTION if wide else _INSTRUCTION


@dataclass(frozen=True)
class Compiled:
    """`types`: the BTF that describes maps, by the ids it had. `code`: the instructions of each C function;
    where they name a map, they have its number in `maps`. `made_by`: the compiler's files, described."""

    maps: tuple[MapShape, ...]
    types: Mapping[int, bytes]
    code: Mapping[str, bytes]
    made_by: Mapping[str, str]

    def create_maps(self) -> dict[str, int]:
        """Descriptors of new maps, by name. Raises KernelError; nothing is left open then."""
        types: dict[int, int] = {}
        maps: dict[str, int] = {}
        try:
            for number, data in self.types.items():
                types[number] = libbpf.load_types(data)
            for shape in self.maps:
                # The kernel does not cut names, it refuses them.
                short = dataclasses.replace(shape, name=shape.name[: libbpf.NAME_LENGTH])
                maps[shape.name] = libbpf.create_like(short, types.get(shape.types, 0))
        except BaseException:
            for fd in maps.values():
                os.close(fd)
            raise
        finally:
            for fd in types.values():
                os.close(fd)
        return maps

    def link(self, function: str, maps: Mapping[str, int]) -> bytes:
        """A function's instructions, with the descriptors of these maps."""
        linked = bytearray(self.code[function])
        for place in find_references(linked):
            (number,) = struct.unpack_from("=i", linked, place)
            struct.pack_into("=i", linked, place, maps[self.maps[number].name])
        return bytes(linked)

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "maps": [dataclasses.asdict(shape) for shape in self.maps],
            "types": {str(number): _encode(data) for number, data in self.types.items()},
            "code": {function: _encode(code) for function, code in self.code.items()},
            "made_by": dict(self.made_by),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Compiled:
        """What `to_document` made. Raises ValueError if this is nothing that could be loaded."""
        try:
            found = cls(
                tuple(MapShape(**shape) for shape in document["maps"]),
                {int(number): base64.b64decode(data) for number, data in document["types"].items()},
                {function: base64.b64decode(code) for function, code in document["code"].items()},
                dict(document["made_by"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is no record of compiled programs: {error!r}") from error
        found._check()
        return found

    def _check(self) -> None:
        """Everything is there that is asked for."""
        missing = {program.function for program in (*PROGRAMS, *ANSWERS, TAP)} - set(self.code)
        missing |= {*MAPS, *TAP_MAPS} - {shape.name for shape in self.maps}
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        for function, code in self.code.items():
            if len(code) % _INSTRUCTION or not code:
                raise ValueError(f"{function} is cut off")
            for place in find_references(code):
                if not 0 <= struct.unpack_from("=i", code, place)[0] < len(self.maps):
                    raise ValueError(f"{function} refers to a map that is not there")


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
