"""The structs of native/core/problem.h, read from its text, so that there is no second copy to keep in step."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_NUMBERS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "double": ctypes.c_double,
}


def structs(header: Path) -> dict[str, type[ctypes.Structure]]:
    """Every struct of the header by name, laid out as 64-bit machines do, this one and the emulated."""
    text = re.sub(r"//.*", "", header.read_text())
    constants = {name: int(value) for name, value in re.findall(r"(TW_\w+) = (-?\d+)", text)}
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        fields = [field for declaration in body.split(";") for field in _fields(declaration, found, constants)]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def _fields(declaration: str, known: dict[str, type[ctypes.Structure]], constants: dict[str, int]) -> list[tuple]:
    words = declaration.replace("const ", "").strip()
    if not words:
        return []
    kind, names = words.split(None, 1)
    fields = []
    for name in names.split(","):
        stars, plain, size = re.fullmatch(r"\s*(\**)(\w+)(?:\[(.+)\])?\s*", name).groups()
        one = ctypes.c_uint64 if stars else _NUMBERS.get(kind) or known[kind]
        length = size and sum(constants.get(term.strip()) or int(term) for term in size.split("+"))
        fields.append((plain, one * length if length else one))
    return fields
