"""Ours in the place of torch's function, for a block or for good.

Two mechanisms meet. The name `torch.nn.functional.scaled_dot_product_attention` is given to a switch, which every
function of torch itself comes by (`nn.MultiheadAttention`, `F.multi_head_attention_forward`), as do all who look the
name up. Within a block a torch-function mode catches torch's builtin besides, wherever somebody holds it:
`from torch.nn.functional import scaled_dot_product_attention`, a default argument, `torch._C._nn`.

In evaluation `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` may take native paths that call no Python at
all. A mode on the stack makes torch's modules leave them; `install` switches them off
(`torch.backends.mha.set_fastpath_enabled`) and `uninstall` restores what was set.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch.backends import mha
from torch.overrides import TorchFunctionMode

from .attention import scaled_dot_product_attention

_NAME = "scaled_dot_product_attention"
_stock: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention


class _Thread(threading.local):
    """How many blocks this thread is in."""

    depth = 0


class _Place:
    """The name in `torch.nn.functional`: who wants the switch there, and what stood there before."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before: Any = None
        self.installed = False
        self.fastpath = True
        self.imports: list[ModuleType] = []

    def enter(self) -> None:
        """Put the switch there; the lock is held."""
        if not self.users:
            self.before = getattr(torch.nn.functional, _NAME)
            setattr(torch.nn.functional, _NAME, _switch)
        self.users += 1

    def leave(self) -> None:
        """Restore what stood there after the last; the lock is held."""
        self.users -= 1
        # Who has since put a function of their own there may call the switch from it; it then calls what was before.
        if not self.users and getattr(torch.nn.functional, _NAME) is _switch:
            setattr(torch.nn.functional, _NAME, self.before)


_thread = _Thread()
_place = _Place()


@wraps(scaled_dot_product_attention)
def _switch(*args: Any, **options: Any) -> torch.Tensor:
    if _thread.depth or _place.installed:
        return scaled_dot_product_attention(*args, **options)
    return (_place.before or _stock)(*args, **options)


class _Mode(TorchFunctionMode):
    """Catches torch's builtin."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (scaled_dot_product_attention if func is _stock else func)(*args, **(kwargs or {}))


@contextmanager
def sdpa() -> Iterator[None]:
    """Within the block, in this thread, torch's `scaled_dot_product_attention` is ours, however it is reached.

    Blocks may be nested, left by exceptions, and entered by several threads at once. A backward pass that recomputes
    (`torch.utils.checkpoint`) belongs inside the block, too. Compiled functions may be called within it; a block inside
    of one is a break of its graph.

    Example:
        with tilewise.torch.sdpa():
            loss = model(tokens).loss
    """
    with _place.lock:
        _place.enter()
    _thread.depth += 1
    try:
        with _Mode():
            yield
    finally:
        _thread.depth -= 1
        with _place.lock:
            _place.leave()


def install() -> None:
    """Put ours in the place of `torch.nn.functional.scaled_dot_product_attention` in the whole process.

    Modules that imported the function get ours as well; who holds it otherwise (under another name, as a default
    argument, in an object) keeps torch's. torch's native fast paths of encoder layers are switched off. A second call
    changes nothing.
    """
    with _place.lock:
        if _place.installed:
            return
        _place.enter()
        _place.installed = True
        _place.fastpath = mha.get_fastpath_enabled()
        mha.set_fastpath_enabled(False)
        _place.imports = list(_imports())
        for module in _place.imports:
            setattr(module, _NAME, _switch)


def uninstall() -> None:
    """Undo `install`; without one before, nothing."""
    with _place.lock:
        if not _place.installed:
            return
        _place.installed = False
        mha.set_fastpath_enabled(_place.fastpath)
        for module in _place.imports:
            if vars(module).get(_NAME) is _switch:
                setattr(module, _NAME, _stock)
        _place.imports = []
        _place.leave()


def _imports() -> Iterator[ModuleType]:
    """Modules other than torch's own that have imported the builtin. Under another name it was kept on purpose."""
    for path, module in list(sys.modules.items()):
        elsewhere = isinstance(module, ModuleType) and path.split(".")[0] not in ("torch", "tilewise")
        if elsewhere and vars(module).get(_NAME) is _stock:
            yield module
