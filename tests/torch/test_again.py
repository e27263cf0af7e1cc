"""Calls like one made before take a shorter way (`torch/again.py`), which can't be told from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tilewise as tw
from tilewise._remembered import MOST, Remembered
from tilewise.torch import again

MASKS = {
    "none": lambda: None,
    "causal": lambda: tw.causal("end"),
    "window": lambda: tw.window(5, 2, "end") & tw.causal("end"),
    "booleans": lambda: torch.rand(2, 1, 20, 33) < 0.6,
    "of columns": lambda: (torch.rand(33, 20) < 0.6).T,
    "dense": lambda: tw.dense(torch.rand(1, 4, 20, 33) < 0.6),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "_calls", Remembered())
    torch.manual_seed(0)


def tensors(layout: str = "bhsd", grad: bool = False) -> list[Tensor]:
    """q (2, 4, 20, 8), k and v (2, 2, 33, 8) in the layout."""
    made = [torch.randn(2, heads, length, 8) for heads, length in ((4, 20), (2, 33), (2, 33))]
    return [(x.transpose(1, 2) if layout == "bshd" else x).contiguous().requires_grad_(grad) for x in made]


def results(given: list[Tensor], mask: object, layout: str, grad: bool) -> list[Tensor]:
    out, lse = tw.attention(*given, mask=mask, layout=layout, return_lse=True)
    return [out, lse, *(torch.autograd.grad((out * out).sum() + lse.sum(), given) if grad else ())]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("kind", MASKS)
def test_later_calls_are_as_the_first(kind: str, layout: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):  # other numbers each time: the second and third take the shorter way
        given, mask = tensors(layout, grad), MASKS[kind]()
        got = results(given, mask, layout, grad)
        with monkeypatch.context() as undone:
            undone.setattr(again, "find", lambda key: None)
            want = results(given, mask, layout, grad)
        for a, b in zip(got, want, strict=True):
            assert a.stride() == b.stride() and a.requires_grad == b.requires_grad
            assert torch.equal(a, b)
        assert len(again._calls) == 1


def test_every_option_counts() -> None:
    given = tensors()
    options = [
        {}, {"scale": 0.5}, {"softcap": 2.0}, {"mask": tw.causal("end")}, {"mask": tw.causal("start")},
        {"mask": tw.causal(offset=3)}, {"invariance": "row"}, {"kernel": "native"}, {"kernel": "portable"},
    ]  # fmt: skip
    first = [tw.attention(*given, **each) for each in options]
    assert len(again._calls) == len(options)
    for each, want in zip(options, first, strict=True):
        assert torch.equal(tw.attention(*given, **each), want)
        out, lse = tw.attention(*given, **each, return_lse=True)
        assert torch.equal(out, want) and lse.shape == (2, 4, 20)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[3], first[4])


def test_a_mask_is_read_in_each_call() -> None:
    given, seen = tensors(), torch.ones(20, 33, dtype=torch.bool)
    tw.attention(*given, mask=seen)
    seen[:, 5:] = False
    assert torch.equal(tw.attention(*given, mask=seen), tw.attention(*given, mask=tw.lengths(k=5)))


def test_what_may_change_is_not_remembered() -> None:
    given = tensors()
    for options in (
        {"mask": tw.lengths(k=torch.tensor([3, 9]))},
        {"mask": tw.predicate(lambda b, h, i, j: j < 5)},
        {"mask": tw.causal("end") & tw.dense(torch.ones(20, 33, dtype=torch.bool))},
        {"mask": np.ones((20, 33), bool)},
        {"bias": torch.randn(20, 33)},
        {"sinks": torch.zeros(4)},
        {"dropout": tw.Dropout(0.5, seed=1)},
    ):
        tw.attention(*given, **options)
    assert not again._calls


def test_who_watches_is_asked_in_each_call() -> None:
    given = tensors()
    want = tw.attention(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert tw.attention(*given).dtype == torch.bfloat16
    mapped = torch.func.vmap(tw.attention)(*(x[None] for x in given))
    assert torch.equal(mapped[0], want)
    with torch.autograd.profiler.profile() as profile:
        tw.attention(*given)
    assert any("tilewise::attention" in event.name for event in profile.function_events)
    with torch.autograd.forward_ad.dual_level():
        moving = torch.autograd.forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        out = tw.attention(moving, *given[1:])
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    x = given[0].clone().requires_grad_()
    assert tw.attention(x, *given[1:]).grad_fn is not None


def test_wrong_options_stay_wrong() -> None:
    given = tensors()
    tw.attention(*given, scale=1.0)
    for wrong, name in (
        ({"scale": True}, "scale"), ({"scale": [1.0]}, "scale"), ({"layout": "sbhd"}, "layout"),
        ({"kernel": "fast"}, "kernel"), ({"invariance": "none"}, "invariance"), ({"softcap": -1.0}, "softcap"),
        ({"mask": torch.ones(20, 33)}, "mask"), ({"mask": torch.ones(21, 33, dtype=torch.bool)}, "mask"),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"^{name}"):
                tw.attention(*given, **wrong)


def test_the_number_of_calls_is_bounded() -> None:
    for length in range(1, MOST + 5):
        x = torch.ones(1, 1, length, 1)
        tw.attention(x, x, x)
    assert len(again._calls) == MOST


def test_a_compiler_does_not_look_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would guard on each, and follow the call anew whenever another was made."""

    class Closed(dict):
        def get(self, *args: object) -> None:
            raise AssertionError("looked at")

        keep = get

    given = tensors()
    want = tw.attention(*given, mask=tw.causal("end"))
    traced = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        traced.append(module)
        return module.forward

    compiled = torch.compile(
        lambda q, k, v: tw.attention(q, k, v, mask=tw.causal("end")), backend=backend, fullgraph=True
    )
    monkeypatch.setattr(again, "_calls", Closed())
    assert torch.equal(compiled(*given), want)
    monkeypatch.setattr(again, "_calls", Remembered())
    tw.attention(*given)
    assert torch.equal(compiled(*given), want)
    assert len(traced) == 1
