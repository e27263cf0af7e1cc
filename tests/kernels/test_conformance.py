"""Every kernel on every problem of the catalogue in every framework, against the float64 oracle.

A kernel is let off only where its card refuses, and then the door must refuse with the same reasons.
"""

from __future__ import annotations

import pytest
from support.conformance import FAMILIES, check

from tilewise.kernels import NAMES
from tilewise.plan.catalog import PRESETS
from tilewise.plan.preset import example

pytestmark = pytest.mark.usefixtures("loud_memory")

KERNELS = [name for name in NAMES if name != "reference"]
# Programs that jax compiles take a second each: there, these stand for the rest unless the slow sweep is asked for.
QUICK = {"bert-base-training", "llama3-8b-chunk", "gpt-oss-20b-local", "interleaved-documents", "swin-t", "mpt-7b",
         "tree-speculation", "big-bird", "packed-varlen", "rows-that-see-nothing"}  # fmt: skip


def _skip_if_refused(reasons: tuple[str, ...]) -> None:
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(family, name, marks=[pytest.mark.slow] if family == "jax" and name not in QUICK else [])
     for family in FAMILIES for name in PRESETS],
)  # fmt: skip
def test_forward_and_gradients(family, name, kernel):
    _skip_if_refused(check(example(PRESETS[name]), kernel, family, "float32", gradients=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_dtypes_in_numpy(name, dtype, kernel):
    _skip_if_refused(check(example(PRESETS[name]), kernel, "numpy", dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_dtypes_in_torch_with_gradients(name, dtype, kernel):
    _skip_if_refused(check(example(PRESETS[name]), kernel, "torch", dtype, gradients=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name", [name if name in ("gpt-oss-20b-local", "swin-t") else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_dtypes_in_jax_with_gradients(name, dtype, kernel):
    _skip_if_refused(check(example(PRESETS[name]), kernel, "jax", dtype, gradients=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["numpy", "torch"])
@pytest.mark.parametrize("name", PRESETS)
def test_forward_alone(name, family, kernel):
    _skip_if_refused(check(example(PRESETS[name], seed=1), kernel, family))


def test_the_reference_conforms_to_itself():
    for name in ("gpt-oss-20b-local", "alphafold-row"):
        assert check(example(PRESETS[name]), "reference", "numpy", gradients=True) == ()
