"""A call cut in parts, each attended to by itself, merges to the whole: masks, biases, dropout keep their meaning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tilewise as tw
from tilewise import validate
from tilewise.kernels import backward_of, forward_of
from tilewise.masks.part import Run, dropout_part, mask_part, table_part, table_slice
from tilewise.plan.choose import choose

_B, _H, _HKV, _S, _D = 2, 4, 2, 72, 8
_RNG = np.random.default_rng(7)
_SORTED = np.sort(_RNG.integers(0, 4, (_B, _S)), -1)
_MIXED = _RNG.integers(0, 4, (_B, _S))
_MASKS = {
    "none": None,
    "causal": tw.causal(),
    "window and causal": tw.causal() & tw.window(13, 5),
    "documents": tw.causal() & tw.documents(_SORTED),
    "labels": tw.documents(_MIXED) & tw.causal(),
    "bits in place": tw.dense(_RNG.random((_B, 1, _S, _S)) < 0.5),
    "bits by tile": tw.predicate(lambda b, h, i, j: (5 * i + 3 * j + h + b) % 4 > 0) & tw.causal(),
    "several ranges": tw.window(6, 0) | tw.prefix(9),
}
_CUTS = {
    "contiguous": [Run(0, 20), Run(20, 31), Run(51, 21)],
    "stripe": [Run(r, _S // 4, 4) for r in range(4)],
}


def _whole(dtype: str, mask: tw.Mask | None) -> validate.Call:
    arrays = (
        torch.tensor(_RNG.standard_normal((_B, h, _S, _D)), dtype=getattr(torch, dtype)) for h in (_H, _HKV, _HKV)
    )
    table = torch.tensor(_RNG.standard_normal((_H, 2 * _S - 1)), dtype=torch.float32)
    return validate.prepare(
        *arrays, mask=mask, bias=tw.relative(table), scale=None, softcap=None, sinks=None,
        dropout=tw.Dropout(0.3, seed=5), layout="bhsd", return_lse=True,
    )  # fmt: skip


def _part(whole: validate.Call, rows: Run, keys: Run) -> validate.Call:
    o = whole.operands
    operands = replace(
        o, q=rows.of(o.q, 2, torch), k=keys.of(o.k, 2, torch), v=keys.of(o.v, 2, torch),
        mask=mask_part(o.mask, rows, keys), table=table_part(o.table, rows, keys, _S, torch),
        dropout=dropout_part(o.dropout, rows, keys, _H, _S, _S),
    )  # fmt: skip
    problem = replace(
        whole.problem, q_len=rows.count, k_len=keys.count, mask=operands.mask.facts, part=True,
        gradients=frozenset({"q", "k", "v", "table"}),
    )  # fmt: skip
    return validate.Call(problem, operands)


@pytest.mark.parametrize("kernel", ["reference", "portable", "native"])
@pytest.mark.parametrize("cut", list(_CUTS))
@pytest.mark.parametrize("mask", list(_MASKS))
def test_parts_merge_to_the_whole(mask: str, cut: str, kernel: str) -> None:
    whole = _whole("float32", _MASKS[mask])
    plan = choose(whole.problem, "reference", True)
    out, lse = forward_of("reference").forward(plan, whole.operands)
    for rows in _CUTS[cut][1:]:
        pieces = []
        for keys in _CUTS[cut]:
            part = _part(whole, rows, keys)
            pieces += forward_of(kernel).forward(choose(part.problem, kernel, True), part.operands)
        merged, merged_lse = tw.merge(*pieces)
        torch.testing.assert_close(merged, rows.of(out, 2, torch), atol=2e-5, rtol=0)
        torch.testing.assert_close(merged_lse, rows.of(lse, 2, torch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["portable", "native"])
@pytest.mark.parametrize("cut", list(_CUTS))
@pytest.mark.parametrize("mask", list(_MASKS))
def test_gradients_of_parts_add_up(mask: str, cut: str, kernel: str) -> None:
    whole = _whole("float32", _MASKS[mask])
    whole = replace(whole, problem=replace(whole.problem, gradients=frozenset({"q", "k", "v", "table"})))
    plan = choose(whole.problem, "portable", True)
    out, lse = forward_of("portable").forward(plan, whole.operands)
    d_out, d_lse = (
        torch.tensor(_RNG.standard_normal(out.shape), dtype=out.dtype),
        torch.tensor(_RNG.standard_normal(lse.shape)),
    )
    d_lse = d_lse.float()
    expected = backward_of("portable").backward(plan, whole.operands, out, lse, d_out, d_lse)
    sums = {name: torch.zeros_like(getattr(expected, name)) for name in ("q", "k", "v", "table")}
    for rows in _CUTS[cut]:
        for keys in _CUTS[cut]:
            part = _part(whole, rows, keys)
            given = (rows.of(x, 2, torch).contiguous() for x in (out, lse, d_out, d_lse))
            found = backward_of(kernel).backward(choose(part.problem, kernel, True), part.operands, *given)
            rows.of(sums["q"], 2, torch).add_(found.q)
            keys.of(sums["k"], 2, torch).add_(found.k)
            keys.of(sums["v"], 2, torch).add_(found.v)
            sums["table"][..., table_slice(rows, keys, _S)] += found.table
    for name, total in sums.items():
        torch.testing.assert_close(
            total, getattr(expected, name), atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kernel", ["reference", "portable", "native"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_part_is_not_rounded(dtype: str, kernel: str) -> None:
    whole = _whole(dtype, tw.causal())
    part = _part(whole, Run(20, 31), Run(0, 20))
    plan = choose(part.problem, kernel, True)
    out, lse = forward_of(kernel).forward(plan, part.operands)
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.to(getattr(torch, dtype)).float()), (
        "every number fits the narrow type: it was rounded"
    )
    if kernel == "reference":
        return
    d_out = torch.ones_like(out).to(getattr(torch, dtype))
    found = backward_of(kernel).backward(plan, part.operands, out.to(d_out.dtype), lse, d_out, None)
    for gradient in (found.q, found.k, found.v):
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.to(d_out.dtype).float())


def test_runs_of_different_steps_have_no_table() -> None:
    with pytest.raises(ValueError, match=r"^keys: step 2, expected the rows' 1"):
        table_part(torch.zeros(1, 1, 2 * _S - 1), Run(0, 8), Run(0, 8, 2), _S, torch)


@pytest.mark.parametrize("family", ["numpy", "torch", "jax"])
def test_dropout_numbered_as_a_part_draws_the_wholes_bits(family: str) -> None:
    """`first` and `strides` through the public call: heads 2 and 3 of 4, rows 3, 5, … of a larger call."""
    if family == "jax":
        import jax.numpy as jnp
    make = {"numpy": np.asarray, "torch": torch.tensor, "jax": lambda x: jnp.asarray(x)}[family]
    q, k, v = (_RNG.standard_normal((_B, _H, _S, _D)).astype(np.float32) for _ in range(3))
    whole = np.asarray(tw.attention(*map(make, (q, k, v)), dropout=tw.Dropout(0.5, seed=11, stream=3)))
    first = (2 * _S + 3) * _S
    numbered = tw.Dropout(0.5, 11, 3, first=first, strides=(_H * _S * _S, _S * _S, 2 * _S, 1))
    for kernel in ("portable", "native"):
        part = tw.attention(*map(make, (q[:, 2:, 3::2], k[:, 2:], v[:, 2:])), dropout=numbered, kernel=kernel)
        np.testing.assert_allclose(np.asarray(part), whole[:, 2:, 3::2], atol=2e-6)


def test_dropout_numbering_is_checked() -> None:
    q = np.zeros((1, 1, 4, 4), np.float32)
    with pytest.raises(ValueError, match="^dropout: got first without strides"):
        tw.attention(q, q, q, dropout=tw.Dropout(0.5, first=3))
    with pytest.raises(ValueError, match="^dropout: got strides"):
        tw.attention(q, q, q, dropout=tw.Dropout(0.5, strides=(1, 2, 3)))
