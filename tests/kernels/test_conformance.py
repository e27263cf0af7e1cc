"""Every kernel on every problem of the catalogue in every framework, against the float64 oracle.

A kernel is let off only where its card refuses, and then the door must refuse with the same reasons.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.conformance import check

from tilewise.kernels import NAMES
from tilewise.plan.catalog import PRESETS
from tilewise.plan.preset import example

pytestmark = pytest.mark.usefixtures("loud_memory")

# Held to the same rule in folders of their own: Triton's kernels in `triton/`, by their interpreter, which needs a
# process of its own, and torch's operators in `aten/`, since they refuse most of the catalogue; cuDNN is
# not here at all, and its card is held to its words in `cudnn/`.
KERNELS = [name for name in NAMES if name not in ("reference", "triton", "aten", "cudnn")]
# Programs that jax compiles take seconds each: there, these stand for the rest unless the slow sweep is asked for.
QUICK = ("bert-base-training", "gpt-oss-20b-local", "interleaved-documents", "swin-t", "rows-that-see-nothing")


def _in_jax(names: tuple[str, ...]) -> list[object]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]


def _skip_if_refused(reasons: tuple[str, ...]) -> None:
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["numpy", "torch"])
@pytest.mark.parametrize("name", PRESETS)
def test_forward_and_gradients(name, family, kernel):
    _skip_if_refused(check(example(PRESETS[name]), kernel, family, gradients=True))


@pytest.mark.parametrize("name", _in_jax(QUICK))
def test_forward_and_gradients_in_jax(name):
    _skip_if_refused(check(example(PRESETS[name]), "portable", "jax", gradients=True))


@pytest.mark.parametrize("name", PRESETS)
def test_native_forward_in_jax(name):
    _skip_if_refused(check(example(PRESETS[name]), "native", "jax"))


# Its derivatives are the portable kernel's: one of each kind shows that they meet.
@pytest.mark.parametrize("name", _in_jax(("mpt-7b",)))
def test_native_gradients_in_jax(name):
    _skip_if_refused(check(example(PRESETS[name]), "native", "jax", gradients=True))


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", _in_jax(("gpt-oss-20b-local",)))
def test_dtypes_in_jax_with_gradients(name, dtype):
    _skip_if_refused(check(example(PRESETS[name]), "portable", "jax", dtype, gradients=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["numpy", "torch"])
@pytest.mark.parametrize("name", PRESETS)
def test_forward_alone(name, family, kernel):
    _skip_if_refused(check(example(PRESETS[name], seed=1), kernel, family))


def test_the_reference_conforms_to_itself():
    for name in ("gpt-oss-20b-local", "alphafold-row"):
        assert check(example(PRESETS[name]), "reference", "numpy", gradients=True) == ()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["numpy", "torch"])
def test_a_cap_low_enough_to_bend_ordinary_scores(family, kernel):
    case = example(PRESETS["gemma2-9b-local"])
    _skip_if_refused(check(replace(case, options={**case.options, "softcap": 0.5}), kernel, family, gradients=True))
