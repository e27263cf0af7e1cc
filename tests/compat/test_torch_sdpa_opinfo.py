"""`scaled_dot_product_attention` on the samples that torch tests its own with: values and derivatives of every kind."""

from __future__ import annotations

from functools import cache

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from tilewise.compat import torch_sdpa  # noqa: E402
from tilewise.compat.torch_sdpa import scaled_dot_product_attention as sdpa  # noqa: E402

close = torch.testing.assert_close


@cache
def op_info():
    from torch.testing._internal.common_methods_invocations import op_db

    return next(info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention")


def samples(dtype=torch.float64, requires_grad=False):
    return list(op_info().sample_inputs("cpu", dtype, requires_grad))


def split(sample):
    """(tensors that have a gradient, the function of them)."""
    options = dict(sample.kwargs)
    mask = options.pop("attn_mask", None)
    tensors = (sample.input, *sample.args, *([mask] if mask is not None else []))

    def function(*given):
        torch.manual_seed(42)
        return sdpa(*given, **options)

    return tensors, function


def is_plain(sample):
    return not sample.kwargs.get("dropout_p")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values(dtype):
    """Run through torch's own name, which is ours within the block."""
    run, found = op_info().op, list(filter(is_plain, samples(dtype)))
    assert len(found) > 10
    for sample in found:
        with torch_sdpa.sdpa():
            out = run(sample.input, *sample.args, **sample.kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            plain = run(sample.input, *sample.args, **sample.kwargs)
            doubled = tree_map(
                lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) else leaf,
                (sample.input, sample.args, sample.kwargs),
            )
            exact = run(doubled[0], *doubled[1], **doubled[2])
        assert_accurate("out", out, exact, plain, dtype=str(dtype).removeprefix("torch."))


def test_gradients_forward_mode_and_second_order():
    """With dropout, too. torch skips forward mode and second order of its own function on a CPU.

    Every second sample repeats the one before it.
    """
    for sample in samples(requires_grad=True)[::2]:
        tensors, function = split(sample)
        assert gradcheck(function, tensors, fast_mode=True, check_forward_ad=True, check_batched_grad=is_plain(sample))
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("contiguous", [True, False])
def test_derivatives_of_heads_cut_out_of_one_projection(contiguous):
    """Queries, keys and values as views of one tensor, (B, L, 3 H E)."""
    packed = torch.randn(2, 4, 3 * 2 * 3, dtype=torch.float64, requires_grad=True)

    def function(packed):
        heads = (x.view(2, 4, 2, 3).transpose(1, 2) for x in packed.chunk(3, -1))
        return sdpa(*(x.contiguous() if contiguous else x for x in heads), is_causal=True)

    kinds = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function, (packed,), fast_mode=True, **kinds)
    assert gradgradcheck(function, (packed,), fast_mode=True, check_batched_grad=True)


def test_vectorised_jacobians():
    """torch's older transforms, by its older vmap."""
    q, k = torch.randn(1, 2, 3, 2, dtype=torch.float64), torch.randn(1, 2, 4, 2, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.7

    def loss(q):
        return sdpa(q, k, k, mask).square().sum()

    functional = torch.autograd.functional
    close(
        functional.jacobian(lambda q: sdpa(q, k, k, mask), q, vectorize=True),
        functional.jacobian(lambda q: sdpa(q, k, k, mask), q),
    )
    close(functional.hessian(loss, q, vectorize=True), hessian(loss)(q))


def test_forward_over_reverse():
    """torch.func's hessian against that by two backward passes."""
    for sample in list(filter(is_plain, samples()))[::4]:
        tensors, function = split(sample)
        query, *rest = tensors
        row = query.flatten()[:6].clone()

        def of_row(row, query=query, rest=rest, function=function):
            return function(torch.cat([row, query.flatten()[6:]]).view_as(query), *rest).square().sum()

        close(hessian(of_row)(row), torch.autograd.functional.hessian(of_row, row))


def test_jacobians_of_all_kinds_agree():
    q, k, v = (torch.randn(2, 2, n, 3, dtype=torch.float64) for n in (3, 4, 4))
    mask = torch.randn(3, 4, dtype=torch.float64)
    for argnums in range(4):
        forward = jacfwd(sdpa, argnums)(q, k, v, mask)
        close(forward, jacrev(sdpa, argnums)(q, k, v, mask))
    tangent = torch.randn_like(q)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(sdpa(forward_ad.make_dual(q, tangent), k, v, is_causal=True)).tangent
    close(dual, jvp(lambda q: sdpa(q, k, v, is_causal=True), (q,), (tangent,))[1])


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -0.7}], ids=str)
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 2, 0)], ids=str)
def test_vmap(dims, options):
    sizes = {None: 0, 0: 0, 1: 1, 2: 2}
    tensors = []
    for dim, length in zip(dims, (3, 4, 4), strict=True):
        x = torch.randn(2, 2, length, 5, dtype=torch.float64)
        tensors.append(x if dim is None else torch.stack([x, 2 * x, -x], sizes[dim]))
    out = vmap(lambda q, k, v: sdpa(q, k, v, **options), dims)(*tensors)
    for n in range(3):
        alone = [x if dim is None else x.select(dim, n) for x, dim in zip(tensors, dims, strict=True)]
        close(out[n], sdpa(*alone, **options))


def test_vmap_over_masks_and_of_gradients():
    q, k, v = (torch.randn(3, 2, n, 4, dtype=torch.float64) for n in (4, 5, 5))
    floats, booleans = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 5) < 0.6
    for masks in (floats, booleans):
        out = vmap(sdpa)(q, k, v, masks)
        close(out, torch.stack([sdpa(q[n], k[n], v[n], masks[n]) for n in range(3)]))

    def loss(q, k, v, mask):
        return sdpa(q, k, v, mask).square().sum()

    per_sample = vmap(grad(loss, (0, 1, 2, 3)))(q, k, v, floats)
    for n in range(3):
        close(tuple(x[n] for x in per_sample), grad(loss, (0, 1, 2, 3))(q[n], k[n], v[n], floats[n]))


def test_vmap_draws_dropout_as_asked():
    x = torch.randn(3, 2, 8, 4, dtype=torch.float64)
    same = torch.stack([x[0]] * 3)

    def run(randomness):
        return vmap(lambda x: sdpa(x, x, x, dropout_p=0.5), randomness=randomness)(same)

    with pytest.raises(RuntimeError, match="randomness"):
        run("error")
    alike, different = run("same"), run("different")
    assert torch.equal(alike[0], alike[1])
    assert not torch.equal(different[0], different[1])


def test_inputs_that_are_not_contiguous():
    for sample in filter(is_plain, samples(torch.float32)):
        strange = sample.noncontiguous()
        close(sdpa(strange.input, *strange.args, **strange.kwargs), sdpa(sample.input, *sample.args, **sample.kwargs))


def test_compiled_as_one_graph():
    """Of any length."""

    def model(q, k, v, mask):
        return sdpa(q, k, v, mask) + sdpa(q, k, v, is_causal=True, scale=0.3)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 6):
        q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (length, 7, 7))
        mask = torch.randn(length, 7, dtype=torch.float64, requires_grad=True)
        found = [torch.autograd.grad(f(q, k, v, mask).square().sum(), (q, k, v, mask)) for f in (compiled, model)]
        close(*found)


def test_exported_with_a_dynamic_length():
    class Model(torch.nn.Module):
        def forward(self, x):
            return sdpa(x, x, x, is_causal=True)

    x = torch.randn(2, 3, 8, 4)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {2: torch.export.Dim("length")}})
    y = torch.randn(2, 3, 21, 4)
    close(program.module()(y), sdpa(y, y, y, is_causal=True))
