"""Block tables: which page holds which rows of a sequence, checked and followed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def numbers_of(name: str, values: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Integers on the host, int64.

    Args:
        shape: sizes expected; None is any.

    Raises:
        ValueError, TypeError: beginning with `name`.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected integers")
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: has shape {array.shape}, expected ({expected})")
    return array.astype(np.int64, copy=False)


def check_pages(k_name: str, k_pages: Tensor, v_name: str, v_pages: Tensor) -> None:
    """Raise unless they are (P, size, Hkv, D) and (P, size, Hkv, Dv), of one dtype and device."""
    for name, pages in ((k_name, k_pages), (v_name, v_pages)):
        if not isinstance(pages, Tensor):
            raise TypeError(f"{name}: got {type(pages).__name__}, expected a torch tensor")
        if pages.dim() != 4 or pages.shape[1] < 1:
            raise ValueError(f"{name}: has shape {tuple(pages.shape)}, expected (P, page size, Hkv, D)")
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(
            f"{v_name}: has shape {tuple(v_pages.shape)}, expected {(*k_pages.shape[:3], 'Dv')} as {k_name} has"
        )
    if (v_pages.dtype, v_pages.device) != (k_pages.dtype, k_pages.device):
        raise TypeError(
            f"{v_name}: has {v_pages.dtype} on {v_pages.device}, "
            f"expected {k_pages.dtype} on {k_pages.device} as {k_name} has"
        )


def check_table(table: np.ndarray, lengths: np.ndarray, size: int, pages: int, of_lengths: str = "lengths") -> None:
    """Raise unless the entries that hold the first lengths[n] rows of each sequence name pages.

    Args:
        table: (B, entries); lengths: (B,); size: rows of a page; pages: how many there are.
        of_lengths: the argument that the lengths come from.
    """
    if (lengths < 0).any():
        raise ValueError(f"{of_lengths}: got {int(lengths.min())}, expected 0 or more")
    needed = -(-lengths // size)
    if needed.max(initial=0) > table.shape[1]:
        row = int(needed.argmax())
        raise ValueError(
            f"block_table: has {table.shape[1]} entries a row, but row {row} holds {int(lengths[row])} tokens in pages "
            f"of {size}, expected at least {int(needed[row])}"
        )
    wrong = ((table < 0) | (table >= pages)) & (np.arange(table.shape[1]) < needed[:, None])
    if wrong.any():
        row, entry = (int(at[0]) for at in np.nonzero(wrong))
        raise ValueError(
            f"block_table: got page {int(table[row, entry])} at [{row}, {entry}], expected 0 to {pages - 1}"
        )


def slots_of(table: np.ndarray, first: np.ndarray, counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Page and place in it of the positions first[n] … first[n] + counts[n] - 1 of each sequence, one after another."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(sequence)) - (counts.cumsum() - counts)[sequence] + first[sequence]
    return table[sequence, position // size], position % size


def write(pages: Tensor, rows: Tensor, slots: tuple[np.ndarray, np.ndarray]) -> None:
    """Put rows (T, Hkv, D) into their slots."""
    page, place = (torch.from_numpy(x).to(pages.device) for x in slots)
    pages[page, place] = rows


def gathered(pages: Tensor, slots: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """The rows of these slots, (T, Hkv, D)."""
    page, place = (torch.from_numpy(x).to(pages.device) for x in slots)
    return pages[page, place]
