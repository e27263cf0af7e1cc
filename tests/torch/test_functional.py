"""torch.func: grad, jvp, vmap, Jacobians and Hessians agree with plain autograd, and compose."""

import pytest

torch = pytest.importorskip("torch")

from support.portable_cases import arrays  # noqa: E402
from support.torch_cases import CASES, problem, use_small_tiles  # noqa: E402

import tilewise as tw  # noqa: E402


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_products(name):
    function, inputs = problem(name)
    inputs = tuple(tensor.detach() for tensor in inputs)
    everywhere = tuple(range(len(inputs)))

    def loss(*tensors):
        out, lse = function(*tensors)
        return out.square().sum() + lse.sin().sum()

    required = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    expected = torch.autograd.grad(loss(*required), required)
    gradient = torch.func.grad(loss, argnums=everywhere)
    for a, b in zip(gradient(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)

    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    directional = sum((a * b).sum() for a, b in zip(expected, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, inputs, tangents)[1], directional, rtol=0, atol=1e-10)

    # One Hessian-vector product by forward over reverse, reverse over forward, and twice reverse.
    over_reverse = torch.func.jvp(gradient, inputs, tangents)[1]
    over_forward = torch.func.grad(lambda *x: torch.func.jvp(loss, x, tangents)[1], argnums=everywhere)(*inputs)
    twice = torch.autograd.grad(
        sum(
            (a * b).sum()
            for a, b in zip(torch.autograd.grad(loss(*required), required, create_graph=True), tangents, strict=True)
        ),
        required,
    )
    for a, b, c in zip(over_reverse, over_forward, twice, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-10)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-10)


def _tensors(*leading, **sizes):
    return [torch.randn(*leading, *array.shape, dtype=torch.float64) for array in arrays(**sizes).values()]


def _each(function, *mapped):
    return torch.stack([function(*row) for row in zip(*mapped, strict=True)])


def test_vmap_over_operands():
    q, k, v = _tensors(3)

    def f(q, k, v):
        return tw.attention(q, k, v, mask=tw.causal("end"), kernel="portable")

    torch.testing.assert_close(torch.vmap(f)(q, k, v), _each(f, q, k, v))
    torch.testing.assert_close(
        torch.vmap(f, in_dims=(0, None, None))(q, k[0], v[0]), _each(lambda x: f(x, k[0], v[0]), q)
    )
    torch.testing.assert_close(
        torch.vmap(f, in_dims=(3, 1, 2), out_dims=1)(q.movedim(0, 3), k.movedim(0, 1), v.movedim(0, 2)),
        _each(f, q, k, v).movedim(0, 1),
    )
    twice = torch.vmap(torch.vmap(f, in_dims=(None, 0, 0)), in_dims=(0, None, None))(q, k, v)
    torch.testing.assert_close(twice[1, 2], f(q[1], k[2], v[2]))


@pytest.mark.parametrize("what", ["bias", "table", "sinks", "mask", "lengths", "seed"])
def test_vmap_over_options(what):
    q, k, v = (tensor[0] for tensor in _tensors(1))
    mapped = {
        "bias": torch.randn(3, 4, 13, 17, dtype=torch.float64),
        "table": torch.randn(3, 29, dtype=torch.float64),
        "sinks": torch.randn(3, 4, dtype=torch.float64),
        "mask": torch.rand(3, 13, 17) < 0.5,
        "lengths": torch.tensor([[3, 17], [0, 1], [9, 9]]),
        "seed": torch.tensor([1, 2, 3]),
    }[what]
    make = {
        "bias": lambda x: {"bias": x},
        "table": lambda x: {"bias": tw.relative(x)},
        "sinks": lambda x: {"sinks": x},
        "mask": lambda x: {"mask": tw.dense(x) & tw.causal("end")},
        "lengths": lambda x: {"mask": tw.lengths(k=x)},
        "seed": lambda x: {"dropout": tw.Dropout(0.5, x)},
    }[what]

    def f(q, option):
        return tw.attention(q, k, v, kernel="portable", **make(option))

    torch.testing.assert_close(torch.vmap(f, in_dims=(None, 0))(q, mapped), _each(lambda x: f(q, x), mapped))
    gradient = torch.func.grad(lambda q, option: f(q, option).square().sum())
    torch.testing.assert_close(
        torch.vmap(gradient, in_dims=(None, 0))(q, mapped), _each(lambda x: gradient(q, x), mapped)
    )


def test_jacobians_and_hessian():
    q, k, v = (tensor[0] for tensor in _tensors(1, batch=1, heads=1, kv=1, q_len=3, k_len=4, dim=2, value=2))

    def f(q, k):
        out, lse = tw.attention(q, k, v, mask=tw.causal("end"), softcap=1.0, kernel="portable", return_lse=True)
        return torch.cat([out.flatten(), lse.flatten()])

    for argument in (0, 1):
        backward, forward = torch.func.jacrev(f, argument)(q, k), torch.func.jacfwd(f, argument)(q, k)
        torch.testing.assert_close(backward, forward, rtol=0, atol=1e-12)
        torch.testing.assert_close(backward, torch.autograd.functional.jacobian(lambda *x: f(*x), (q, k))[argument])
    hessian = torch.func.hessian(lambda q: f(q, k).square().sum())(q)
    expected = torch.autograd.functional.hessian(lambda q: f(q, k).square().sum(), q)
    torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-11)


def test_per_sample_gradients():
    q, k, v = _tensors(3)

    def loss(q, k, v):
        return tw.attention(q, k, v, mask=tw.window(2, 0, "end"), kernel="portable").square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for n, expected in enumerate(
        zip(*(torch.func.grad(loss, argnums=(0, 1, 2))(*row) for row in zip(q, k, v, strict=True)), strict=True)
    ):
        torch.testing.assert_close(got[n], torch.stack(expected))
