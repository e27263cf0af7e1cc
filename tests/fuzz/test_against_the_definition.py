"""Random problems, every kernel against the float64 definition, for as long as one likes: `make fuzz MINUTES=30`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from accuracy import assert_accurate
from hypothesis import strategies as st
from support.conformance import FAMILIES, check
from support.portable_cases import planned
from support.random_problems import dtypes, examples, on_page, pages, search

from tilewise.contract import Operands, Tangents
from tilewise.kernels.reference import dense as reference
from tilewise.plan.preset import Example

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("loud_memory", "roomy")]

PARTS = ("q", "k", "v", "dense", "table", "sinks")


@pytest.mark.parametrize("kernel", ["native", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels(kernel: str, family: str) -> None:
    """out, lse and all gradients."""

    def once(example: Example, dtype: str, gradients: bool, page: str) -> None:
        with on_page(page):
            check(example, kernel, family, dtype, gradients=gradients)

    if family == "jax":
        # XLA's threads read the page's name while they like, so it must not change from call to call; jax has float64
        # only where a whole process asks for it.
        search(once, examples(), dtypes.filter(lambda name: name != "float64"), st.booleans(), st.just(""), examples=10)
    else:
        search(once, examples(), dtypes, st.booleans(), pages())


def test_tangents() -> None:
    """Forward mode of the compiled kernel, where any set of operands moves."""
    native = pytest.importorskip("tilewise.kernels.native.tangent"), pytest.importorskip("tilewise._native")
    from tilewise.kernels.native.forward import forward

    def once(example: Example, dtype: str, moves: set[str], page: str) -> None:
        q, k, v = (array.astype(dtype) for array in (example.q, example.k, example.v))
        plan, operands = planned(q, k, v, kernel="native", tiles=None, **example.options)
        moving = _along(operands)
        moving = replace(moving, **{name: () if name == "dense" else None for name in PARTS if name not in moves})
        with on_page(page):
            found = native[0].tangent(plan, operands, *forward(plan, operands), moving)
        exact = reference.tangents(reference.attention(plan.problem, operands), moving)
        for name, got, truth in zip(("d_out", "d_lse"), found, exact, strict=True):
            assert_accurate(name, got, truth, dtype=plan.problem.dtype)

    search(once, examples(), dtypes, st.sets(st.sampled_from(PARTS), min_size=1), pages())


def _along(operands: Operands) -> Tangents:
    """A direction of every operand; a bias of -inf stays."""
    rng = np.random.default_rng(7)

    def one(x: np.ndarray | None) -> np.ndarray | None:
        if x is None:
            return None
        return np.where(np.isfinite(x.astype("float64")), rng.standard_normal(x.shape), 0).astype(x.dtype)

    q, k, v, table, sinks = (one(getattr(operands, name)) for name in ("q", "k", "v", "table", "sinks"))
    return Tangents(q, k, v, tuple(map(one, operands.dense)), table, sinks)
