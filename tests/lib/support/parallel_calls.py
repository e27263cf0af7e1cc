"""What each rank does in the tests of calls over ranks; what it finds goes home as plain numbers and arrays."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import tilewise as tw
from tilewise.torch.distributed import context_parallel_attention, positions, shard, unshard

from .parallel_cases import group_of, portable


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same random numbers on every rank."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)


def beside_one_device(sharding: str, strategy: str, layout: str, packed: bool, learned: str | None) -> Any:
    """(name, got, exact) of out, lse and every gradient in float64, shards of the whole; what is shared is summed."""
    shapes = {
        "bhsd": [(2, 4, 24, 8), (2, 2, 24, 8)],
        "bshd": [(2, 24, 4, 8), (2, 24, 2, 8)],
        "thd": [(24, 4, 8), (24, 2, 8)],
    }
    axis = {"bhsd": 2, "bshd": 1, "thd": 0}[layout]
    q, k, v = (some(n, *shapes[layout][n > 0]) for n in range(3))
    weight = {"alibi": some(5, 4).abs(), "t5": some(6, 8, 4), None: None}[learned]
    edges, batch = torch.tensor([0, 7, 7, 20]), 2 if layout != "thd" else 1

    def cut(x: Tensor, axis: int) -> Tensor:
        return shard(x, axis, sharding=sharding)

    def run(spread: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)] + (
            [] if weight is None else [weight.clone().requires_grad_()]
        )
        bias = None
        if learned:
            bias = tw.alibi(leaves[3]) if learned == "alibi" else tw.t5(leaves[3], bidirectional=False, max_distance=16)
        options: dict[str, Any] = {"mask": tw.causal(), "bias": bias, "layout": layout, "return_lse": True}
        d_out, d_lse = some(8, *q.shape), some(9, batch, 4, 24)
        d_lse = d_lse[0] if layout == "thd" else d_lse
        if spread:
            more = {"cu_seqlens": edges} if packed else {}
            local = [cut(x, axis) for x in leaves[:3]]
            out, lse = context_parallel_attention(*local, **options, **more, strategy=strategy, sharding=sharding)
            d_out, d_lse = cut(d_out, axis), cut(d_lse, d_lse.ndim - 1)
        else:
            if packed:
                ids = torch.tensor([0] * 7 + [1] * 13 + [-1] * 4)
                options["mask"] = tw.causal() & tw.documents(ids, torch.where(ids < 0, -2, ids))
            out, lse = tw.attention(*leaves[:3], **options)
        return [out, lse, *torch.autograd.grad((out, lse), leaves, (d_out, d_lse))]

    got, exact = run(True), run(False)
    names = ["out", "lse", "q", "k", "v", "weight"][: len(got)]
    exact[0], exact[1] = cut(exact[0], axis), cut(exact[1], exact[1].ndim - 1)
    for x in got[2:]:
        dist.all_reduce(x)
    return [(name, portable(a), portable(b)) for name, a, b in zip(names, got, exact, strict=True)]


def helpers(sharding: str, lengths: Any) -> Any:
    """Round trips of `shard` and `unshard`, their gradients, and `positions`."""
    x = some(0, 3, 19, 2).requires_grad_()
    mine = shard(x, 1, sharding=sharding, lengths=lengths)
    where = positions(19, sharding=sharding, lengths=lengths)
    assert torch.equal(mine, x[:, where])
    back = unshard(mine, 1, sharding=sharding, lengths=lengths)
    assert torch.equal(back, x)
    weights = some(dist.get_rank(), 3, 19, 2)
    (gradient,) = torch.autograd.grad(back, mine, weights, retain_graph=True)
    everyone = sum(some(rank, 3, 19, 2) for rank in range(dist.get_world_size()))
    torch.testing.assert_close(gradient, everyone[:, where], rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(mine, x, torch.ones_like(mine))
    assert torch.equal(gradient.sum((0, 2)) / 6, torch.zeros(19, dtype=torch.float64).index_fill(0, where, 1.0))
    return where.tolist()


def compiled(strategy: str) -> Any:
    """A training step in one graph, beside the same step run eagerly; on two ranks."""
    group = group_of(2)
    if dist.get_rank() >= 2:
        return None
    q, k, v = (shard(some(n, 2, 4, 16, 8), 2, group=group) for n in range(3))
    slopes = some(4, 4).abs()

    def step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        out = context_parallel_attention(
            2 * q, k, v, mask=tw.causal() & tw.window(9, 0), bias=tw.alibi(slopes), strategy=strategy, group=group
        )
        return out.sin().sum()

    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, slopes)]
        loss = function(*leaves)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    return [(portable(a), portable(b)) for a, b in zip(*found, strict=True)]


def on_a_mesh() -> Any:
    """Two rows of a mesh, each with a sequence of its own: (got, exact) of this rank's rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    row = mesh["data"].get_local_rank()
    q, k, v = (some(10 * row + n, 1, 2, 9, 4) for n in range(3))
    line = mesh["sequence"]
    local = (shard(x, 2, mesh=line, sharding="zigzag") for x in (q, k, v))
    out = context_parallel_attention(*local, mask=tw.causal(), mesh=line, sharding="zigzag")
    exact = shard(tw.attention(q, k, v, mask=tw.causal()), 2, mesh=line, sharding="zigzag")
    return portable(out), portable(exact)


def differing(what: str) -> str:
    """The error's text where rank 1 makes another call than the others."""
    odd = dist.get_rank() == 1
    q = k = v = some(0, 1, 2, 3, 4, dtype=torch.float32)
    options: dict[str, Any] = {"mask": tw.causal()}
    if odd:
        match what:
            case "dtype":
                q = k = v = q.double()
            case "heads":
                q = k = v = q[:, :1]
            case "mask":
                options["mask"] = None
            case "option":
                options["softcap"] = 3.0
            case "gradient":
                q = q.clone().requires_grad_()
            case "refusal":
                k = k[..., :3]
            case "lengths":
                q = k = v = q[:, :, :1]
                options["sharding"] = "zigzag"
    if what == "lengths":
        options["sharding"] = "zigzag"
    try:
        context_parallel_attention(q, k, v, **options)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused(what: str) -> str:
    """The error's text of what is not available over ranks, or of wrong arguments that all ranks share."""
    q = some(0, 1, 2, 4, 4)
    leaf = q.clone().requires_grad_()
    try:
        match what:
            case "forward mode":
                with torch.autograd.forward_ad.dual_level():
                    dual = torch.autograd.forward_ad.make_dual(q, q)
                    context_parallel_attention(dual, q, q)
            case "transforms":
                torch.func.vmap(lambda x: context_parallel_attention(x, x, x))(q[None])
            case "second order":
                out = context_parallel_attention(leaf, leaf, leaf)
                (first,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
                torch.autograd.grad(first.sum(), leaf)
            case "heads":
                context_parallel_attention(q, q, q, strategy="ulysses")
            case "grid":
                context_parallel_attention(q, q, q, strategy="grid", sharding="stripe")
            case "own rows":
                context_parallel_attention(
                    q[:, :1].expand(1, 4, 4, 4), q, q, mask=torch.ones(4, 16, dtype=torch.bool), strategy="ulysses"
                )
            case "bias":
                context_parallel_attention(q, q, q, bias=some(1, 5, 16))
            case "strategy":
                context_parallel_attention(q, q, q, strategy="best")
            case "sharding":
                context_parallel_attention(q, q, q, sharding="round")
            case "number of lengths":
                context_parallel_attention(q, q, q, lengths=(4, 4))
            case "own length":
                context_parallel_attention(q, q, q, lengths=(5, 5, 5, 5))
            case "mesh":
                mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
                context_parallel_attention(q, q, q, mesh=mesh)
            case "kernel":
                context_parallel_attention(q, q, q, kernel="triton")
            case "dropout":
                context_parallel_attention(q, q, q, dropout=tw.Dropout(0.1, strides=(1, 1, 1, 1)))
            case "cu_seqlens":
                context_parallel_attention(q, q[:, :, :2], q[:, :, :2], cu_seqlens=[0, 3])
    except (ValueError, TypeError, NotImplementedError, tw.KernelRefused) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Counter:
    """Counts what a rank sends: (calls, bytes) of the operations that carry rows."""

    def __init__(self) -> None:
        self.sends, self.bytes, self.gathers, self.swaps = 0, 0, 0, 0

    def __enter__(self) -> Counter:
        from tilewise.torch.distributed import travel

        batch, swap, gather = dist.batch_isend_irecv, dist.all_to_all_single, travel._all_gather

        def counted_batch(calls: Any) -> Any:
            for call in calls:
                if call.op is dist.isend:
                    self.sends, self.bytes = self.sends + 1, self.bytes + call.tensor.nbytes
            return batch(calls)

        def counted_swap(received: Tensor, given: Tensor, out: Any, into: Any, group: Any) -> Any:
            self.swaps += 1
            self.bytes += sum(size for n, size in enumerate(into) if n != dist.get_rank(group))
            return swap(received, given, out, into, group=group)

        def counted_gather(everything: Tensor, own: Tensor, group: Any) -> Any:
            self.gathers += 1
            self.bytes += own.nbytes * (dist.get_world_size(group) - 1)
            return gather(everything, own, group=group)

        self._patches = [
            mock.patch.object(dist, "batch_isend_irecv", counted_batch),
            mock.patch.object(dist, "all_to_all_single", counted_swap),
            mock.patch.object(travel, "_all_gather", counted_gather),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self._patches:
            patch.stop()


def sent(strategy: str, sharding: str, length: int, window: int | None) -> Any:
    """Exchanges and bytes forward, sends and bytes backward, in float32 with 4 query and 2 key heads, 8 wide."""
    q, k = (shard(some(n, 1, h, length, 8, dtype=torch.float32), 2, sharding=sharding) for n, h in ((0, 4), (1, 2)))
    mask = tw.causal() if window is None else tw.causal() & tw.window(window, 0)
    leaf = q.clone().requires_grad_()
    key = k.clone().requires_grad_()
    with Counter() as forward:
        out = context_parallel_attention(leaf, key, k, mask=mask, strategy=strategy, sharding=sharding)
    with Counter() as backward:
        out.sum().backward()
    return forward.sends + forward.swaps + forward.gathers, forward.bytes, backward.sends, backward.bytes


def held(ranks: int, strategy: str, length: int) -> int | None:
    """The most bytes of tensors that a rank holds beyond its inputs, forward and backward."""
    group = group_of(ranks)
    if dist.get_rank() >= ranks:
        return None
    q, k, v = (some(n, 1, 4, length // ranks, 16, dtype=torch.float32).requires_grad_() for n in range(3))
    # What earlier tests left must not be freed, nor what is kept for later calls be made, while this is watched.
    context_parallel_attention(q, k, v, mask=tw.causal(), strategy=strategy, group=group).sum().backward()
    q.grad = k.grad = v.grad = None
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        out = context_parallel_attention(q, k, v, mask=tw.causal(), strategy=strategy, group=group)
        out.sum().backward()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def with_a_lost_rank(how: str, strategy: str, timeout: float) -> tuple[str, float]:
    """Rank 2 dies or sleeps in the middle of a call; what the others are told, and after how many seconds."""
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    q = shard(some(0, 1, 4, 32, 8, dtype=torch.float32), 2)
    calls = 0

    def lose() -> None:
        if how == "dies":
            os._exit(1)
        time.sleep(2 * timeout)

    def failing(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if dist.get_rank() == 2 and calls == (2 if strategy == "ring" else 1):
                lose()
            return original(*args, **options)

        return call

    from tilewise.torch.distributed import travel

    began = time.monotonic()
    with (
        mock.patch.object(dist, "batch_isend_irecv", failing(dist.batch_isend_irecv)),
        mock.patch.object(dist, "all_to_all_single", failing(dist.all_to_all_single)),
        mock.patch.object(travel, "_all_gather", failing(travel._all_gather)),
    ):
        try:
            context_parallel_attention(q, q, q, strategy=strategy, group=group)
        except tw.PeerLost as error:
            assert error.__cause__ is not None
            return str(error), time.monotonic() - began
    return "no error", time.monotonic() - began
