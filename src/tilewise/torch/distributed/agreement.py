"""Whether all ranks make the same call, asked before anything else is exchanged.

One small gather of four integers: a digest of all that must be alike, this rank's rows of queries and of keys, and
whether it has refused its own arguments. Where something differs, a second gather tells every rank what.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from .peers import answered

_agreed: set[tuple[str, str]] = set()
_MOST = 1024


def agree(
    group: str, text: str, own: tuple[int, int], lengths: Sequence[int] | None, *, once: bool, error: str = ""
) -> list[int]:
    """The rows of every rank: the queries of all, then the keys of all.

    Args:
        text: all that must be the same; own: this rank's rows of queries and keys.
        lengths: what every rank is believed to have, or None to ask.
        once: whether ranks that agreed on this text and these lengths are believed to agree again.
        error: why this rank refuses the call, so that the others need not wait for it.

    Raises:
        ValueError: on every rank, if they differ or one refuses.
        PeerLost: a rank does not answer.
    """
    process_group = _resolve_process_group(group)
    count = dist.get_world_size(process_group)
    if lengths is not None:
        text = f"{text}, lengths {list(lengths)}"
    if once and lengths is not None and not error and (group, text) in _agreed:
        return list(lengths)
    digest = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")
    device = _device(process_group)
    mine = torch.tensor([digest, *own, bool(error)], device=device)
    rows = [torch.empty_like(mine) for _ in range(count)]
    answered(process_group, "compared its call with all ranks", lambda: dist.all_gather(rows, mine, process_group))
    told = torch.stack(rows).tolist()
    if any(row[0] != digest or row[3] for row in told):
        _explain(process_group, text if not error else "", error)
    found = [row[1] for row in told] + [row[2] for row in told]
    if lengths is not None and found != list(lengths):
        raise ValueError(
            f"lengths: the ranks have {found[:count]} queries and {found[count:]} keys, expected "
            f"{list(lengths)[:count]} and {list(lengths)[count:]}"
        )
    if once and lengths is not None:
        if len(_agreed) >= _MOST:
            _agreed.clear()
        _agreed.add((group, text))
    return found


def _explain(group: Any, text: str, error: str) -> None:
    said: list[Any] = [None] * dist.get_world_size(group)
    answered(group, "compared its call with all ranks", lambda: dist.all_gather_object(said, (text, error), group))
    if error:
        return  # its own error says it better
    refused = [f"rank {n}: {why}" for n, (_, why) in enumerate(said) if why]
    if refused:
        raise ValueError(f"context_parallel_attention: refused by {'; by '.join(refused)}")
    lines = "".join(f"\n  rank {n}: {what}" for n, (what, _) in enumerate(said))
    raise ValueError(f"context_parallel_attention: the ranks make different calls; expected the same on each:{lines}")


def _device(group: Any) -> torch.device:
    """Where the group's small tensors must be."""
    kinds = {device.type for device in getattr(group, "_device_types", ())}
    return torch.device("cpu" if not kinds or "cpu" in kinds else sorted(kinds)[0])
