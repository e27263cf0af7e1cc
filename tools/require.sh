#!/bin/sh
# Says what this machine lacks before anything is installed.
# Usage: tools/require.sh PYTHON. Prints ON or OFF, the value of TILEWISE_NATIVE to install with; fails when nothing can be
# installed at all. A missing compiler is only mentioned, unless TILEWISE_NATIVE=ON asks for it.
set -u
python=$1

say() {
    printf 'tilewise: %s\n' "$@" >&2
}

stop() {
    say "$@"
    exit 1
}

command -v "$python" >/dev/null ||
    stop "no $python found." "Debian or Ubuntu: apt install python3 python3-venv"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    stop "$("$python" --version) found, Python 3.11 to 3.13 needed." "Name another one with: make PYTHON=/path/to/python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python cannot make virtual environments." "Debian or Ubuntu: apt install python3-venv"

case "${TILEWISE_NATIVE:-auto}" in
[Oo][Ff][Ff] | [Nn][Oo] | [Ff]alse | 0)
    echo OFF
    exit 0
    ;;
[Aa][Uu][Tt][Oo]) demanded=no ;;
*) demanded=yes ;;
esac

lacking=
found() {
    command -v "$1" >/dev/null
}
found "${CXX:-c++}" || found g++ || found clang++ || lacking=g++
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    lacking="${lacking:+$lacking }python3-dev"
if [ -z "$lacking" ]; then
    echo ON
    exit 0
fi
[ $demanded = no ] || stop "TILEWISE_NATIVE=$TILEWISE_NATIVE, but this is missing: $lacking" "Debian or Ubuntu: apt install $lacking"
say "the native kernels are left out, for want of: $lacking" "Debian or Ubuntu: apt install $lacking"
echo OFF
