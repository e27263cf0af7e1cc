"""Rows whose lse is far from 0 without a bias: every derivative is as accurate as plain attention's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from support.far_cases import FACTORS, LARGE_CASES, large  # noqa: E402
from support.portable_cases import planned  # noqa: E402
from support.torch_cases import use_small_tiles  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.kernels.reference import dense  # noqa: E402
from tilewise.kernels.state import FAR  # noqa: E402

KERNELS = ("native", "portable")


def problem(name, factor, kernel, **sizes):
    """A case as functions of (q, k, v) -> (out, lse): ours, and the textbook's in the dtype of its arguments."""
    q, k, v = (torch.from_numpy(x).float() for x in large(factor, **sizes).values())
    options = LARGE_CASES[name](_float)
    plan, operands = planned(q, k, v, **options, kernel="portable")
    oracle = dense.attention(plan.problem, operands)
    visible, kept = torch.from_numpy(oracle.visible), torch.from_numpy(oracle.z + 0.0)
    bias, sinks = options.get("bias", torch.zeros(1)), options.get("sinks")

    def ours(*qkv):
        return tw.attention(*qkv, return_lse=True, kernel=kernel, **options)

    def simple(q, k, v):
        k, v = (x.repeat_interleave(plan.problem.group, 1) for x in (k, v))
        s = q @ k.mT * plan.problem.scale
        cap = options.get("softcap")
        s = (s if cap is None else cap * torch.tanh(s / cap)) + bias.to(q.dtype)
        s = torch.where(visible, s, -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.to(q.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
        # Not by `logsumexp`, whose derivative is made of its result, and so has what is tested here.
        peak = s.amax(-1, keepdim=True).detach()
        weights = torch.exp(s - peak)
        total = weights.sum(-1, keepdim=True)
        p = (weights / total)[..., : k.shape[2]] * kept.to(q.dtype)
        return p @ v, (peak + total.log())[..., 0]

    return ours, simple, (q, k, v)


def _float(x):
    tensor = torch.from_numpy(x)
    return tensor.float() if x.dtype == "float64" else tensor


def pulled(function, primals, along):
    return torch.func.vjp(function, *primals)[1](along)


def pushed(function, primals, along):
    return torch.func.jvp(function, primals, along)[1]


def compare(derivative, ours, simple, primals, along, dtype=None):
    wide = [tuple(x.double() for x in given) for given in (primals, along)]
    exact, yardstick = derivative(simple, *wide), derivative(simple, primals, along)
    for n, (got, truth, measure) in enumerate(zip(derivative(ours, primals, along), exact, yardstick, strict=True)):
        assert_accurate(f"derivative {n}", got, truth, measure, dtype)


def directions(arrays):
    random = torch.Generator().manual_seed(3)
    return tuple(torch.randn(x.shape, generator=random) for x in arrays)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_gradients(name, factor, kernel):
    ours, simple, primals = problem(name, factor, kernel)
    compare(pulled, ours, simple, primals, directions(ours(*primals)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_tangents(name, factor, kernel):
    ours, simple, primals = problem(name, factor, kernel)
    compare(pushed, ours, simple, primals, directions(primals))


def twice(function, primals, along):
    """The gradients of (along . the gradients)."""

    def slopes(*primals):
        results = function(*primals)
        return pulled(function, primals, tuple(x.to(primals[0].dtype) for x in directions(results)))

    return pulled(slopes, primals, along)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_second_derivatives_keep_half_of_their_places(name, factor, kernel):
    """lse and out are operands of the first derivative: what cancels between the parts that come through them and the
    part that does not is as large as the keys times the scores, and loses what float16's floor allows."""
    ours, simple, primals = problem(name, factor, kernel)
    # float16's largest number is too small for the derivatives of the largest scores.
    compare(twice, ours, simple, primals, directions(primals), "bfloat16" if factor == 1000 else "float16")


@pytest.mark.parametrize("name", ["causal", "sinks and dropout"])
def test_second_derivatives_in_float64_are_those_of_finite_differences(name, monkeypatch):
    """In float64, too, far rows are found again: here their derivatives must be right to all places."""
    use_small_tiles(monkeypatch)
    ours, _, primals = problem(name, 30, "portable", batch=1, q_len=4, k_len=5, dim=4, value=2)
    inputs = tuple(x.double().requires_grad_() for x in primals)
    with torch.no_grad():
        assert (ours(*inputs)[1].abs() > FAR).any()
    assert torch.autograd.gradgradcheck(ours, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_mapped_and_alone():
    ours, _, primals = problem("causal", 100, "portable")
    along = directions(primals)
    nearer = torch.tensor([1.0, 0.01, 0.5])

    def push(factor):
        return pushed(ours, tuple(x * factor for x in primals), along)

    mapped = torch.func.vmap(push)(nearer)
    for n, factor in enumerate(nearer):
        for got, expected in zip(mapped, push(factor), strict=True):
            assert torch.equal(got[n], expected)


def test_near_rows_are_not_passed_over_again(monkeypatch):
    def never(*_):
        raise AssertionError("a pass for rows that are not far")

    monkeypatch.setattr("tilewise.kernels.portable.row_terms.tiled_sum", never)
    ours, _, primals = problem("plain", 1, "portable")
    pushed(ours, primals, directions(primals))
    twice(ours, primals, directions(primals))
    with pytest.raises(AssertionError, match="a pass"):
        pushed(ours, tuple(100 * x for x in primals), directions(primals))
