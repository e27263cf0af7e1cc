"""The operators for GPUs without a GPU: their signatures, and their conventions acted out on the CPU.

The actors compute what the operators are documented to compute and give it back in the operators' own ways: lse with an
axis too many, or padded with infinity, or infinite for a sum that is not a number; bits of a masked key that leak.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from accuracy import assert_accurate  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.contract import Plan, Tiles  # noqa: E402
from tilewise.kernels.aten import calls  # noqa: E402
from tilewise.kernels.aten.backward import backward  # noqa: E402
from tilewise.kernels.aten.forward import forward  # noqa: E402
from tilewise.kernels.reference import dense as reference  # noqa: E402
from tilewise.validate import prepare  # noqa: E402

Tensor = torch.Tensor
DEFAULTS: dict[str, Any] = dict.fromkeys(("mask", "bias", "scale", "softcap", "sinks", "dropout"))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    s = scale * q.float() @ k.float().transpose(-1, -2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = s if bias is None else s + bias.float()
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf) if causal else s


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Plain attention as the operators do it: what is masked is multiplied by zero."""
    s = _scores(q, k, bias, causal, scale)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return (p @ v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)).to(q.dtype), lse


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    p = torch.exp(_scores(q, k, bias, causal, scale) - lse[..., None])
    d_s = p * (d_out.float() @ v.float().transpose(-1, -2) - (d_out.float() * out.float()).sum(-1, keepdim=True))
    found = scale * d_s @ k.float(), scale * d_s.transpose(-1, -2) @ q.float(), p.transpose(-1, -2) @ d_out.float()
    return (*(x.to(q.dtype) for x in found), d_s.to(q.dtype))


class Actors:
    """torch.ops.aten with the operators for GPUs played on the CPU; those called are noted."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def _scaled_dot_product_flash_attention(self, q, k, v, p, causal, debug, *, scale):
        self.called.append("flash")
        out, lse = _forward(q, k, v, None, causal, scale)
        return (
            out,
            torch.where(torch.isnan(lse) | (lse == -math.inf), math.inf, lse),
            None,
            None,
            0,
            0,
            None,
            None,
            None,
        )

    def _scaled_dot_product_flash_attention_backward(
        self, d_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, p, causal, seed, offset, *, scale
    ):
        assert out.is_contiguous() and d_out.is_contiguous() and (max_q, max_k) == (q.shape[2], k.shape[2])
        return _backward(d_out, q, k, v, None, out, lse, causal, scale)[:3]

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, want_lse, p, causal, debug, *, scale):
        self.called.append("cudnn")
        out, lse = _forward(q, k, v, bias, causal, scale)
        return out, lse[..., None], None, None, 0, 0, None, None, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, d_out, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, p, causal, *, scale
    ):
        assert lse.shape == q.shape[:3]
        return _backward(d_out, q, k, v, bias, out, lse, causal, scale)[:3]

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, want_lse, p, causal, *, scale):
        self.called.append("efficient")
        assert bias is None or (bias.shape == (*q.shape[:3], k.shape[2]) and bias.stride(-1) == 1)
        assert bias is None or all(stride % (16 // bias.element_size()) == 0 for stride in bias.stride()[:3])
        out, lse = _forward(q, k, v, bias, causal, scale)
        padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), math.inf)
        padded[..., : lse.shape[2]] = torch.where(lse == -math.inf, math.inf, lse)
        return out, padded, None, None

    def _efficient_attention_backward(
        self, d_out, q, k, v, bias, out, cum_q, cum_k, max_q, max_k, lse, p, seed, offset, mask_type, want_bias, *,
        scale, num_splits_key,
    ):  # fmt: skip
        assert out.is_contiguous() and lse.shape[2] % 32 == 0 and num_splits_key == 1 and mask_type in (0, 1)
        assert (lse[..., max_q:] == math.inf).all()
        d_out, q, k, v, out = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
        d_q, d_k, d_v, d_bias = _backward(d_out, q, k, v, bias, out, lse[..., :max_q], bool(mask_type), scale)
        turned = (x.transpose(1, 2) for x in (d_q, d_k, d_v))
        return (*turned, d_bias if want_bias else torch.empty(0))


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    found = Actors()
    monkeypatch.setattr(calls, "_aten", found)
    return found


def call(q_len: int = 40, k_len: int = 40, kv_heads: int = 2, layout: str = "bhsd", **options: Any) -> Any:
    random = torch.Generator().manual_seed(4)
    shapes = ((2, 2, q_len, 16), (2, kv_heads, k_len, 16), (2, kv_heads, k_len, 16))
    q, k, v = (torch.randn(shape, generator=random).to(torch.bfloat16) for shape in shapes)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return prepare(q, k, v, **(DEFAULTS | options), layout=layout, return_lse=False)


def run(made: Any, way: str, wanted: frozenset[str] = frozenset({"q", "k", "v"})) -> tuple[Any, ...]:
    """(plan, out, lse, gradients, gradient to out) of the kernel by one way."""
    problem = replace(made.problem, gradients=wanted)
    plan = Plan(
        problem, "aten", "aten", Tiles(0, 0), 0, {}, way=way, backward_way=way, careful="portable"
    )  # fmt: skip
    out, lse = forward(plan, made.operands)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return plan, out, lse, backward(plan, made.operands, out, lse, d_out, torch.zeros_like(lse)), d_out


def hold(made: Any, way: str, wanted: frozenset[str] = frozenset({"q", "k", "v"})) -> None:
    plan, out, lse, found, d_out = run(made, way, wanted)
    exact = reference.attention(plan.problem, made.operands)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and lse.is_contiguous()
    assert (out.transpose(1, 2) if plan.problem.layout == "bshd" else out).is_contiguous()
    assert_accurate("out", out, exact.out)
    assert_accurate("lse", lse, exact.lse)
    truth = reference.gradients(exact, d_out, None)
    for name in ("q", "k", "v"):
        assert_accurate(name, getattr(found, name), getattr(truth, name))
    for got, want in zip(found.dense, truth.dense, strict=True):
        if "bias" in wanted:
            assert_accurate("bias", got, want)
        else:
            assert got is None


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("mask", [None, tw.causal()])
@pytest.mark.parametrize("way", ["cudnn", "flash", "efficient"])
def test_results_are_brought_to_one_form(actors: Actors, way: str, mask: tw.Mask | None, layout: str) -> None:
    hold(call(mask=mask, layout=layout), way)
    assert actors.called == [way]


@pytest.mark.parametrize("way", ["cudnn", "efficient"])
@pytest.mark.parametrize("leading", [(2, 2), (1, 2), (1, 1)])
def test_biases(actors: Actors, way: str, leading: tuple[int, int]) -> None:
    wide = torch.randn(*leading, 40, 41).to(torch.bfloat16)
    hold(call(bias=wide[..., :40]), way)  # rows that begin at odd places are copied
    if way == "efficient" and leading == (2, 2):
        hold(call(bias=wide[..., :40].contiguous()), way, frozenset({"q", "k", "v", "bias"}))


@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("way", ["cudnn", "flash", "efficient"])
def test_what_is_masked_cannot_be_seen(actors: Actors, way: str, operand: str) -> None:
    made = call(mask=tw.causal())
    getattr(made.operands, operand)[:, :, 25] = torch.nan
    with np.errstate(all="ignore"):
        hold(made, way)


def test_a_bias_that_masks(actors: Actors) -> None:
    bias = torch.zeros(2, 2, 40, 40, dtype=torch.bfloat16)
    bias[..., 3, :], bias[..., 7] = -math.inf, -math.inf
    made = call(bias=bias)
    made.operands.v[:, :, 7] = torch.nan
    with np.errstate(all="ignore"):
        hold(made, "efficient")


def test_a_row_that_sees_nan_says_so_in_its_lse(actors: Actors) -> None:
    made = call()
    made.operands.q[:, :, 11] = torch.nan
    _, out, lse, *_ = run(made, "flash")
    assert torch.isnan(out[:, :, 11]).all() and torch.isnan(lse[:, :, 11]).all()
    assert torch.isfinite(lse[:, :, :11]).all() and torch.isfinite(out[:, :, 12:]).all()


def test_while_a_graph_is_recorded_nothing_is_looked_at(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("forward", "backward"):
        monkeypatch.setattr(f"tilewise.kernels.aten.{module}.capturing", lambda x: True)
        monkeypatch.setattr(f"tilewise.kernels.aten.{module}.all_finite", lambda *x: pytest.fail("looked at"))
    hold(call(mask=tw.causal()), "flash")
    assert actors.called == []
    hold(call(), "flash")  # with nothing masked there is nothing to look at
    assert actors.called == ["flash"]


@pytest.mark.parametrize("way", ["cudnn", "flash", "efficient"])
def test_the_installed_torch_has_operators_of_these_signatures(way: str) -> None:
    q, k, v = (torch.empty(2, 4, 40, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    bias = None if way == "flash" else torch.empty(2, 4, 40, 40, dtype=torch.bfloat16, device="meta")
    inputs = calls.Inputs(q, k, v, bias, bias is None, 0.125)
    out, lse = calls.FORWARD[way](inputs)
    assert out.shape == q.shape and lse.shape == (2, 4, 40) and lse.dtype == torch.float32
    if way == "efficient":  # torch's rule for tensors without values has other arguments than the operator itself
        arguments = torch.ops.aten._efficient_attention_backward.default._schema.arguments
        assert [x.name for x in arguments if not x.kwarg_only] == [
            "grad_out_", "query", "key", "value", "bias", "out", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
            "max_seqlen_k", "logsumexp", "dropout_p", "philox_seed", "philox_offset", "custom_mask_type",
            "bias_requires_grad",
        ]  # fmt: skip
        assert {"scale", "num_splits_key"} <= {x.name for x in arguments if x.kwarg_only}
        return
    found = calls.BACKWARD[way](inputs, calls.Saved(out, lse, torch.empty_like(out)), False)
    assert [x.shape for x in found[:3]] == [q.shape, k.shape, v.shape] and found[3] is None


def test_the_actors_are_not_what_is_tested() -> None:
    """Without the kernel around them, an actor leaks: so the tests above can fail."""
    made = call(mask=tw.causal())
    made.operands.v[:, :, 25] = torch.nan
    problem = SimpleNamespace(scale=0.25)
    out, _ = _forward(made.operands.q, made.operands.k, made.operands.v, None, True, problem.scale)
    assert torch.isnan(out[:, :, 0]).all()
