"""Which framework an array belongs to, and the few verbs in which the frameworks differ.

Frameworks are recognised by what is already loaded: an array of a framework can only exist once that framework has
been imported, so nothing is ever imported here to ask the question.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import numpy as np

Array = Any  # numpy.ndarray, torch.Tensor or jax.Array; no common type exists without importing them
Family = Literal["numpy", "torch", "jax"]


def family_of(value: Any) -> Family | None:
    """The framework `value` is an array of, or None when it is no array of a framework that is loaded, or hides a part
    of itself (`numpy.ma`)."""
    # Written so that torch's compiler can follow it: no unions of types, no caches.
    if isinstance(value, (np.ndarray, np.generic)):
        # No kernel reads the mask of a masked array, so what it hides would be seen.
        return None if isinstance(value, np.ma.MaskedArray) else "numpy"
    if value is None or isinstance(value, (int, float, str, list, tuple)):
        return None
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        return "torch"
    # jax.Array answers isinstance() through a metaclass, for tracers too.
    if jax is not None and isinstance(value, getattr(jax, "Array", ())):
        return "jax"
    return None


def introduce() -> None:
    """Make masks, biases and dropout pytrees once jax is there, so that `jit` takes them before any call of ours.

    Masks and biases call this when they are made; it loads jax's room only where the caller has loaded jax.
    """
    if "jax" in sys.modules and not traced_by_torch() and "tilewise.jax.pytrees" not in sys.modules:
        import_module(f"{__package__}.jax.pytrees")


def traced_by_torch() -> bool:
    """Whether torch's compiler is following this very call; it can neither import nor count."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def dtype_name(array: Array) -> str:
    """'float32', 'bfloat16', 'bool', … for an array of any framework."""
    dtype = array.dtype
    return _numpy_name(dtype) if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


@lru_cache(maxsize=64)
def _numpy_name(dtype: np.dtype) -> str:
    return str(dtype)


def device_kind(array: Array) -> str:
    """'cpu', 'cuda', 'tpu', 'mps', …: the kind of device the array lives on, or will live on when traced."""
    family = family_of(array)
    if family == "torch":
        return str(array.device.type)
    if family == "jax":
        return _jax_device_kind(array)
    return "cpu"


def gpu_is_here() -> bool:
    """Whether torch, if it is loaded at all, sees a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())


def device_model(array: Array) -> tuple[str, str]:
    """(name, architecture) of the GPU a torch tensor lives on: ("NVIDIA H200", "sm_90"), ("…", "gfx942").

    Empty strings for everything else, and for a GPU that is not here, where a fake tensor may live.
    """
    if family_of(array) != "torch" or device_kind(array) != "cuda":
        return "", ""
    return _torch_device_model(array.device)


@lru_cache(maxsize=64)
def _torch_device_model(device: Any) -> tuple[str, str]:
    torch = sys.modules["torch"]
    if not torch.cuda.is_available():
        return "", ""
    name = str(torch.cuda.get_device_name(device))
    if torch.version.hip:
        return name, torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return name, f"sm_{major}{minor}"


def _jax_device_kind(array: Array) -> str:
    jax = sys.modules["jax"]
    if isinstance(array, jax.core.Tracer):
        kind = jax.default_backend()  # a tracer names no device; jit compiles for the default one
    else:
        kind = next(iter(array.devices())).platform
    return "cuda" if kind in ("gpu", "rocm") else str(kind)


def is_abstract(value: Any) -> bool:
    """True when the values of an array cannot be looked at: a jax tracer, a torch fake or functorch-wrapped tensor."""
    family = family_of(value)
    if family == "jax":
        return isinstance(value, sys.modules["jax"].core.Tracer)
    if family == "torch":
        torch = sys.modules["torch"]
        plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        return not plain or value.device.type == "meta" or torch._C._functorch.is_functorch_wrapped_tensor(value)
    return False


def is_device_array(value: object) -> bool:
    """True for arrays whose values NumPy cannot read in place: abstract ones, and torch tensors off the CPU."""
    return is_abstract(value) or (family_of(value) == "torch" and device_kind(value) != "cpu")


def to_numpy(value: Array) -> np.ndarray:
    """The array as NumPy, in place where its memory is the host's; torch tensors are detached."""
    if family_of(value) == "torch":
        return np.asarray(value.detach())
    return np.asarray(value)


def torch_of(array: np.ndarray) -> Any:
    """A NumPy array as a torch tensor, in place unless it has negative strides, swapped bytes or read-only memory."""
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling():  # the compiler knows no flags of an array
        return torch.as_tensor(array, device="cpu")
    fit = array.flags.writeable and array.dtype.isnative and min(array.strides, default=0) >= 0
    # The device is named since torch's default device may be another one.
    return torch.as_tensor(array if fit else np.array(array, array.dtype.newbyteorder("=")), device="cpu")


def as_array(name: str, value: Any) -> Any:
    """The argument of that name: lists and tuples as a NumPy array; all else, arrays among it, as it is.

    While torch's compiler follows the call they become tensors, NumPy's arrays too: it does not know what dtype those
    have.

    Raises:
        ValueError: lists that make no array, their lengths being unequal.
    """
    # A masked array stays one, to be refused: as a plain one it would show what it hides.
    if not isinstance(value, (list, tuple, np.ndarray)) or isinstance(value, np.ma.MaskedArray):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        got = type(value).__name__
        raise ValueError(f"{name}: got a {got} that makes no array, expected rows of equal lengths") from None
    return torch_of(array) if traced_by_torch() else array


def namespace(family: Family, device: object = None) -> Any:
    """The functions that lowering needs (`arange`, `where`, `minimum`, …), under NumPy's names, for a framework."""
    if family == "numpy":
        return np
    if family == "jax":
        return sys.modules["jax"].numpy
    return _TorchNamespace(device)


class _TorchNamespace:
    """NumPy's names for the torch functions used in lowering, on one device."""

    def __init__(self, device: object) -> None:
        torch = sys.modules["torch"]
        self._torch, self._device = torch, device
        self.int32, self.int64, self.bool_ = torch.int32, torch.int64, torch.bool
        self.float32, self.float64 = torch.float32, torch.float64
        self.where, self.stack, self.concatenate = torch.where, torch.stack, torch.cat
        self.broadcast_to, self.take_along_axis = torch.broadcast_to, torch.take_along_dim
        self.abs, self.log = torch.abs, torch.log

    def asarray(self, value: Array, dtype: object = None) -> Array:
        if isinstance(value, np.ndarray):
            value = torch_of(value)
        return self._torch.as_tensor(value, dtype=dtype, device=self._device)

    def arange(self, *bounds: int, dtype: object = None) -> Array:
        start, stop = bounds if len(bounds) == 2 else (0, *bounds)
        # torch raises where NumPy answers with an empty array
        return self._torch.arange(start, max(start, stop), dtype=dtype, device=self._device)

    def full(self, shape: tuple[int, ...], value: object, dtype: object = None) -> Array:
        return self._torch.full(shape, value, dtype=dtype, device=self._device)

    def minimum(self, a: Array, b: Array) -> Array:
        return self._torch.minimum(self.asarray(a), self.asarray(b))

    def maximum(self, a: Array, b: Array) -> Array:
        return self._torch.maximum(self.asarray(a), self.asarray(b))

    def argsort(self, a: Array, axis: int) -> Array:
        return self._torch.argsort(a, dim=axis, stable=True)
