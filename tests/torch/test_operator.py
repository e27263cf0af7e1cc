"""The operator under torch's own tools: opcheck, the compiler, export, and transforms composed with them."""

from __future__ import annotations

import copy
import operator as builtin_operator
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.masks.primitives.predicate import name_of, named  # noqa: E402
from tilewise.torch import call, operator  # noqa: E402

# The compiler tells of what it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore")

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 7, 6, 3


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = (B, HQ, SQ, D), (B, HKV, SK, D), (B, HKV, SK, DV)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.7], dtype=torch.float64)
SEEN = torch.arange(SQ * SK).reshape(SQ, SK) % 3 != 0
OPTIONS = {
    "plain": dict,
    "causal": lambda: {"mask": tw.causal("end")},
    "window and prefix": lambda: {"mask": tw.window(2, 0, "end") | tw.prefix(2)},
    "lengths": lambda: {"mask": tw.lengths(k=torch.tensor([3, 7]))},
    "documents": lambda: {"mask": tw.documents(torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 1, 0, 1, 2, 2, 0]))},
    "dense": lambda: {"mask": SEEN},
    "numpy": lambda: {"mask": SEEN.numpy()},
    "predicate": lambda: {"mask": tw.predicate(lambda b, h, i, j: (i + j) % 2 == 0)},
    "bias": lambda: {"bias": torch.cos(torch.arange(7.0, dtype=torch.float64)), "softcap": 3.0},
    "alibi and sinks": lambda: {"bias": tw.alibi(SLOPES, "end"), "sinks": SLOPES},
    "t5": lambda: {"bias": tw.t5(torch.sin(torch.arange(32.0, dtype=torch.float64)).reshape(8, 4))},
    "dropout": lambda: {"dropout": tw.Dropout(0.3, 5), "scale": 0.2},
    "dropout by tensor": lambda: {"dropout": tw.Dropout(0.3, torch.tensor([5])), "mask": tw.causal("start")},
}


def function(name):
    make = OPTIONS[name]

    def attend(q, k, v):
        return tw.attention(q, k, v, return_lse=True, **make())

    return attend


def loss(attend):
    def total(q, k, v):
        out, lse = attend(q, k, v)
        return out.sin().sum() + torch.where(lse.isfinite(), lse, 0.0).cos().sum()

    return total


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_whole(name, dynamic):
    attend = function(name)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for f in (compiled, attend):
        given = [x.requires_grad_() for x in tensors()]
        results.append((f(*given), torch.autograd.grad(loss(f)(*given), given)))
    assert_same(*results)


TRANSFORMS = {
    "grad": lambda f: lambda *x: grad(loss(f), (0, 1, 2))(*x),
    "jvp": lambda f: lambda *x: jvp(loss(f), x, x),
    "vjp": lambda f: lambda *x: vjp(f, *x)[1](f(*x)),
    "jacfwd": lambda f: lambda q, k, v: jacfwd(lambda q: loss(f)(q, k, v))(q),
    "hessian": lambda f: lambda q, k, v: hessian(lambda x: loss(f)(q[:1, :, :1] * x, k[:1], v[:1]))(q[0, 0, 0]),
    "reverse over reverse": lambda f: (
        lambda q, k, v: jacrev(jacrev(lambda x: loss(f)(q[:1] * x, k[:1], v[:1])))(q[0, 0, 0])
    ),
    "forward over forward": lambda f: (
        lambda q, k, v: jacfwd(jacfwd(lambda x: loss(f)(q[:1] * x, k[:1], v[:1])))(q[0, 0, 0])
    ),
    "reverse over forward": lambda f: (
        lambda q, k, v: jacrev(jacfwd(lambda x: loss(f)(q[:1] * x, k[:1], v[:1])))(q[0, 0, 0])
    ),
    "vmap": lambda f: lambda q, k, v: vmap(f, (0, None, 1))(torch.stack([q, 2 * q]), k, torch.stack([v, v.flip(2)], 1)),
    "vmap of grad": lambda f: (
        lambda q, k, v: vmap(grad(loss(f), (0, 1, 2)), (0, None, 0))(
            torch.stack([q, 2 * q]), k, torch.stack([v, v.flip(2)])
        )
    ),
    "grad of vmap": lambda f: (
        lambda q, k, v: grad(lambda q: vmap(loss(f), (0, None, None))(torch.stack([q, 2 * q]), k, v).sum())(q)
    ),
    "vmap of vmap of jvp": lambda f: (
        lambda q, k, v: vmap(vmap(lambda q, t: jvp(lambda q: f(q, k, v), (q,), (t,))[1], (0, None)), (None, 0))(
            torch.stack([q, 2 * q]), torch.stack([q, q.flip(2)])
        )
    ),
}


def dense(q, k, v):
    """The case "causal" and `loss` of it, out of torch's own operations."""
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = (q @ k.mT / D**0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, compiled):
    transformed = TRANSFORMS[name](function("causal"))
    if compiled:
        torch._dynamo.reset()
        transformed = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    assert_same(transformed(*tensors()), TRANSFORMS[name](dense)(*tensors()))


def test_inductor():
    torch._dynamo.reset()
    f = loss(function("causal"))
    given = [x.requires_grad_() for x in tensors()]
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    assert_same(torch.autograd.grad(compiled(*given), given), torch.autograd.grad(f(*given), given))


OPEN_NUMBERS = {
    "stream": lambda n: {"dropout": tw.Dropout(0.3, 5, stream=n)},
    "large stream": lambda n: {"dropout": tw.Dropout(0.3, 5, stream=2**62 + n, first=n, strides=(400, 99, 9, 1))},
    "scale": lambda n: {"scale": n},
    "softcap": lambda n: {"softcap": n},
    "sinks": lambda n: {"sinks": n},
    "lengths in a list": lambda n: {"mask": tw.lengths(k=[n, 3])},
    "offsets in a list": lambda n: {"mask": tw.causal(offset=[n, 3])},
}


@pytest.mark.parametrize("name", OPEN_NUMBERS)
def test_compiles_whole_with_numbers_that_change(name):
    torch.compiler.reset()  # all cases are one function to the compiler, which takes but so many programs of one
    make, given = OPEN_NUMBERS[name], tensors()
    compiled = torch.compile(lambda n: tw.attention(*given, **make(n)), fullgraph=True, backend="eager")
    for n in (2, 3, 5):
        assert_same(compiled(n), tw.attention(*given, **make(n)))


def test_a_compiled_stream_needs_no_program_of_its_own():
    """A block of layers, each with its own stream, is compiled at most twice: for the first number and for any."""
    given, programs = tensors(), []

    def backend(graph, _):
        programs.append(graph)
        return graph

    f = torch.compile(lambda n: tw.attention(*given, dropout=tw.Dropout(0.3, 5, n)), fullgraph=True, backend=backend)
    for n in range(2, 12):
        f(n)
    assert len(programs) <= 2


HELD = np.array([3, 7])
IN_THE_PROGRAM = {
    "documents": lambda: {"mask": tw.documents([0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 2, 0])},
    "intervals": lambda: {"mask": tw.intervals([0, 1, 2, 0, 1], [3, 4, 5, 6, 7])},
    "blocks": lambda: {"mask": tw.blocks([[True, False], [True, True], [False, True]], (2, 4))},
    "dense": lambda: {"mask": [[True, False] * 3 + [True]] * SQ},
    "alibi": lambda: {"bias": tw.alibi([0.1, 0.2, 0.3, 0.4], "end")},
    "lengths of numpy": lambda: {"mask": tw.lengths(k=HELD)},
}


@pytest.mark.parametrize("name", IN_THE_PROGRAM)
def test_compiles_whole_with_lists_and_numpy_arrays(name):
    torch.compiler.reset()
    make, given = IN_THE_PROGRAM[name], tensors()
    compiled = torch.compile(lambda: tw.attention(*given, **make()), fullgraph=True, backend="eager")
    assert_same(compiled(), tw.attention(*given, **make()))


JOINED = {
    "mask & tensor": lambda seen, added: {"mask": tw.causal("end") & seen},
    "tensor & mask": lambda seen, added: {"mask": seen & tw.causal("end")},
    "mask | tensor": lambda seen, added: {"mask": tw.causal("end") | seen},
    "tensor | mask": lambda seen, added: {"mask": seen | tw.causal("end")},
    "bias + tensor": lambda seen, added: {"bias": tw.alibi(SLOPES, "end") + added},
    "tensor + bias": lambda seen, added: {"bias": added + tw.alibi(SLOPES, "end")},
}


@pytest.mark.parametrize("name", JOINED)
def test_compiles_whole_where_tensors_join_masks_and_biases(name):
    torch.compiler.reset()
    join, given = JOINED[name], tensors()
    seen, added = SEEN.clone(), torch.sin(torch.arange(SQ * SK, dtype=torch.float64)).reshape(SQ, SK)

    def f(seen, added):
        return tw.attention(*given, **join(seen, added))

    assert_same(torch.compile(f, fullgraph=True, backend="eager")(seen, added), f(seen, added))


def test_masks_and_biases_are_no_tensors():
    with pytest.raises(TypeError):
        torch.add(SEEN, tw.causal())
    with pytest.raises(TypeError):
        torch.sum(tw.alibi(SLOPES))


@pytest.mark.parametrize("mapped", ["q", "bias"])
def test_a_map_over_no_elements(mapped):
    q, k, v = tensors()
    q, bias = (q[None], None) if mapped == "q" else (q, torch.zeros(1, SQ, SK, dtype=q.dtype))

    def squared(q, bias):
        return tw.attention(q, k, v, mask=tw.causal("end"), bias=bias).square().sum()

    dims = (0, None) if mapped == "q" else (None, 0)
    of_one = vmap(grad(squared), in_dims=dims)(q, bias)
    none = (q[:0], bias) if mapped == "q" else (q, bias[:0])
    of_none = vmap(grad(squared), in_dims=dims)(*none)
    assert of_none.shape == (0, *of_one.shape[1:]) and of_none.dtype == of_one.dtype


def test_compiles_beside_jax():
    """Masks make themselves known to jax where it is loaded; a compiler that follows their making must not stumble."""
    program = """if True:
        import jax, torch, tilewise as tw
        q = torch.randn(1, 2, 5, 4)
        f = lambda q: tw.attention(q, q, q, mask=tw.causal() & tw.window(2))
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="eager")(q), f(q))
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_a_compiled_program_sees_another_predicate():
    torch._dynamo.reset()
    q, k, v = tensors()
    compiled = torch.compile(lambda mask: tw.attention(q, k, v, mask=mask), fullgraph=True, backend="eager")
    for period in (2, 3):
        mask = tw.predicate(lambda b, h, i, j, period=period: (i + j) % period == 0)
        assert_same(compiled(mask), tw.attention(q, k, v, mask=mask))


def ahead(b, h, i, j):
    return j >= i


def test_a_copied_predicate_is_its_own_and_outlives_the_first():
    q, k, v = tensors()
    first = tw.predicate(ahead)
    copies = [copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    assert len({name_of(mask) for mask in (first, *copies)}) == 4
    expected = tw.attention(q, k, v, mask=first)
    del first
    for mask in copies:
        assert_same(tw.attention(q, k, v, mask=mask), expected)


def test_a_predicate_from_another_process_is_no_mask_of_this_one(tmp_path):
    # Each process counts its predicates from 0: one that kept its number would be taken for another's.
    program = (
        "import operator, pickle, sys, tilewise; pickle.dump(tilewise.predicate(operator.call), sys.stdout.buffer)"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, timeout=300, capture_output=True)
    here = [tw.predicate(lambda b, h, i, j: j < i) for _ in range(64)]
    mask = pickle.loads(found.stdout)
    assert mask.function is builtin_operator.call
    assert named(name_of(mask)) is mask and all(named(name_of(other)) is other for other in here)


class Model(torch.nn.Module):
    def forward(self, q, k, v, lengths):
        mask = tw.causal("end") & tw.window(k.shape[2] // 2, 0, "end") & tw.lengths(k=lengths)
        return tw.attention(q, k, v, mask=mask, bias=tw.alibi(SLOPES, "end"))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_open_lengths(strict, tmp_path):
    lengths = torch.tensor([6, 4])
    rows, keys = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("keys", min=2, max=64)
    shapes = {"q": {2: rows}, "k": {2: keys}, "v": {2: keys}, "lengths": None}
    program = torch.export.export(Model(), (*tensors(), lengths), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for n, m in ((5, 7), (3, 11), (12, 13)):
        q, k, v = (
            torch.randn(B, HQ, n, D).double(),
            torch.randn(B, HKV, m, D).double(),
            torch.randn(B, HKV, m, DV).double(),
        )
        assert_same(program(q, k, v, lengths), Model()(q, k, v, lengths))


@pytest.mark.parametrize("name", ["causal", "dense", "alibi and sinks", "dropout"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(name, layout, monkeypatch):
    """What torch asks of every operator: schema, fake shapes and strides, autograd's registration, AOT tracing."""
    seen = []
    real = call.operator.attention
    monkeypatch.setattr(call, "nobody_else", lambda tensors: False)
    monkeypatch.setattr(call.again, "find", lambda key: None)
    watched = SimpleNamespace(attention=lambda *args: seen.append(args) or real(*args))
    monkeypatch.setattr(call, "operator", watched)
    q, k, v = (x.requires_grad_() for x in tensors())
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = tw.attention(q, k, v, layout=layout, return_lse=True, **OPTIONS[name]())
    (args,) = seen
    torch.library.opcheck(real, args)
    operands, *rest = args
    out, lse = real(operands, *rest)
    rows = (out.detach(), lse.detach(), torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(operator.attention_backward, (operands, *rows, *rest, [0, 1, 2]))


def test_traced_with_symbolic_sizes():
    traced = make_fx(function("causal"), tracing_mode="symbolic")(*tensors())
    q, k, v = (torch.cat([x, x.flip(2)], 2) for x in tensors())
    assert_same(traced(q, k, v), function("causal")(q, k, v))


def _in_worker(index):
    q, k, v = tensors()
    return tw.attention(q, k, v, mask=tw.causal("end"))


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return _in_worker(index)


def test_workers_after_a_fork():
    expected = _in_worker(0)
    for batch in torch.utils.data.DataLoader(Dataset(), num_workers=2, timeout=60):
        assert_same(batch[0], expected)


def test_a_function_of_a_gradient_outlives_its_mask():
    q, k, v = (x.requires_grad_() for x in tensors())
    out = tw.attention(q, k, v, mask=tw.predicate(lambda b, h, i, j: i >= j))
    (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    del out
    (second,) = torch.autograd.grad(first.sum(), q)
    again = tw.attention(q, k, v, mask=tw.causal("start"))
    (expected,) = torch.autograd.grad(torch.autograd.grad(again.sin().sum(), q, create_graph=True)[0].sum(), q)
    assert_same(second, expected)


def test_a_mask_changed_in_place_is_noticed():
    q, k, v = (x.requires_grad_() for x in tensors())
    seen = SEEN.clone()
    out = tw.attention(q, k, v, mask=seen)
    seen.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
