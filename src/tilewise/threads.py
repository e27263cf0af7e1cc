"""How many threads the compiled kernels use."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def get_num_threads() -> int:
    """Threads of a native call on NumPy and jax arrays; on torch tensors torch's own number holds.

    Returns:
        What `set_num_threads` set, else TILEWISE_NUM_THREADS, else OMP_NUM_THREADS, else the cores this process may use
        by its affinity and its cgroup's quota. 1 where the compiled module is not installed.
    """
    return int(import_module("tilewise._native").num_threads()) if _installed() else 1


def set_num_threads(threads: int) -> None:
    """Use so many threads from now on; 0 returns to the default. Results never depend on the number.

    Raises:
        TypeError: `threads` is no int. ValueError: it is negative.
    """
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads: got {type(threads).__name__}, expected an int")
    if threads < 0:
        raise ValueError(f"threads: got {threads}, expected a positive number, or 0 for the default")
    if _installed():
        import_module("tilewise._native").set_num_threads(threads)


def _installed() -> bool:
    return find_spec("tilewise._native") is not None
