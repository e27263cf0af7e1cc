"""What processes send one another; and what is said when one of them does not answer.

Buffers are packed bytes, so that one exchange carries all that goes to a process, whatever its dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import PeerLost

Shape = tuple[int, ...]
Parcel = tuple[int, Tensor]  # the other's place among the peers, and a contiguous tensor


@dataclass(frozen=True, eq=False)
class Peers:
    """Some ranks of a group, in the order in which a part of the work goes round.

    Attributes:
        group: of torch.distributed.
        ranks: numbers within the group; place: which of them is this process.
    """

    group: Any
    ranks: tuple[int, ...]
    place: int

    def __len__(self) -> int:
        return len(self.ranks)

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], what: str) -> Pending:
        """Start to send and to receive; empty tensors stay at home. `what` says for errors what this is for."""
        calls = [
            dist.P2POp(call, tensor, group=self.group, group_peer=self.ranks[place])
            for call, parcels in ((dist.isend, sends), (dist.irecv, receives))
            for place, tensor in parcels
            if tensor.numel()
        ]
        others = sorted({self.ranks[place] for place, tensor in (*sends, *receives) if tensor.numel()})
        if not calls:
            return Pending((), lambda work: None)

        def guarded(call: Callable[[], Any]) -> Any:
            return answered(self.group, f"exchanged {what} with rank{'s' * (len(others) > 1)} "
                            f"{', '.join(map(str, others))}", call)  # fmt: skip

        return Pending(tuple(guarded(lambda: dist.batch_isend_irecv(calls))), lambda work: guarded(work.wait))

    def swap(self, outgoing: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]], what: str) -> Any:
        """Give every peer some tensors and get some from each.

        Args:
            outgoing: for each peer its tensors, the same number and dtypes for all, wider dtypes first.
            shapes: for each peer the shapes of what it gives.

        Returns:
            For each peer its tensors.
        """
        dtypes = [tensor.dtype for tensor in outgoing[0]]
        sizes = [
            [reduce(mul, shape, 1) * dtype.itemsize for shape, dtype in zip(of_one, dtypes, strict=True)]
            for of_one in shapes
        ]
        packed = [pack(tensors) for tensors in outgoing]
        place, device = self.place, packed[0].device
        if len(self) == dist.get_world_size(self.group):
            received = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=device)
            splits = [sum(of_one) for of_one in sizes], [len(part) for part in packed]
            given = torch.cat(packed)
            answered(
                self.group, f"exchanged {what} with all ranks",
                lambda: dist.all_to_all_single(received, given, *splits, group=self.group),
            )  # fmt: skip
            pieces = list(received.split(splits[0]))
        else:
            pieces = [torch.empty(sum(of_one), dtype=torch.uint8, device=device) for of_one in sizes]
            pieces[place] = packed[place]
            others = [n for n in range(len(self)) if n != place]
            self.post([(n, packed[n]) for n in others], [(n, pieces[n]) for n in others], what).wait()
        return [
            unpack(piece, of_one, dtypes, of_shapes)
            for piece, of_one, of_shapes in zip(pieces, sizes, shapes, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Pending:
    """Exchanges under way."""

    works: tuple[Any, ...]
    finish: Callable[[Any], None]

    def wait(self) -> None:
        """Until everything has been sent and received."""
        for work in self.works:
            self.finish(work)


def answered(group: Any, what: str, call: Callable[[], Any]) -> Any:
    """The call's result.

    Raises:
        PeerLost: a process is gone, or did not answer within the group's timeout.
    """
    try:
        return call()
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        raise PeerLost(
            f"context_parallel_attention: rank {dist.get_rank(group)} of {dist.get_world_size(group)} {what}, and one "
            f"is gone or did not answer within the group's timeout: {error}"
        ) from error


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of some tensors, one after the other."""
    return torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])


def unpack(
    packed: Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype], shapes: Sequence[Shape]
) -> list[Tensor]:
    """Tensors whose bytes `pack` joined; views of it."""
    if packed.storage_offset() % 8:
        packed = packed.clone()  # wider numbers must stand at places that they divide
    parts = packed.split(list(sizes))
    return [part.view(dtype).view(shape) for part, dtype, shape in zip(parts, dtypes, shapes, strict=True)]
