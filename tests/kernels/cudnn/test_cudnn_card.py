"""The limits of cuDNN's card, on problems of a GPU that need not be here; and what it would hand to jax.nn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tilewise as tw
from tilewise.contract import Operands
from tilewise.errors import KernelRefused
from tilewise.kernels import forward_of
from tilewise.masks.lower import lower
from tilewise.masks.site import Site
from tilewise.plan.choose import choose
from tilewise.problem import AttentionProblem, BiasFacts

BASE = AttentionProblem(
    family="jax", device="cuda", dtype="bfloat16", batch=2, q_heads=4, kv_heads=2, q_len=64, k_len=64, head_dim=64,
    value_dim=64, scale=0.125, gradients=frozenset({"q", "k", "v"}), traced=True,
)  # fmt: skip


def masked(mask: tw.Mask | None, **changes: Any) -> AttentionProblem:
    problem = replace(BASE, **changes)
    return replace(problem, mask=lower(mask, Site(2, 4, problem.q_len, problem.k_len)).facts)


TAKEN = {
    "plain": (masked(None), {}),
    "causal": (masked(tw.causal()), {"is_causal": True}),
    "causal from the first key": (masked(tw.causal("start"), k_len=96), {"is_causal": True}),
    "window": (masked(tw.causal() & tw.window(7, 0)), {"is_causal": True, "local_window_size": (7, 0)}),
    "wide, on Hopper": (masked(None, head_dim=256, value_dim=256, architecture="sm_90"), {}),
}
REFUSED = {
    "float32": (masked(None, dtype="float32"), "dtype"),
    "the CPU": (masked(None, device="cpu"), "device"),
    "wide": (masked(None, head_dim=256, value_dim=256), "up to 128"),
    "wide, on Ampere": (masked(None, head_dim=256, value_dim=256, architecture="sm_80"), "up to 128"),
    "odd width": (masked(None, head_dim=60, value_dim=60), "multiples of 8"),
    "narrow values": (masked(None, value_dim=32), "q's head dimension"),
    "causal to the last key": (masked(tw.causal("end"), k_len=96), "causal from the first key"),
    "window alone": (masked(tw.window(7, 0)), "jax#39576"),
    "lengths": (masked(tw.lengths(k=np.array([5, 64]))), "causal from the first key"),
    "array": (masked(tw.dense(np.random.default_rng(0).random((64, 64)) < 0.5)), "jax#28974"),
    "unseeing rows": (masked(tw.causal("start") & tw.window(7, 0, "start"), q_len=96), "would see nothing"),
    "bias": (masked(None, bias=BiasFacts(((1, 1, 64, 64),)), gradients=frozenset({"bias"})), "jax#30593"),
    "table": (masked(None, bias=BiasFacts((), True)), "distance"),
    "softcap": (masked(None, softcap=5.0), "soft cap"),
    "sinks": (masked(None, sinks=True), "sinks"),
    "dropout": (masked(None, dropout=0.1), "fixed seed"),
    "lse": (masked(None, return_lse=True), "16 bits"),
    "part": (masked(None, part=True), "added up"),
    "nothing": (masked(None, q_len=0), "without queries"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_fits_runs_by_name_and_never_unasked(name: str) -> None:
    problem, _ = TAKEN[name]
    plan = choose(problem, "cudnn")
    assert (plan.kernel, plan.backward) == ("cudnn", "cudnn")
    assert "cudnn" in str(plan)
    assert choose(problem).refusals["cudnn"] == ("it runs only when asked for by name",)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    problem, reason = REFUSED[name]
    with pytest.raises(KernelRefused, match=reason):
        choose(problem, "cudnn")


@pytest.mark.parametrize("name", TAKEN)
def test_what_jax_is_handed_computes_the_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN is not here: jax's plain implementation stands in, under the keywords that cuDNN would be called with."""
    jax = pytest.importorskip("jax")
    problem, expected = TAKEN[name]
    inner, seen = jax.nn.dot_product_attention, {}

    def plain(*arrays: Any, implementation: str, **keywords: Any) -> Any:
        seen.update(keywords, implementation=implementation)
        return inner(*arrays, implementation="xla", **keywords)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    rng = np.random.default_rng(0)
    p = problem
    shapes = (p.q_heads, p.q_len, p.head_dim), (p.kv_heads, p.k_len, p.head_dim), (p.kv_heads, p.k_len, p.value_dim)
    q, k, v = (jax.numpy.asarray(rng.standard_normal((p.batch, *shape)), "bfloat16") for shape in shapes)
    masks = {"causal": tw.causal(), "causal from the first key": tw.causal("start")}
    mask = {**masks, "window": tw.causal() & tw.window(7, 0)}.get(name)
    operands = Operands(q, k, v, lower(mask, Site(p.batch, p.q_heads, p.q_len, p.k_len)))
    out, lse = forward_of("cudnn").forward(choose(problem, "cudnn"), operands)
    wanted = tw.attention(*(np.asarray(x, np.float64) for x in (q, k, v)), mask=mask, scale=p.scale)
    assert seen == {**expected, "implementation": "cudnn", "scale": p.scale}
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=0.03)
    assert np.isnan(lse).all()
