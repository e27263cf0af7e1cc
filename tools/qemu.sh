#!/bin/sh
# Runs the native tests on processors that this machine is not: the core is built as a program (tools/qemu/server.cpp),
# qemu runs it as the processor named, and pytest sends it every call (tools/qemu/emulated.py).
# Usage: tools/qemu.sh [PYTEST ARGUMENTS]. PYTHON names the interpreter (default .venv/bin/python), TILEWISE_BUILD the folder
# for the builds (default build/qemu). Without arguments: tests/native, and the conformance suite's calls of the native
# kernel. Needs qemu-aarch64 and a compiler for it; qemu-x86_64 too where this machine is one, to be an older one.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
case "$python" in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
build=${TILEWISE_BUILD:-build/qemu}
PATH=$(dirname "$python"):$PATH
cross=${TILEWISE_AARCH64_CXX:-aarch64-linux-gnu-g++}

for needed in cmake qemu-aarch64 "$cross"; do
    command -v "$needed" >/dev/null && continue
    echo "tools/qemu.sh: $needed is missing. Debian or Ubuntu: apt install qemu-user g++-aarch64-linux-gnu" >&2
    exit 1
done
# Left out: what needs the module itself, or more time than emulation leaves; and jax, whose calls do not pass through
# Python.
if [ $# -eq 0 ]; then
    own="pages or row_bits or facts or sizes or nothing or tangents or dense_masks or row_invariance or sequences or few_keys"
    set -- tests/native/test_pages.py tests/native/test_gradients.py tests/native/test_row_bits.py \
        tests/native/test_tangents.py tests/native/test_dense_masks.py tests/native/test_row_invariance.py \
        tests/native/test_sequences.py tests/native/test_few_keys.py tests/kernels/test_conformance.py \
        -k "not jax and ($own or (conformance and native))"
fi

# server FOLDER CMAKE-ARGUMENTS
server() {
    folder=$1
    shift
    cmake -S . -B "$build/$folder" -G Ninja -DTILEWISE_SERVER=ON "$@" >/dev/null
    cmake --build "$build/$folder"
}

export PYTHONPATH=tools/qemu OMP_NUM_THREADS=1 TILEWISE_NUM_THREADS="${TILEWISE_NUM_THREADS:-2}"
# as EMULATOR PROCESSOR FOLDER PAGES PYTEST-ARGUMENTS: the pages are those that such a processor runs, best first.
as() {
    export TILEWISE_SERVER="$1 -cpu $2 $build/$3/tilewise_server" TILEWISE_PAGES="$4"
    shift 4
    "$python" -m pytest -q -p emulated -p no:cacheprovider "$@"
}

server aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$cross"
as qemu-aarch64 max aarch64 "neon_bf16 neon scalar" "$@"
# The same code: only what chooses it differs.
export NM="${cross%g++}nm" TILEWISE_OBJECTS="$build/aarch64"
as qemu-aarch64 cortex-a72 aarch64 "neon scalar" tests/native/test_pages.py tests/native/test_build.py -k "facts or weak"

[ "$(uname -m)" = x86_64 ] || exit 0
command -v qemu-x86_64 >/dev/null || { echo "tools/qemu.sh: qemu-x86_64 is missing" >&2 && exit 1; }
server x86_64
as qemu-x86_64 Haswell x86_64 "avx2 scalar" "$@"
as qemu-x86_64 Nehalem x86_64 "scalar" tests/native/test_pages.py
