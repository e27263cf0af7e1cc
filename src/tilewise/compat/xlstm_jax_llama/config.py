"""The configuration of `SelfAttention`, and of the mesh it may be spread over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import jax.numpy as jnp

from .attention import AttentionBackend

_HALF_OR_SINGLE = (None, "float32", "bfloat16", "float16")


class ConfigurationError(ValueError, AssertionError):
    """Sizes or names that do not go together: a ValueError as everywhere in tilewise, an AssertionError as before."""


@dataclass(kw_only=True)
class ParallelConfig:
    """The mesh's axes and how parameters are spread over them.

    Attributes:
        data_axis_size, fsdp_axis_size, pipeline_axis_size, model_axis_size: devices along each axis, -1 for the rest.
        data_axis_name, fsdp_axis_name, pipeline_axis_name, model_axis_name: the axes' names in the mesh.
        remat, fsdp_modules: names of modules to recompute and to split; for those who build models of blocks.
        fsdp_min_weight_size: parameters with at most this many elements are not split.
        fsdp_gather_dtype, fsdp_grad_scatter_dtype: dtypes in which split parameters are gathered, and their gradients
            scattered: None for their own, "float32", "bfloat16" or "float16".
        tp_async_dense: kept for configurations that name it; nothing here reads it.

    Raises:
        AssertionError: another dtype (it is a ValueError, too).
    """

    data_axis_size: int = -1
    fsdp_axis_size: int = 1
    pipeline_axis_size: int = 1
    model_axis_size: int = 1
    data_axis_name: str = "dp"
    fsdp_axis_name: str = "fsdp"
    pipeline_axis_name: str = "pp"
    model_axis_name: str = "tp"
    remat: Sequence[str] = ()
    fsdp_modules: Sequence[str] = ()
    fsdp_min_weight_size: int = 2**18
    fsdp_gather_dtype: str | None = None
    fsdp_grad_scatter_dtype: str | None = None
    tp_async_dense: bool = False

    def __post_init__(self) -> None:
        for name in ("fsdp_gather_dtype", "fsdp_grad_scatter_dtype"):
            if (got := getattr(self, name)) not in _HALF_OR_SINGLE:
                raise ConfigurationError(f"{name}: got {got!r}, expected one of {_HALF_OR_SINGLE}")


@dataclass
class SelfAttentionConfig:
    """What `SelfAttention` needs to know.

    Attributes:
        head_dim: width of a head; the number of heads follows from that of the input.
        qk_norm: RMS norm of queries and keys before rotary embedding. use_bias: biases in all four projections.
        dropout_rate: of the output, in training.
        num_layers: of the model; sets the scale of the first values of `dense_out`.
        dtype: of computation and output, by name; parameters are float32.
        attention_backend, causal: as for `multihead_attention`.
        parallel: the mesh.
        reference_scale: "num_heads" for models trained with the original's scale, as for `multihead_attention`.
    """

    head_dim: int = 64
    qk_norm: bool = False
    use_bias: bool = False
    dropout_rate: float = 0.0
    num_layers: int = 12
    dtype: str = "float32"
    attention_backend: AttentionBackend = "xla"
    causal: bool = True
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    reference_scale: Literal["num_heads"] | None = None

    @property
    def _dtype(self) -> Any:
        """The dtype that `dtype` names."""
        return getattr(jnp, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, for logging: scalars as they are, sequences as tuples, anything else as text."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, int | float | str | bool):
        return value
    return tuple(value) if isinstance(value, list | tuple) else str(value)
