# The commands of this repository. `make` alone lists them.
#
# All of them use .venv, which they make themselves and bring up to date when constraints.txt, pyproject.toml or the
# native sources change. Python sources are used in place, so editing them needs no step at all.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.h')

# Tests run in one process per core. Our own kernels may use two threads in each, so that what only happens with several
# is tested; torch gets one, since its waiting threads would take the cores from the other processes.
PYTEST := OMP_NUM_THREADS=1 TILEWISE_NUM_THREADS=2 $(BIN)/python -m pytest -n auto --maxprocesses=8

.DEFAULT_GOAL := help
.PHONY: help venv test test-slow lint types format demo bench sanitize qemu fuzz clean

# How long `make fuzz` searches.
MINUTES ?= 30


help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1  /p' $(MAKEFILE_LIST) | awk -F'  ' '{printf "make %-10s %s\n", $$1, $$2}'

venv: .venv/installed  ## make .venv and install into it all that the other commands use

test: lint types  ## check style and types, then run the tests
	$(PYTEST)

test-slow: venv  ## run the sweeps that are too heavy for every change
	$(PYTEST) -m slow

lint: venv  ## check style (ruff, clang-format)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	find native tools -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

types: venv  ## check types (mypy, strict for the public interface)
	$(BIN)/mypy

format: venv  ## format everything and make the repairs that ruff can make by itself
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .
	find native tools -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

demo: venv  ## run the main job on real input, with progress
	$(BIN)/python examples/demo.py

bench: venv  ## measure this machine: ours beside every installed peer, speed and memory; JSON and pictures under benchmarks/results
	$(BIN)/tilewise bench --out benchmarks/results
	$(BIN)/python benchmarks/memory.py --out benchmarks/results

sanitize: venv  ## run the native kernels' tests under AddressSanitizer with UBSan, then under ThreadSanitizer
	sh tools/sanitize.sh address
	sh tools/sanitize.sh thread

qemu: venv  ## run the native kernels' tests on emulated processors: ARM with and without bfloat16, older x86
	sh tools/qemu.sh

fuzz: venv  ## hold random problems against the definition for MINUTES=30
	TILEWISE_FUZZ_MINUTES=$(MINUTES) OMP_NUM_THREADS=1 TILEWISE_NUM_THREADS=2 $(BIN)/python -m pytest -q -m fuzz tests/fuzz

clean:  ## remove .venv and everything else that was made
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@sh tools/require.sh $(PYTHON) >/dev/null
	@$(PYTHON) -m venv .venv

# The tools of the build come first, and the build then runs without isolation: cmake sees the same paths each time and
# recompiles only what changed. Where there is a compiler a failed build is an error here, not a pure Python install, so
# that the tests never pass by leaving out the native kernels unnoticed.
.venv/tools: constraints.txt | $(BIN)/python
	@$(PIP) install -c constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@

.venv/installed: .venv/tools pyproject.toml $(NATIVE)
	@echo "installing into .venv; the first time this takes some minutes"
	@native=$$(sh tools/require.sh $(BIN)/python) && TILEWISE_NATIVE=$$native \
	  $(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,dev,jax]'
	@touch $@
