"""torch's flash kernel for CPUs under the rules of every kernel: values, gradients, and that the masked is not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.conformance import check  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise._remembered import Remembered  # noqa: E402
from tilewise.plan.catalog import PRESETS  # noqa: E402
from tilewise.plan.preset import Example, example  # noqa: E402


@pytest.fixture(autouse=True)
def any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel adds in an order that depends on the number of threads, which has to be allowed."""
    monkeypatch.setattr("tilewise.validate.call.DETERMINISTIC", False)
    monkeypatch.setattr("tilewise.torch.operator._plans", Remembered())  # of the other rule


@pytest.mark.usefixtures("loud_memory")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_catalogue(dtype: str) -> None:
    taken = {name for name in PRESETS if not check(example(PRESETS[name]), "aten", "torch", dtype, gradients=True)}
    assert taken, "every preset was refused"


def call(sq: int, sk: int, d: int = 8, heads: int = 2, kv_heads: int = 2, **options: object) -> Example:
    """Random inputs of batch 2."""
    rng = np.random.default_rng(5)
    shapes = ((2, heads, sq, d), (2, kv_heads, sk, d), (2, kv_heads, sk, d))
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return Example(q, k, v, dict(options))


def _bias(*shape: int) -> np.ndarray:
    return np.random.default_rng(6).standard_normal(shape).astype(np.float32)


def _with_empty_row() -> np.ndarray:
    bias = _bias(1, 2, 33, 40)
    bias[0, 1, 7] = -np.inf
    bias[..., 5] = -np.inf
    return bias


def _far_rows() -> np.ndarray:
    """A bias that carries the lse of some rows so far from 0 that it cannot hold the logarithm of a sum as well."""
    bias = _bias(1, 2, 33, 40)
    bias[:, :, 4:9] = -(2.0**100)
    return bias


CALLS = {
    "plain": call(33, 40),
    "causal": call(700, 700, mask=tw.causal()),
    "causal, bshd": replace(call(33, 33, mask=tw.causal()), options={"mask": tw.causal("end")}),
    "a scale": call(17, 9, scale=-0.7),
    "a bias": call(33, 40, bias=_bias(2, 2, 33, 40)),
    "a bias of keys": call(33, 40, bias=_bias(1, 1, 1, 40)),
    "a bias of heads and rows": call(33, 40, bias=_bias(1, 2, 33, 1)),
    "a row that sees nothing": call(33, 40, bias=_with_empty_row()),
    "far rows": call(33, 40, bias=_far_rows()),
    "width 1": call(5, 6, d=1),
    "grouped heads": call(33, 40, heads=6, kv_heads=2),
}


@pytest.mark.usefixtures("loud_memory")
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name: str) -> None:
    # Gradients to a bias are another kernel's, and so are those of grouped heads.
    assert check(CALLS[name], "aten", "torch", gradients=True) == ()


@pytest.mark.usefixtures("loud_memory")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_what_is_masked_cannot_be_seen(operand: str, rubbish: float, dtype: str) -> None:
    case = call(40, 40, mask=tw.causal())
    getattr(case, operand)[:, :, 30] = rubbish
    with np.errstate(all="ignore"):
        assert check(case, "aten", "torch", dtype, gradients=True) == ()


def test_what_a_bias_masks_cannot_be_seen() -> None:
    case = call(33, 40, bias=_with_empty_row())
    case.v[:, :, 5] = np.nan
    with np.errstate(all="ignore"):
        assert check(case, "aten", "torch", gradients=True) == ()


def test_rubbish_in_the_gradient_of_a_late_row_reaches_no_early_key() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    d_out = torch.randn(1, 2, 40, 8)
    d_out[:, :, 20] = torch.nan
    found = torch.autograd.grad(tw.attention(q, k, v, mask=tw.causal(), kernel="aten"), (q, k, v), d_out)
    for gradient in found[1:]:
        assert torch.isfinite(gradient[:, :, 21:]).all() and torch.isnan(gradient[:, :, :21]).all()


def test_an_axis_that_is_not_contiguous() -> None:
    q, k, v = (torch.randn(1, 2, 8, 33).transpose(2, 3) for _ in range(3))
    tight = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(tw.attention(q, k, v, kernel="aten"), tw.attention(*tight, kernel="aten"))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_results_lie_as_the_operator_promises(layout: str) -> None:
    q = torch.randn(2, 9, 5, 8)
    out, lse = tw.attention(q, q, q, layout=layout, return_lse=True, kernel="aten")
    heads = (2, 9, 5) if layout == "bhsd" else (2, 5, 9)
    assert out.is_contiguous() and lse.is_contiguous() and out.shape == q.shape and lse.shape == heads


def test_it_is_refused_where_equal_inputs_must_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewise.validate.call.DETERMINISTIC", True)
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(tw.KernelRefused, match="number of threads"):
        tw.attention(q, q, q, kernel="aten")


def test_a_gradient_of_lse_is_another_kernels() -> None:
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    assert tw.explain(q, q, q, kernel="aten").backward == "aten"
    assert tw.explain(q, q, q, kernel="aten", return_lse=True).backward != "aten"
    out, lse = tw.attention(q, q, q, kernel="aten", return_lse=True)
    plain = tw.attention(q, q, q, kernel="portable", return_lse=True)
    got, want = (torch.autograd.grad(a.sum() + (3 * b).sum(), q)[0] for a, b in ((out, lse), plain))
    assert torch.allclose(got, want, atol=1e-5) and float(want.abs().max()) > 1e-2


def test_under_the_compiler() -> None:
    q = torch.randn(1, 2, 20, 8, requires_grad=True)

    def loss(q: torch.Tensor) -> torch.Tensor:
        return tw.attention(q, q, q, mask=tw.causal(), kernel="aten").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(q), q)[0], torch.autograd.grad(loss(q), q)[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask": tw.window(3, 0)}, "no mask but none"),
        ({"mask": tw.documents(np.arange(9) // 5)}, "no mask but none"),
        ({"softcap": 3.0}, "soft cap"),
        ({"sinks": 0.0}, "sinks"),
        ({"bias": tw.alibi(torch.ones(2))}, "table"),
        ({"dropout": tw.Dropout(0.1, 1)}, "random bits"),
        ({"mask": tw.causal(), "bias": torch.zeros(9, 9)}, "not both"),
        ({"bias": torch.zeros(9, 9, dtype=torch.float64)}, "dtype of q"),
        ({"bias": tw.relative(torch.zeros(17)) + torch.zeros(9, 9)}, "table"),
    ],
)
def test_what_it_refuses(options: dict, sentence: str) -> None:
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(tw.KernelRefused, match=sentence):
        tw.attention(q, q, q, kernel="aten", **options)


def test_half_precision_and_empty_calls_are_refused_as_faults() -> None:
    half, empty = torch.zeros(1, 2, 9, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 0, 8)
    for q, issue in ((half, "torch 2.13"), (empty, "pytorch#141219")):
        with pytest.raises(tw.KernelRefused, match=issue):
            tw.attention(q, q, q, kernel="aten")


def test_on_the_cpu_it_runs_only_when_asked_for() -> None:
    q = torch.randn(1, 2, 9, 8)
    plan = tw.explain(q, q, q)
    assert plan.kernel != "aten" and "by name" in " ".join(plan.refusals["aten"])
