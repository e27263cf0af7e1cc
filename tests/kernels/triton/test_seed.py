"""A seed that is a tensor stays on the device, so that each run of a captured graph draws what it holds then."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.contract import Plan, Tiles  # noqa: E402
from tilewise.kernels.triton import backward, forward, launch  # noqa: E402
from tilewise.validate import prepare  # noqa: E402


class NothingComesBack(TorchDispatchMode):
    """An operator that takes a tensor of the GPU and answers with one of the CPU, or with a number, is an error."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operator(*args, **kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_cuda]
        for x in tree_leaves(found):
            back = (isinstance(x, torch.Tensor) and not x.is_cuda) or isinstance(x, int | float)
            assert not (given and back), f"{operator} brings a value from the GPU"
        return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that would have been launched, on a GPU that is not here."""
    names: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: names.append(self.__name__))
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    for module in (forward, backward):
        monkeypatch.setattr(module, "on_device_of", lambda array: launch.nullcontext())
    return names


@pytest.mark.parametrize("queries", [128, 1])
def test_the_seed_is_never_read_on_the_host(launched: list[str], queries: int) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, queries, 64, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(1, 2, 1024, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        with NothingComesBack():
            call = prepare(
                q, k, v, mask=None, bias=None, scale=None, softcap=None, sinks=None, dropout=tw.Dropout(0.1, seed),
                layout="bhsd", return_lse=False,
            )  # fmt: skip
            problem = dataclasses.replace(call.problem, gradients=frozenset({"q", "k", "v"}))
            plan = Plan(problem, "triton", "triton", Tiles(0, 0), 0, {}, backward_way="split")
            out, lse = forward.forward(plan, call.operands)
            backward.backward(plan, call.operands, out, lse, torch.empty_like(out), None)
    first = ["decode_kernel", "merge_kernel"] if queries == 1 else ["forward_kernel"]
    # d_k and d_v are found by one of two launches: the device alone knows whether rows are far.
    assert launched == [*first, "rows_kernel", "shares_kernel", "d_kv_kernel", "d_kv_kernel", "d_q_kernel"]


def test_the_guard_sees_a_value_that_comes_back() -> None:
    with FakeTensorMode():
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        with NothingComesBack(), pytest.raises(AssertionError, match="brings a value"):
            seed.cpu()
        with pytest.raises(Exception, match="item|_local_scalar_dense"):
            seed.item()
