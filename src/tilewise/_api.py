"""The front door: find the arrays' framework, validate, plan, run, give back in the caller's layout."""

from __future__ import annotations

from typing import Any, Literal

from ._arrays import Array, family_of
from .contract import Dropout, Plan
from .kernels import forward_of
from .kernels.native import again
from .masks.algebra import Mask
from .masks.biases import Bias
from .plan.choose import choose
from .plan.explain import with_details
from .validate import prepare, restore


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | float | None = None,
    dropout: Dropout | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    kernel: str | None = None,
    allow_quadratic: bool = False,
    invariance: Literal["batch", "row"] = "batch",
) -> Any:
    """Exact scaled dot-product attention (Vaswani et al., 2017) in memory linear in Sq + Sk.

    Scores are, in this order: scale * q.k, soft cap, bias, mask; then softmax (with sinks), then dropout.

    Args:
        q: queries (B, Hq, Sq, D), float64, float32, float16 or bfloat16; a NumPy array, torch tensor or jax array.
        k: keys (B, Hkv, Sk, D), q's dtype; Hq is a multiple of Hkv, and query head h reads kv head h // (Hq // Hkv).
        v: values (B, Hkv, Sk, Dv), q's dtype.
        mask: who may see whom, from `causal`, `window`, `prefix`, `lengths`, `documents`, `intervals`, `dense`,
            `blocks`, `predicate`, joined by `&`, `|`, `~`; or booleans that broadcast to (B, Hq, Sq, Sk), where True
            means "attend".
        bias: added to the scores: floats that broadcast to (B, Hq, Sq, Sk), or `alibi`, `relative`, `t5`, or a sum.
        scale: factor of q.k; None is 1 / sqrt(D).
        softcap: c > 0 replaces scores s by c * tanh(s / c).
        sinks: (Hq,) floats, or a number; one more exponent in each row's denominator, with no value.
        dropout: `Dropout(p, seed)` on the probabilities.
        layout: "bhsd"; "bshd" takes and gives (B, S, H, D); "thd" takes and gives packed (T, H, D), whose sequences a
            `documents` mask tells apart.
        return_lse: also return the log of each row's denominator, before dropout.
        kernel: run this kernel or raise; None lets the planner choose (see `explain`).
        allow_quadratic: accept a kernel whose memory grows with Sq * Sk.
        invariance: "batch": a row's bits do not depend on what else is computed, where the kernel promises that. "row":
            nor on how many queries are: a row has the same bits in a prefill, in any chunk of one, and alone, for one
            page of instructions, as long as the keys it sees stand at the same places of the key axis; whatever else
            Sq and Sk are. It costs speed where queries are few (see `explain`). Dropout must then be numbered by a
            whole that the call is a part of: `Dropout(first=, strides=)`.

    Returns:
        out (B, Hq, Sq, Dv), q's dtype, in the layout asked for; with `return_lse` the pair (out, lse), lse (B, Hq, Sq)
        in float32 (float64 for float64), natural log; (Hq, T) for "thd". A row that sees nothing has out 0, lse -inf.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
        KernelRefused: the kernel asked for cannot run the problem; every reason is listed.
        QuadraticMemory: the kernel would need memory in Sq * Sk and `allow_quadratic` is False.
    """
    family = family_of(q)
    if family == "torch":
        from .torch.call import attention as torch_attention  # imports torch

        return torch_attention(
            q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout,
            layout=layout, return_lse=return_lse, kernel=kernel, allow_quadratic=allow_quadratic, invariance=invariance,
        )  # fmt: skip
    key = None
    if family == "numpy":
        options = layout, scale, softcap, bool(return_lse), kernel, bool(allow_quadratic), invariance
        key = again.key_of(q, k, v, mask, (bias, sinks, dropout), options)
        if (known := again.find(key)) is not None:
            return known(q, k, v, again.booleans_of(mask))
    call = prepare(
        q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks,
        dropout=dropout, layout=layout, return_lse=return_lse, invariance=invariance,
    )  # fmt: skip
    plan = choose(call.problem, kernel, bool(allow_quadratic))
    if family == "jax":
        from .jax.call import run  # imports jax
    else:
        run = forward_of(plan.kernel).forward
    out, lse = run(plan, call.operands)
    if family == "numpy":
        again.remember(key, plan, call.operands, out, lse, bool(return_lse))
    out, lse = restore(out, lse, layout)
    return (out, lse) if return_lse else out


def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | float | None = None,
    dropout: Dropout | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    kernel: str | None = None,
    allow_quadratic: bool = False,
    invariance: Literal["batch", "row"] = "batch",
) -> Plan:
    """The plan of the same call to `attention`, without running it: print it to read which kernel would run and why.

    Args:
        q, k, v, mask, bias, scale, softcap, sinks, dropout, layout, return_lse, kernel, allow_quadratic, invariance: as
            for `attention`, shapes (B, H, S, D); torch fake tensors and jax tracers will do.

    Returns:
        A `Plan`; `str(plan)` is a table with the kernel, the share of tiles skipped, operations, bytes, workspace, and
        for every other kernel each reason why it was not chosen.

    Raises:
        As `attention`.
    """
    call = prepare(
        q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks,
        dropout=dropout, layout=layout, return_lse=return_lse, invariance=invariance,
    )  # fmt: skip
    return with_details(choose(call.problem, kernel, bool(allow_quadratic)), call.operands.mask)
