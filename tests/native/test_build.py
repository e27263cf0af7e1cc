"""Laws of the compiled objects: no code is shared between pages; XLA's structs are declared as XLA declares them."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.stem for path in (ROOT / "native/isa").glob("*.cpp"))
# Pages for other processors are asked there, or under qemu (tools/qemu.sh).
COMPILED = import_module("tilewise._native").build_info()["pages"] if find_spec("tilewise._native") else ()


@pytest.mark.parametrize("page", COMPILED)
def test_pages_have_no_weak_symbols(page: str) -> None:
    # A weak symbol compiled for one instruction set may be linked into the code of another.
    build, nm = os.environ.get("TILEWISE_OBJECTS", "build/*"), os.environ.get("NM", "nm")
    objects = list(ROOT.glob(f"{build}/CMakeFiles/tilewise_page_{page}.dir/native/isa/{page}.cpp.o"))
    if not objects or not shutil.which(nm):
        pytest.skip(f"no build folder, or no {nm}")
    for path in objects:
        lines = subprocess.run([nm, path], check=True, capture_output=True, text=True).stdout.splitlines()
        kinds = {line.split()[-1]: line.split()[-2] for line in lines}
        assert not [name for name, kind in kinds.items() if kind in "WwVvu"]
        assert [name for name, kind in kinds.items() if kind in "DRT"] == [f"tw_page_{page}"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_include_no_library_headers(page: str) -> None:
    sources = [ROOT / f"native/isa/{page}.cpp", *(ROOT / "native/kernel").glob("*.h")]
    included = {line for path in sources for line in path.read_text().splitlines() if line.startswith("#include <")}
    assert included == {f"#include <{name}.h>" for name in ("stddef", "stdint", "immintrin", "arm_neon")}


_STRUCTS = {
    "Extension": ("XLA_FFI_Extension_Base", {"type": "type", "next": "next"}),
    "Buffer": ("XLA_FFI_Buffer", {"dtype": "dtype", "data": "data", "rank": "rank", "dims": "dims"}),
    "Span": ("XLA_FFI_ByteSpan", {"text": "ptr", "length": "len"}),
    "Scalar": ("XLA_FFI_Scalar", {"dtype": "dtype", "value": "value"}),
    "Attributes": ("XLA_FFI_Attrs", {"size": "size", "types": "types", "names": "names", "items": "attrs"}),
    "ErrorRequest": ("XLA_FFI_Error_Create_Args", {"message": "message", "code": "errc"}),
    "Version": ("XLA_FFI_Api_Version", {"major": "major_version", "minor": "minor_version"}),
    "Metadata": ("XLA_FFI_Metadata", {"version": "api_version"}),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", {"metadata": "metadata"}),
    "Api": ("XLA_FFI_Api", {"version": "api_version", "create_error": "XLA_FFI_Error_Create"}),
    "tw_xla_call_frame": (
        "XLA_FFI_CallFrame",
        {"api": "api", "stage": "stage", "arguments": "args", "results": "rets", "attributes": "attrs"},
    ),
}
_NUMBERS = {
    "ARGUMENT_BUFFER": "XLA_FFI_ArgType_BUFFER",
    "ATTRIBUTE_SCALAR": "XLA_FFI_AttrType_SCALAR",
    "STAGE_EXECUTE": "XLA_FFI_ExecutionStage_EXECUTE",
    "EXTENSION_METADATA": "XLA_FFI_Extension_Metadata",
    "INVALID_ARGUMENT": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED": "XLA_FFI_Error_Code_UNIMPLEMENTED",
    **{name: f"XLA_FFI_DataType_{name}" for name in ("PRED", "S32", "S64", "U32", "U64", "F16", "F32", "F64", "BF16")},
}


def test_xla_structs(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    headers = ("<stddef.h>", '"xla/ffi/api/c_api.h"', '"bind/xla_c_api.h"')
    checks = [*(f"#include {header}" for header in headers), "using namespace tw_xla;"]
    for ours, (theirs, fields) in _STRUCTS.items():
        for mine, field in fields.items():
            checks.append(f'static_assert(offsetof({ours}, {mine}) == offsetof({theirs}, {field}), "{ours}.{mine}");')
    checks += [f'static_assert(int({ours}) == int({theirs}), "{ours}");' for ours, theirs in _NUMBERS.items()]
    source = tmp_path / "compare.cpp"
    source.write_text("\n".join(checks))
    includes = ["-I", str(ROOT / "native"), "-I", jax.ffi.include_dir()]
    result = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", *includes, source],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
