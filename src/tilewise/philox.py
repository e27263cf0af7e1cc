"""Philox4x32-10, the counter-based generator behind dropout, for every array framework.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). A word depends on its counter
and key alone, so any tile of the dropout mask can be made anywhere, in any order, and made again in the backward pass.

Words are integers below 2^32 in one of two arithmetics: `wide`, in int64 arrays (NumPy and torch, whose uint32 is
incomplete), or narrow, in uint32 arrays (jax, which has no 64-bit integers unless asked).
"""

from __future__ import annotations

from typing import Any

from ._arrays import Array
from .contract import Dropout

Word = Any  # an int below 2^32, or an array of such integers
Words = tuple[Word, ...]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox(counter: Words, key: Words, xp: Any, wide: bool = True) -> Words:
    """The four output words of a counter.

    Args:
        counter: four words, least significant first: arrays that broadcast against each other, or ints.
        key: two words, likewise.
        xp: namespace of the arrays; only `asarray` and integer dtypes are asked of it.
        wide: int64 arithmetic; False is uint32 arithmetic.
    """
    multiply = _multiply_wide if wide else _multiply_narrow
    c0, c1, c2, c3 = (_word(word, xp, wide) for word in counter)
    k0, k1 = (_word(word, xp, wide) for word in key)
    for _ in range(_ROUNDS):
        high0, low0 = multiply(c0, _MULTIPLIERS[0], xp)
        high1, low1 = multiply(c2, _MULTIPLIERS[1], xp)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (_add(k, step, xp, wide) for k, step in zip((k0, k1), _KEY_STEPS, strict=True))
    return c0, c1, c2, c3


def keep_mask(
    dropout: Dropout,
    b: Array,
    h: Array,
    i: Array,
    j: Array,
    heads: int,
    q_len: int,
    k_len: int,
    xp: Any,
    wide: bool = True,
) -> Array:
    """Which pairs dropout keeps: booleans of the shape that the positions broadcast to.

    Args:
        dropout: with its seed as (low, high) words.
        b, h, i, j: integer arrays that broadcast against each other: batch row, query head, query, key.
        heads, q_len, k_len: Hq, Sq, Sk of the whole problem, of which the positions may be any part.
        xp, wide: as for `philox`; positions are int64 arrays when wide.
    """
    index = number_of(dropout, (b, h, i, j), heads, q_len, k_len, xp, wide)
    seed, stream = dropout.seed, (dropout.stream & _LOW, dropout.stream >> 32)
    word = philox((*index, *stream), (seed[0], seed[1]), xp, wide)[0]
    if dropout.threshold > _LOW:
        return word != word  # p = 1 keeps nothing, and 2^32 is no 32-bit word to compare with
    return word >= _word(dropout.threshold, xp, wide)


def number_of(
    dropout: Dropout, places: tuple[Array, ...], heads: int, q_len: int, k_len: int, xp: Any, wide: bool = True
) -> Words:
    """The numbers (low, high) of the pairs at the places (b, h, i, j), as for `keep_mask`."""
    first, strides = dropout.numbering(heads, q_len, k_len)
    return (_number_wide if wide else _number_narrow)(first, strides, places, xp)


def _number_wide(first: Words, strides: tuple[int, ...], places: tuple[Array, ...], xp: Any) -> Words:
    """The two words of first + places . strides, in int64 arithmetic that wraps as 64-bit unsigned integers do."""
    # As signed integers, of which int64 arrays are made.
    low, high = (_word(word, xp, True) for word in (first[0], first[1]))
    number = low | (high << 32)
    for stride, place in zip(strides, places, strict=True):
        number = number + place * ((stride + 2**63) % 2**64 - 2**63)
    return number & _LOW, (number >> 32) & _LOW


def _number_narrow(first: Words, strides: tuple[int, ...], places: tuple[Array, ...], xp: Any) -> Words:
    """The same in pairs of 32-bit words; places are below 2^32."""
    low, high = (_word(word, xp, False) for word in (first[0], first[1]))
    for stride, place in zip(strides, places, strict=True):
        word = _word(place, xp, False)
        carry, product = _multiply_narrow(word, stride & _LOW, xp)
        total = low + product
        high = high + carry + word * xp.uint32(stride >> 32 & _LOW) + xp.asarray(total < product, dtype=xp.uint32)
        low = total
    return low, high


def _multiply_wide(word: Word, factor: int, xp: Any) -> Words:
    """(high, low) words of a product. It may wrap to a negative int64, whose 64 bits are still the product's."""
    product = word * factor
    return (product >> 32) & _LOW, product & _LOW


def _multiply_narrow(word: Word, factor: int, xp: Any) -> Words:
    """The same from 16-bit halves, since a product of two 32-bit words does not fit one."""
    high, low = xp.uint32(factor >> 16), xp.uint32(factor & 0xFFFF)
    word_high, word_low = word >> 16, word & 0xFFFF
    first = high * word_low + ((low * word_low) >> 16)
    second = low * word_high + (first & 0xFFFF)
    return high * word_high + (first >> 16) + (second >> 16), word * xp.uint32(factor)


def _add(word: Word, step: int, xp: Any, wide: bool) -> Word:
    return (word + step) & _LOW if wide else word + xp.uint32(step)


def _word(value: Any, xp: Any, wide: bool) -> Word:
    # One axis at least: NumPy warns when a scalar wraps around, and never when an array does.
    array = xp.asarray(value, dtype=xp.int64 if wide else xp.uint32)
    return array if array.ndim else array.reshape(1)
