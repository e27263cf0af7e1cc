"""Imports go down only: door, validate, problem, plan, kernel; and importing tilewise costs no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tilewise

SOURCE = Path(tilewise.__file__).parent
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
NOUNS = {"_arrays", "environment", "errors", "problem", "contract", "masks", "version"}

# Where a third-party module may be imported at the top of a file; anywhere else it must wait until it is needed.
HOMES = {
    "torch": ("torch/", "kernels/triton/", "kernels/portable/torch_", "kernels/aten/", "compat/"),
    "jax": ("jax/", "kernels/portable/jax_", "kernels/cudnn/", "kernels/pallas/", "compat/"),
    "flax": ("jax/", "compat/"),
    "triton": ("kernels/triton/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "matplotlib": (),
    "transformers": ("torch/integrations/",),
    "diffusers": ("torch/integrations/",),
}


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, its own package's as `tilewise.…`; those for type checkers are left out."""
    package = ("tilewise", *path.parent.parts)
    body = ast.parse((SOURCE / path).read_text()).body
    for node in _statements(body, top_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def _statements(body: list[ast.stmt], top_only: bool) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        for name in ("body", "orelse", "handlers", "finalbody"):
            yield from _statements(getattr(node, name, []), top_only)


def inside(name: str) -> tuple[str, ...] | None:
    """('masks', 'lower') for 'tilewise.masks.lower.LoweredMask'; None for what is not tilewise's."""
    first, *rest = name.split(".")
    if first != "tilewise":
        return None
    if rest[:1] == ["_native"]:
        return ("_native",)  # the compiled module, which has no source here
    while rest and not ((SOURCE.joinpath(*rest)).is_dir() or SOURCE.joinpath(*rest).with_suffix(".py").exists()):
        rest.pop()
    return tuple(rest)


def targets(path: Path) -> list[tuple[str, ...]]:
    """The modules of tilewise that a file imports, anywhere in it."""
    return [target for name in imports(path) if (target := inside(name)) is not None]


def under(*folders: str) -> list[Path]:
    return [path for path in FILES if path.as_posix().startswith(folders)]


@pytest.mark.parametrize("path", under("masks/", "_arrays", "errors", "problem", "contract"), ids=str)
def test_nouns_import_only_one_another(path):
    allowed = NOUNS | ({"plan"} if path.name == "contract.py" else set())  # a Plan prints itself through plan/explain
    for target in targets(path):
        assert target and target[0] in allowed, f"imports {'.'.join(target)}"


@pytest.mark.parametrize("path", under("kernels/"), ids=str)
def test_kernels_never_import_kernels(path):
    own = path.parts[1] if len(path.parts) > 2 else None
    for target in targets(path):
        assert target, "imports tilewise itself"
        if target[0] == "kernels":
            assert target[1:2] in ((own,), ("state",), ()), f"imports {'.'.join(target)}"
        else:
            assert target[0] in NOUNS | {"philox", "_native", "_remembered"}, f"imports {'.'.join(target)}"


@pytest.mark.parametrize("path", under("kernels/"), ids=str)
def test_cards_load_no_framework_and_nothing_compiled(path):
    if path.name == "card.py":
        for name in imports(path, top_only=True):
            assert name.split(".")[0] not in HOMES and "_native" not in name, f"imports {name}"


def test_validation_knows_no_plan_and_planning_no_validation():
    for path in under("validate/"):
        for target in targets(path):
            assert target[0] in NOUNS | {"validate"}, f"{path} imports {'.'.join(target)}"
    for path in under("plan/"):
        for target in targets(path):
            assert target[0] in NOUNS | {"plan", "kernels"}, f"{path} imports {'.'.join(target)}"


@pytest.mark.parametrize("path", under("distributed/"), ids=str)
def test_schedules_are_integers_and_know_no_framework(path):
    explaining = {"validate", "plan"} if path.name == "explain.py" else set()
    for target in targets(path):
        assert target[0] in NOUNS | {"distributed"} | explaining, f"imports {'.'.join(target)}"


def test_philox_is_a_noun_too():
    assert {target[0] for target in targets(Path("philox.py"))} <= NOUNS


def test_doors_of_frameworks_do_not_know_one_another():
    for family, other in (("torch", "jax"), ("jax", "torch")):
        for path in under(f"{family}/"):
            assert all(target[:1] != (other,) for target in targets(path)), f"{path} imports tilewise.{other}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_frameworks_are_imported_at_home_or_late(path):
    for name in imports(path, top_only=True):
        first = name.split(".")[0]
        if first in HOMES:
            assert path.as_posix().startswith(HOMES[first] or ("nowhere",)), f"imports {name} at its top"


HEAVY = ("torch", "jax", "matplotlib")
PROBE = f"import sys; {{before}}import tilewise; print([name for name in {HEAVY} if name in sys.modules])"


def _loaded(before: str = "") -> str:
    return subprocess.run(
        [sys.executable, "-c", PROBE.format(before=before)], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_tilewise_imports_no_framework():
    assert _loaded() == "[]"


def test_the_test_above_would_notice():
    pytest.importorskip("torch")
    assert _loaded("import torch; ") == "['torch']"


def test_numpy_calls_import_no_framework():
    call = "import numpy as n; a = n.ones((1, 1, 3, 4)); import tilewise as t; t.attention(a, a, a, mask=t.causal()); "
    assert _loaded(call) == "[]"


def test_the_reader_of_imports_reads_them():
    assert ("masks", "lower") in targets(Path("validate/call.py"))
    assert inside("tilewise.masks.lower.LoweredMask") == ("masks", "lower") and inside("numpy.linalg") is None
    assert "jax" in [name.split(".")[0] for name in imports(Path("kernels/portable/jax_scan.py"), top_only=True)]
