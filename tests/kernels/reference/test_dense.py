"""The oracle against the definition written as loops, its gradients against finite differences, and its blindness."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.portable_cases import CASES, arrays, planned

import tilewise as tw
from tilewise.contract import Tangents
from tilewise.kernels.reference.dense import attention, gradients, tangents


def _same(value):
    return value


def by_loops(plan, operands):
    """out and lse of the plain case: scale, cap, bias, mask, softmax, sink; one number at a time."""
    p, (q, k, v) = plan.problem, (operands.q, operands.k, operands.v)
    out, lse = np.zeros((p.batch, p.q_heads, p.q_len, p.value_dim)), np.full((p.batch, p.q_heads, p.q_len), -math.inf)
    for b, h, i in np.ndindex(lse.shape):
        terms = []
        for j in range(p.k_len):
            s = p.scale * sum(q[b, h, i, d] * k[b, h // p.group, j, d] for d in range(p.head_dim))
            s = p.softcap * math.tanh(s / p.softcap) if p.softcap else s
            for bias in operands.dense:
                s += np.broadcast_to(bias, (p.batch, p.q_heads, p.q_len, p.k_len))[b, h, i, j]
            if operands.table is not None:
                s += np.broadcast_to(operands.table, (p.batch, p.q_heads, p.q_len + p.k_len - 1))[
                    b, h, j - i + p.q_len - 1
                ]
            seen = operands.mask.visible(slice(i, i + 1), slice(j, j + 1))
            seen = seen is None or np.broadcast_to(seen, (p.batch, p.q_heads, 1, 1))[b, h, 0, 0]
            if seen and s != -math.inf:
                terms.append((math.exp(s), v[b, h // p.group, j]))
        if terms:
            sink = math.exp(operands.sinks[h]) if operands.sinks is not None else 0.0
            total = math.fsum(e for e, _ in terms) + sink
            out[b, h, i], lse[b, h, i] = sum(e * value for e, value in terms) / total, math.log(total)
    return out, lse


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dropout", "everything")])
def test_definition(name):
    plan, operands = planned(**arrays(), **CASES[name](_same))
    dense, (out, lse) = attention(plan.problem, operands), by_loops(plan, operands)
    np.testing.assert_allclose(dense.out, out, atol=1e-13)
    np.testing.assert_allclose(dense.lse, lse, atol=1e-13)


def test_dropout_is_on_probabilities():
    plan, operands = planned(**arrays(), dropout=tw.Dropout(0.4, 3))
    dense = attention(plan.problem, operands)
    assert set(np.unique(dense.z)) == {0.0, 1 / 0.6}
    np.testing.assert_allclose(dense.out, (dense.p * dense.z) @ dense.v, atol=1e-14)
    np.testing.assert_allclose(dense.lse, attention(plan.problem, replace(operands, dropout=None)).lse)


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_finite_differences(name):
    plan, operands = planned(**arrays(), **CASES[name](_same))
    dense = attention(plan.problem, operands)
    rng = np.random.default_rng(1)
    d_out, d_lse = rng.standard_normal(dense.out.shape), rng.standard_normal(dense.lse.shape)
    got = gradients(dense, d_out, d_lse)

    def value(changed):
        result = attention(plan.problem, changed)
        return (result.out * d_out).sum() + np.where(result.lse == -np.inf, 0.0, result.lse * d_lse).sum()

    def check(gradient, array, put):
        direction = np.where(np.isfinite(array), rng.standard_normal(array.shape), 0.0)
        step = 1e-6
        difference = (value(put(array + step * direction)) - value(put(array - step * direction))) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-7)

    for field in ("q", "k", "v", "table", "sinks"):
        array = getattr(operands, field)
        if array is not None:
            check(getattr(got, field), array, lambda value, field=field: replace(operands, **{field: value}))
    given = operands.dense
    for n, array in enumerate(given):
        check(got.dense[n], array, lambda value, n=n: replace(operands, dense=(*given[:n], value, *given[n + 1 :])))


@pytest.mark.parametrize("name", CASES)
def test_tangents_by_finite_differences(name):
    plan, operands = planned(**arrays(), **CASES[name](_same))
    rng, step = np.random.default_rng(1), 1e-6

    def along(array):
        return None if array is None else np.where(np.isfinite(array), rng.standard_normal(array.shape), 0.0)

    def moved(sign):
        given = {n: getattr(operands, n) for n in ("q", "k", "v", "table", "sinks")}
        shifted = {n: None if x is None else x + sign * step * getattr(moving, n) for n, x in given.items()}
        dense = tuple(x + sign * step * d for x, d in zip(operands.dense, moving.dense, strict=True))
        return attention(plan.problem, replace(operands, dense=dense, **shifted))

    moving = Tangents(
        *(along(x) for x in (operands.q, operands.k, operands.v)),
        tuple(map(along, operands.dense)),
        along(operands.table),
        along(operands.sinks),
    )
    d_out, d_lse = tangents(attention(plan.problem, operands), moving)
    up, down = moved(1), moved(-1)
    np.testing.assert_allclose(d_out, (up.out - down.out) / (2 * step), rtol=1e-6, atol=1e-8)
    seen = up.lse != -np.inf
    np.testing.assert_allclose(d_lse[seen], (up.lse[seen] - down.lse[seen]) / (2 * step), rtol=1e-6, atol=1e-8)
    assert not d_lse[~seen].any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_out_and_in(dtype):
    operands = {name: array.astype(dtype) for name, array in arrays().items()}
    out, lse = tw.attention(**operands, kernel="reference", allow_quadratic=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_torch_in_and_out(dtype):
    torch = pytest.importorskip("torch")
    operands = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in arrays().items()}
    out, lse = tw.attention(**operands, kernel="reference", allow_quadratic=True, return_lse=True)
    assert out.dtype == getattr(torch, dtype) and lse.dtype in (torch.float32, torch.float64)


def test_refuses_quadratic_memory_unasked():
    with pytest.raises(tw.QuadraticMemory, match="allow_quadratic"):
        tw.attention(**arrays(), kernel="reference")
