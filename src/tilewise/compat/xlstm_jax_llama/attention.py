"""Multi-head attention of packed documents, over the kernels of tilewise."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from ..._api import attention
from ...kernels import cards
from ...masks.primitives import causal as causal_mask
from ...masks.primitives import documents

Array = Any

AttentionBackend = Literal["xla", "pallas_triton", "cudnn", "triton", "native", "portable", "reference"]

# Names of the original and the kernel that each stands for; None is tilewise's choice.
_KERNELS = {"xla": None, "cudnn": None, "pallas_triton": "portable", "triton": "portable"}


def segment_mask(segment_ids: Array) -> Array:
    """(B, 1, S, S), True where the ids (B, S) of query and key are equal; ids need not be contiguous."""
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def multihead_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None = None,
    causal: bool = True,
    qk_scale: float | Array | None = None,
    backend: AttentionBackend = "xla",
    *,
    reference_scale: Literal["num_heads"] | None = None,
) -> Array:
    """Attention within documents, in memory linear in the lengths.

    Args:
        q: (B, Sq, NH, DHQK) or (Sq, NH, DHQK). k: (B, Sk, NK, DHQK), NH a multiple of NK. v: (B, Sk, NK, DHV).
        segment_ids: (B, S) integers, of queries and keys alike; a query sees keys of its own id. (S,) for 3-D arrays.
        causal: query i sees the keys up to i, also where Sq and Sk differ.
        qk_scale: factor of q, which may be traced; None is 1/sqrt(DHQK).
        backend: see the module's text; any kernel of tilewise may be named.
        reference_scale: "num_heads" takes size(q, axis 2)^-0.5 in None's place, as the original does.

    Returns:
        (B, Sq, NH, DHV) or (Sq, NH, DHV), q's dtype.

    Raises:
        ValueError: an unknown backend, or shapes that do not fit; the message begins with the argument's name.
    """
    kernel = _kernel(backend)
    if q.ndim not in (3, 4):
        raise ValueError(f"q: has shape {q.shape}, expected (B, S, NH, DH) or (S, NH, DH)")
    if reference_scale not in (None, "num_heads"):
        raise ValueError(f"reference_scale: got {reference_scale!r}, expected None or 'num_heads'")
    if qk_scale is None and reference_scale:
        qk_scale = q.shape[2] ** -0.5
    batched = q.ndim == 4
    q, k, v = (jnp.asarray(x) if batched else jnp.asarray(x)[None] for x in (q, k, v))
    scale = None
    if isinstance(qk_scale, int | float | np.number):
        scale = float(qk_scale)
    elif qk_scale is not None:
        q, scale = (q * qk_scale).astype(q.dtype), 1.0
    parts = [causal_mask("start")] if causal else []
    if segment_ids is not None:
        parts.append(documents(_ids(segment_ids, q, k)))
    mask = parts[0] & parts[1] if len(parts) == 2 else parts[0] if parts else None
    out = attention(
        q, k, v, mask=mask, scale=scale, layout="bshd", kernel=kernel, allow_quadratic=kernel == "reference"
    )  # fmt: skip
    return out if batched else out[0]


def _ids(segment_ids: Array, q: Array, k: Array) -> Array:
    ids = jnp.atleast_2d(segment_ids)
    if ids.shape not in ((q.shape[0], q.shape[1]), (1, q.shape[1])) or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segment_ids: has shape {jnp.shape(segment_ids)} with {q.shape[1]} queries and {k.shape[1]} keys, "
            f"expected one id for each position of both, ({q.shape[0]}, {q.shape[1]})"
        )
    return ids


def _kernel(backend: str) -> str | None:
    if backend in _KERNELS:
        return _KERNELS[backend]
    names = [card.name for card in cards()]
    if backend not in names:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join([*_KERNELS, *names])}")
    return backend
