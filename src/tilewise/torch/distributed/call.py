"""The door: arguments checked, the ranks' calls compared, the operator called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import validate
from ..._arrays import namespace
from ...contract import Dropout
from ...masks.algebra import Mask, as_mask
from ...masks.biases import Bias, DenseBias, Sum, as_bias
from ...masks.primitives import documents
from ...masks.primitives.dense import Dense
from ...masks.site import Site
from ..call import autocast
from ..options import write
from .agreement import agree
from .operator import Team, context_parallel
from .spread import SHARDINGS, STRATEGIES, Strategy, group_of


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: Dropout | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    kernel: str | None = None,
    allow_quadratic: bool = False,
    mesh: Any = None,
    group: Any = None,
    strategy: Strategy = "auto",
    sharding: str = "contiguous",
    lengths: Any = None,
) -> Any:
    """`tilewise.attention` of a sequence that lies over the ranks of a process group, each of which makes this call.

    q, k and v are this rank's rows. Masks, biases and dropout are those of the whole sequence, the same on every rank,
    so they mean what they mean on one device; of a boolean array or a dense bias a rank may give its own rows alone,
    (…, rows, Sk). Gradients to what all ranks share (biases, slopes, sinks) are this rank's part, to be summed over the
    ranks as that of every shared parameter is. Memory of a rank is linear in its own rows with "ring" and "ulysses".

    Determinism: the same call on the same ranks gives the same bits on every run. "ulysses" gives the bits of one
    device (gradients to k and v only where the ranks divide the key heads); the others merge a row's parts in an order
    that depends on the rank, in the accumulator's dtype, so their bits depend on the number of ranks.

    Args:
        q: (B, Hq, Sq, D); k: (B, Hkv, Sk, D); v: (B, Hkv, Sk, Dv); Sq and Sk this rank's rows; or in another `layout`.
        mask, bias, scale, softcap, sinks, dropout, layout, return_lse, kernel, allow_quadratic: as of
            `tilewise.attention`, for the whole sequence. A dropout numbers the pairs of the whole by itself.
        cu_seqlens: (N + 1,) integers, increasing: the whole packs sequences, of which number n has the rows
            [cu[n], cu[n + 1]) and sees only itself. Rows of none see nothing. Needs as many queries as keys.
        mesh: a one-dimensional `DeviceMesh`; group: a process group; neither: the default group.
        strategy: "ring": keys and values travel. "all_gather": each rank holds all that its rows see. "ulysses": rows
            are exchanged for heads, of which there must be a multiple of the ranks. "grid": both, heads within small
            circles of ranks and a ring around them. "auto": the cheapest.
        sharding: which rows a rank has: "contiguous" runs; "zigzag", an early and a late one, which balances causal
            masks; "stripe", every R-th. `shard`, `unshard` and `positions` know all three.
        lengths: each rank's number of rows, one sequence for queries and keys alike or a pair of them. None asks the
            other ranks in each call, together with the comparison below; within compiled programs it means equal ones.

    Before anything else the ranks compare their calls (shapes, dtypes, options, not values): four integers are gathered
    in each call, or, with `lengths`, only the first time that such a call is made.

    Returns:
        out, this rank's rows, q's dtype; with `return_lse` the pair (out, lse).

    Raises:
        ValueError, TypeError: an argument is wrong, or the ranks' calls differ; on every rank.
        KernelRefused, QuadraticMemory: as of `tilewise.attention`.
        PeerLost: a rank is gone, or silent for as long as the group's timeout.
        NotImplementedError: forward mode, `torch.func` transforms or second derivatives, which one device has.
    """
    process_group = group_of(mesh, group)
    _check_name("strategy", strategy, STRATEGIES)
    _check_name("sharding", sharding, SHARDINGS)
    _refuse_transforms(q, k, v)
    q, k, v = autocast(q, k, v)
    arguments = (q, k, v, layout, mask, bias, dropout, cu_seqlens)
    options = f"{scale=}, {softcap=}, {layout=}, {kernel=}, {strategy=}, {sharding=}"
    call, found = _agreed(process_group, arguments, sinks, options, lengths)
    sizes = (*call.arrays.sizes[:2], sum(found[: len(found) // 2]), sum(found[len(found) // 2 :]))
    checked, own_biases = call.checked(sizes, scale, softcap, sinks)
    names, tensors = "q,k,v", list(call.arrays[1:4])
    for array in (*checked.biases.dense, *own_biases):
        names += ",bias"
        tensors.append(array)
    for what, tensor in (("table", checked.biases.table), ("sinks", checked.sinks)):
        if tensor is not None:
            names += "," + what
            tensors.append(tensor)
    facts, integers, text = write(
        names, checked.mask, layout, checked.softcap, checked.dropout, kernel, allow_quadratic
    )
    team = Team(process_group.group_name, strategy, sharding, agreed=not torch.compiler.is_compiling())
    out, lse = context_parallel(tensors, facts, integers, checked.scale, text, found, str(team))
    out, lse = validate.restore(out, lse, layout)
    return (out, lse) if return_lse else out


def _agreed(group: Any, arguments: tuple[Any, ...], sinks: Any, options: str, lengths: Any) -> tuple[_Local, list[int]]:
    """The call, and the rows of every rank. A compiled program compares the calls within its operator."""
    if torch.compiler.is_compiling():
        call, count = _Local.of(*arguments), dist.get_world_size(group)
        if lengths is not None:
            return call, _lengths(lengths, group, call)
        return call, [call.own[0]] * count + [call.own[1]] * count
    try:
        call = _Local.of(*arguments)
        given = None if lengths is None else _lengths(lengths, group, call)
        text = f"{call.text(sinks)}, {options}"
    except (ValueError, TypeError) as wrong:
        # The others wait to compare their calls; they are told that there is nothing to wait for.
        agree(group.group_name, "", (0, 0), None, once=False, error=str(wrong))
        raise
    return call, agree(group.group_name, text, call.own, given, once=given is not None)


@dataclass(frozen=True, slots=True, eq=False)
class _Local:
    """What can be said of a call without the other ranks."""

    arrays: validate.Arrays
    mask: Mask | None
    bias: Bias | None
    dropout: Dropout | None
    cu_seqlens: Any

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, layout: str, mask: Any, bias: Any, dropout: Any, cu_seqlens: Any) -> _Local:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: got {type(x).__name__}, expected a torch tensor")
        if dropout is not None and not isinstance(dropout, Dropout):
            raise TypeError(f"dropout: got {type(dropout).__name__}, expected tilewise.Dropout(p, seed) or None")
        if dropout is not None and dropout.strides is not None:
            raise ValueError("dropout: got strides, expected none: pairs are numbered as those of the whole sequence")
        mask, bias = None if mask is None else as_mask(mask), None if bias is None else as_bias(bias)
        return cls(validate.check_arrays(q, k, v, layout), mask, bias, dropout, cu_seqlens)

    @property
    def own(self) -> tuple[int, int]:
        """This rank's numbers of queries and keys."""
        return self.arrays.sizes[2], self.arrays.sizes[3]

    def text(self, sinks: Any) -> str:
        """What must be the same on every rank, without values of arrays."""
        arrays = self.arrays
        said = [
            f"{name} {'x'.join(str(n) for axis, n in enumerate(x.shape) if axis != 2)} {x.dtype}"
            f"{' with gradient' * (x.requires_grad and torch.is_grad_enabled())}"
            for name, x in zip("qkv", arrays[1:4], strict=True)
        ]
        if self.mask is not None:
            leaves = [
                (type(leaf).__name__, [self._shape(leaf, x) for x in leaf.operands()])
                for leaf in self.mask.primitives()
            ]
            said.append(f"mask {leaves} {_without_arrays(self.mask.structure())}")
        for part in () if self.bias is None else self.bias.parts():
            said.append(f"bias {type(part).__name__} {[self._shape(part, x) for x in part.operands()]}")
        if self.dropout is not None:
            seed = self.dropout.seed if isinstance(self.dropout.seed, int) else "of an array"
            said.append(f"dropout {self.dropout.p} seed {seed} stream {self.dropout.stream}")
        if sinks is not None:
            said.append(f"sinks {tuple(sinks.shape) if isinstance(sinks, Tensor) else sinks}")
        return ", ".join(said)

    def checked(
        self, sizes: tuple[int, int, int, int], scale: Any, softcap: Any, sinks: Any
    ) -> tuple[validate.Checked, list[Tensor]]:
        """The arguments as those of the whole, and the biases that hold this rank's rows alone."""
        batch, heads, q_len, k_len = sizes
        mask, rows, shared, own = self.mask, self.own[0], [], []
        for part in () if self.bias is None else self.bias.parts():
            if isinstance(part, DenseBias) and part.array.ndim > 1 and part.array.shape[-2] == rows not in (1, q_len):
                part.check(Site(batch, heads, rows, k_len))
                own.append(part.four(namespace("torch", self.arrays.q.device)))
            else:
                shared.append(part)
        if self.cu_seqlens is not None:
            inside = _sequences(self.cu_seqlens, q_len, k_len)
            mask = inside if mask is None else mask & inside
        arrays = self.arrays._replace(sizes=sizes)
        bias = Sum(tuple(shared)) if shared else None
        return validate.check_options(arrays, mask, bias, scale, softcap, sinks, self.dropout), own

    def _shape(self, holder: Any, array: Any) -> tuple[Any, ...]:
        """The array's shape, without the rows where it may hold this rank's alone."""
        shape = tuple(array.shape)
        if isinstance(holder, Dense | DenseBias) and len(shape) > 1 and shape[-2] in (1, self.own[0]):
            return (*shape[:-2], "rows", shape[-1])
        return shape


def _without_arrays(structure: Any) -> Any:
    if isinstance(structure, tuple):
        if structure[:1] == ("array",):
            return "array"
        return tuple(_without_arrays(part) for part in structure)
    return structure if isinstance(structure, str | int | float | None) else type(structure).__name__


def _lengths(lengths: Any, group: Any, call: _Local) -> list[int]:
    """Rows of every rank, the queries of all and then the keys of all."""
    count = dist.get_world_size(group)
    pair = len(lengths) == 2 and all(isinstance(part, Sequence) for part in lengths)
    both = [list(part) for part in (lengths if pair else (lengths, lengths))]
    for part, own, what in zip(both, call.own, ("queries", "keys"), strict=True):
        if len(part) != count:
            raise ValueError(f"lengths: got {len(part)} of them, expected one for each of {count} ranks")
        if part[dist.get_rank(group)] != own:
            raise ValueError(f"lengths: says {part[dist.get_rank(group)]} {what} for this rank, which has {own}")
    return both[0] + both[1]


def _sequences(cu_seqlens: Any, q_len: int, k_len: int) -> Mask:
    """The mask of packed sequences; rows of none have ids that no other row has."""
    if q_len != k_len:
        raise ValueError(f"cu_seqlens: got {q_len} queries and {k_len} keys, expected as many; use documents() instead")
    edges = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.as_tensor(cu_seqlens, device="cpu")
    if edges.ndim != 1 or edges.shape[0] < 1 or edges.is_floating_point() or edges.dtype == torch.bool:
        raise ValueError(
            f"cu_seqlens: has shape {tuple(edges.shape)} and dtype {edges.dtype}, expected (N + 1,) integers"
        )
    ids = torch.bucketize(torch.arange(q_len, device=edges.device), edges, right=True)
    outside = (ids == 0) | (ids == edges.shape[0])
    return documents(ids.masked_fill(outside, -1), ids.masked_fill(outside, -2))


def _check_name(argument: str, value: Any, names: Sequence[str]) -> None:
    if value not in names:
        raise ValueError(f"{argument}: got {value!r}, expected {', '.join(map(repr, names))}")


def _refuse_transforms(*tensors: Any) -> None:
    if torch.compiler.is_compiling():
        return
    forward = torch.autograd.forward_ad
    tangents = forward._current_level >= 0 and any(
        isinstance(x, Tensor) and forward.unpack_dual(x).tangent is not None for x in tensors
    )
    if tangents or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "context_parallel_attention: forward mode and torch.func transforms are not available over several ranks; "
            "reverse mode is"
        )
