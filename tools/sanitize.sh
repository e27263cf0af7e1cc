#!/bin/sh
# Builds the compiled module with a sanitizer and runs tests on it; what the sanitizer finds ends the run.
# Usage: tools/sanitize.sh address|thread [PYTEST ARGUMENTS]. "address" is AddressSanitizer with
# UndefinedBehaviorSanitizer, "thread" is ThreadSanitizer. PYTHON names the interpreter (default .venv/bin/python),
# TILEWISE_BUILD the folder for the build (default build/sanitize), TILEWISE_PAGES the pages to build and test, as
# "avx512 scalar" (default: all). Without arguments: tests/native, and the conformance suite's calls of the native kernel
# from NumPy.
set -eu
cd "$(dirname "$0")/.."
kind=${1:?address or thread}
shift
python=${PYTHON:-.venv/bin/python}
case "$python" in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
case "$kind" in
address) sanitizers=address,undefined library=libasan.so ;;
thread) sanitizers=thread library=libtsan.so ;;
*) echo "tools/sanitize.sh: $kind is not address or thread" >&2 && exit 2 ;;
esac
[ $# -gt 0 ] || set -- tests/native tests/kernels/test_conformance.py -k "not build and not fork and not jax and not torch and native"

build=${TILEWISE_BUILD:-build/sanitize}/$kind
PATH=$(dirname "$python"):$PATH cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$python" \
    -DTILEWISE_SANITIZE=$sanitizers -DTILEWISE_PAGES="$(echo "${TILEWISE_PAGES:-}" | tr ' ' ';')" >/dev/null
PATH=$(dirname "$python"):$PATH cmake --build "$build" --target _native

TILEWISE_SANITIZED=$(ls "$build"/_native*.so)
export TILEWISE_SANITIZED PYTHONPATH=tools OMP_NUM_THREADS=1 TILEWISE_NUM_THREADS="${TILEWISE_NUM_THREADS:-3}"
# The interpreter is not instrumented, so the library comes first by force, and the C++ library with it, or it could not
# follow exceptions. What Python itself never frees is no finding.
compiler=${CXX:-g++}
export LD_PRELOAD="$("$compiler" -print-file-name=$library) $("$compiler" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=66 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:exitcode=66
exec "$python" -m pytest -q -p sanitized -p no:cacheprovider "$@"
