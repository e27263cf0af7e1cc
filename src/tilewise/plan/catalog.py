"""Attention as real models call it, named once: for the tests, the benchmarks and `tilewise explain --preset`.

A preset is a shape, the model's mask, bias and options, and a small shape at which the same call runs in milliseconds.
Widths, heads and windows are the models' published configurations; a window of n keys that counts the query's own is
written `window(n - 1, 0)`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..contract import Dropout
from ..masks.algebra import Mask
from ..masks.biases import alibi, t5
from ..masks.primitives import blocks, causal, dense, documents, intervals, lengths, predicate, prefix, window
from .preset import Build, Preset, Random, Shape


def _ragged(rng: Random, n: Shape, length: int) -> np.ndarray:
    """A length per batch row, the longest full and no other below a quarter."""
    drawn = rng.integers(max(1, length // 4), length + 1, n.batch)
    drawn[0] = length
    return drawn


def _documents(n: Shape, count: int) -> np.ndarray:
    """(Sq,) ids of `count` documents of growing length, one after the other."""
    edges = (np.linspace(0, 1, count + 1)[1:-1] ** 1.5 * n.q_len).astype(np.int64)
    return np.searchsorted(edges, np.arange(n.q_len), side="right")


def _local(keys: int) -> Build:
    """A causal window of `keys` keys, its own included; narrower where the sequence is no longer than that."""
    return lambda n, rng: causal() & window(_shrunk(keys, n) - 1, 0)


def _shrunk(keys: int, n: Shape) -> int:
    """A width in keys, or a third of a sequence that is no longer than that."""
    return keys if n.k_len > keys else max(1, n.k_len // 3)


def _slopes(heads: int) -> np.ndarray:
    """The geometric slopes of Press et al. (2022)."""
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)


def _random_blocks(n: Shape, rng: Random, size: int) -> Mask:
    size = size if n.k_len > 8 * size else max(1, n.k_len // 6)
    kept = rng.random((n.q_heads, -(-n.q_len // size), -(-n.k_len // size))) < 0.4
    return blocks(kept, size)


def _big_bird(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A window, a few global positions, and keys at random-looking distances."""
    return (abs(i - j) < 8) | (j < 4) | (i < 4) | ((i * 31 + j * 17 + h * 7) % 29 == 0)


def _some_intervals(n: Shape, rng: Random) -> Mask:
    edges = np.sort(rng.integers(0, n.k_len + 1, (n.q_len, 6)))
    return intervals(edges[:, ::2], edges[:, 1::2])


def _rows_that_see_nothing(n: Shape, rng: Random) -> Mask:
    hidden = rng.random((n.batch, 1, n.q_len, 1)) < 0.3
    return lengths(q=_ragged(rng, n, n.q_len), k=np.arange(n.batch) * n.k_len // n.batch) & ~dense(hidden)


def _shifted_windows(n: Shape, rng: Random) -> Mask:
    """Swin: in a shifted window, a pixel sees those that came from the same side of the image."""
    side = rng.integers(0, 2, (n.batch, n.q_len))
    return documents(side, side)


def _causal(n: Shape, rng: Random) -> Mask:
    return causal()


def _at_the_end(n: Shape, rng: Random) -> Mask:
    return causal("end")


_TEXT = Shape(2, 4, 2, 70, 70, 16, 16)  # a small language model: two query heads for each kv head
_PLAIN = Shape(2, 3, 3, 70, 70, 16, 16)


def _normal(*leading: str) -> Build:
    return lambda n, rng: rng.standard_normal([getattr(n, axis) for axis in leading])


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("bert-base", "BERT base, padded batch",
               Shape(8, 12, 12, 512, 512, 64, 64), _PLAIN,
               mask=lambda n, rng: lengths(k=_ragged(rng, n, n.k_len))),
        Preset("bert-base-training", "BERT base with attention dropout",
               Shape(8, 12, 12, 512, 512, 64, 64), _PLAIN,
               mask=lambda n, rng: lengths(k=_ragged(rng, n, n.k_len)), options={"dropout": Dropout(0.1, 1234, 5)}),
        Preset("llama3-8b", "Llama 3 8B, prefill",
               Shape(1, 32, 8, 8192, 8192, 128, 128), replace(_TEXT, q_heads=8), mask=_causal),
        Preset("llama3-8b-decode", "Llama 3 8B, one token for each of a batch of caches",
               Shape(8, 32, 8, 1, 8192, 128, 128),
               Shape(3, 8, 2, 1, 150, 16, 16), mask=lambda n, rng: lengths(k=_ragged(rng, n, n.k_len)), follows="keys"),
        Preset("llama3-8b-chunk", "Llama 3 8B, chunked prefill behind a cache",
               Shape(1, 32, 8, 512, 8192, 128, 128),
               Shape(2, 4, 2, 40, 150, 16, 16), mask=_at_the_end, follows="keys"),
        Preset("mistral-7b", "Mistral 7B, sliding window, layout of most checkpoints' code",
               Shape(1, 32, 8, 16384, 16384, 128, 128),
               _TEXT, mask=_local(4096), options={"layout": "bshd"}),
        Preset("gemma2-9b-local", "Gemma 2 9B, even layers",
               Shape(1, 16, 8, 8192, 8192, 256, 256), replace(_TEXT, head_dim=32),
               mask=_local(4096), options={"softcap": 50.0, "scale": 256**-0.5}),
        Preset("gemma2-9b-global", "Gemma 2 9B, odd layers",
               Shape(1, 16, 8, 8192, 8192, 256, 256), _TEXT,
               mask=_causal, options={"softcap": 50.0, "scale": 256**-0.5}),
        Preset("gemma3-4b-local", "Gemma 3 4B, five layers of six",
               Shape(1, 8, 4, 8192, 8192, 256, 256), _TEXT, mask=_local(1024)),
        Preset("gpt-oss-20b-local", "gpt-oss 20B, sliding layers with attention sinks",
               Shape(1, 64, 8, 8192, 8192, 64, 64),
               Shape(1, 8, 1, 70, 70, 16, 16), mask=_local(128), sinks=_normal("q_heads")),
        Preset("gpt-oss-20b-global", "gpt-oss 20B, full layers with attention sinks",
               Shape(1, 64, 8, 8192, 8192, 64, 64),
               Shape(2, 4, 1, 33, 33, 16, 16), mask=_causal, sinks=_normal("q_heads")),
        Preset("deepseek-v3", "DeepSeek V3, multi-head latent attention in its expanded form",
               Shape(1, 128, 128, 4096, 4096, 192, 128),
               Shape(1, 2, 2, 65, 65, 192, 128), mask=_causal),
        Preset("streaming-llm", "first tokens kept beside a window",
               Shape(1, 32, 32, 16384, 16384, 128, 128), _PLAIN,
               mask=lambda n, rng: causal() & (prefix(4) | window(_shrunk(1020, n) - 1, 0))),
        Preset("paligemma", "PaliGemma, image and prompt seen by all",
               Shape(2, 8, 1, 1024, 1024, 256, 256), Shape(2, 4, 1, 70, 70, 16, 16),
               mask=lambda n, rng: causal() | prefix(_ragged(rng, n, n.k_len) // 2)),
        Preset("packed-documents", "training on documents one after the other",
               Shape(1, 32, 8, 8192, 8192, 128, 128), replace(_TEXT, batch=1),
               mask=lambda n, rng: documents(_documents(n, 5)) & causal()),
        Preset("packed-varlen", "the same without a batch axis",
               Shape(1, 16, 16, 8192, 8192, 64, 64), Shape(1, 2, 2, 130, 130, 16, 16),
               mask=lambda n, rng: documents(_documents(n, 4)), options={"layout": "thd"}),
        Preset("interleaved-documents", "documents whose tokens alternate",
               Shape(2, 16, 16, 4096, 4096, 64, 64), _PLAIN,
               mask=lambda n, rng: documents(rng.integers(0, 4, (n.batch, n.q_len))) & causal()),
        Preset("tree-speculation", "several intervals for each draft token",
               Shape(1, 32, 8, 64, 4096, 128, 128), Shape(2, 4, 2, 12, 90, 16, 16),
               mask=_some_intervals,
               follows="keys"),
        Preset("t5-encoder", "T5 base, encoder",
               Shape(4, 12, 12, 512, 512, 64, 64), _PLAIN,
               bias=lambda n, rng: t5(rng.standard_normal((32, n.q_heads))), options={"scale": 1.0}),
        Preset("t5-decoder", "T5 base, decoder",
               Shape(4, 12, 12, 512, 512, 64, 64), _PLAIN, mask=_causal,
               bias=lambda n, rng: t5(rng.standard_normal((32, n.q_heads)), bidirectional=False),
               options={"scale": 1.0}),
        Preset("mpt-7b", "MPT 7B, ALiBi",
               Shape(1, 32, 32, 2048, 2048, 128, 128), _PLAIN, mask=_causal,
               bias=lambda n, rng: alibi(_slopes(n.q_heads))),
        Preset("bloom-560m", "BLOOM 560M, ALiBi behind a cache",
               Shape(1, 16, 16, 256, 2048, 64, 64), Shape(2, 3, 3, 20, 90, 16, 16),
               mask=_at_the_end, bias=lambda n, rng: alibi(_slopes(n.q_heads), "end"), follows="keys"),
        Preset("sd15-cross", "Stable Diffusion 1.5, image to prompt",
               Shape(2, 8, 8, 4096, 77, 40, 40), Shape(2, 2, 2, 100, 77, 40, 40),
               follows="queries"),
        Preset("vit-b16", "ViT B/16 at 224 pixels",
               Shape(8, 12, 12, 197, 197, 64, 64), Shape(1, 2, 2, 197, 197, 16, 16), follows="none"),
        Preset("whisper-encoder", "Whisper large, encoder",
               Shape(1, 20, 20, 1500, 1500, 64, 64), Shape(1, 2, 2, 150, 150, 16, 16)),
        Preset("whisper-cross", "Whisper large, decoder to encoder",
               Shape(1, 20, 20, 448, 1500, 64, 64), Shape(1, 2, 2, 45, 150, 16, 16),
               follows="queries"),
        Preset("swin-t", "Swin T, shifted windows",
               Shape(64, 3, 3, 49, 49, 32, 32), Shape(6, 3, 3, 49, 49, 16, 16), mask=_shifted_windows,
               bias=_normal("q_heads", "q_len", "k_len"), follows="none"),
        Preset("alphafold-row", "AlphaFold 2, MSA row attention with pair bias",
               Shape(128, 8, 8, 256, 256, 32, 32),
               Shape(3, 2, 2, 50, 50, 16, 16), mask=lambda n, rng: dense(rng.random((n.batch, 1, 1, n.k_len)) < 0.8),
               bias=_normal("q_heads", "q_len", "k_len")),
        Preset("block-sparse", "random blocks of 64, different for each head",
               Shape(1, 16, 16, 4096, 4096, 64, 64), _PLAIN,
               mask=lambda n, rng: _random_blocks(n, rng, 64)),
        Preset("dense-mask", "a boolean array of the caller's",
               Shape(2, 12, 12, 1024, 1024, 64, 64), _PLAIN,
               mask=lambda n, rng: dense(rng.random((n.batch, n.q_heads, n.q_len, n.k_len)) < 0.5)),
        Preset("big-bird", "a function of the positions",
               Shape(1, 12, 12, 4096, 4096, 64, 64), _PLAIN, mask=lambda n, rng: predicate(_big_bird)),
        Preset("rows-that-see-nothing", "padding everywhere",
               Shape(4, 8, 8, 512, 512, 64, 64), Shape(4, 2, 2, 40, 30, 16, 16),
               mask=_rows_that_see_nothing, sinks=_normal("q_heads"), follows="none"),
    )
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
