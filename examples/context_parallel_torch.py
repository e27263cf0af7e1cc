"""A small language model trained on real text with its sequence cut over the processes of torch.distributed.

    torchrun --nproc-per-node 4 examples/context_parallel_torch.py

Each process holds a quarter of every sequence, in two pieces that balance the causal mask ("zigzag"); attention alone
looks at the others. The first process trains the same model on whole sequences beside it, and the two loss curves must
agree within rounding: the exit code is 0 only then. Over several machines with GPUs the same script runs with NCCL:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/...
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from _demo.texts import passages
from torch import Tensor, nn
from torch.nn import functional

import tilewise as tw
from tilewise.torch import context_parallel_attention, rotary
from tilewise.torch.distributed import positions, shard

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AGREE = 2e-4  # nats: what float32 sums in another order may differ by, after many steps of training


class Decoder(nn.Module):
    """A decoder over bytes: rotary positions, grouped heads, tied embedding."""

    def __init__(self, width: int = 64, heads: int = 4, kv_heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.embed = nn.Embedding(256, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_a": nn.RMSNorm(width),
                    "qkv": nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "norm_b": nn.RMSNorm(width),
                    "up": nn.Linear(width, 4 * width, bias=False),
                    "down": nn.Linear(4 * width, width, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor, where: Tensor, attend: Attend) -> Tensor:
        """Logits (B, S, 256) of tokens (B, S) that stand at the positions `where` (S,) of their sequence."""
        x = self.embed(tokens)
        for layer in self.layers:
            heads = layer["qkv"](layer["norm_a"](x)).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
            q, k = (rotary(part, where, layout="bshd") for part in (q, k))
            x = x + layer["out"](attend(q, k, v).flatten(2))
            x = x + layer["down"](functional.silu(layer["up"](layer["norm_b"](x))))
        return self.norm(x) @ self.embed.weight.T


def train(
    batches: list[Tensor], cut: Callable[[Tensor], Tensor], where: Tensor, attend: Attend, share: bool
) -> list[float]:
    """The losses of training on `cut` of each batch (B, S + 1); `share`: gradients are summed over the processes."""
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in batches:
        tokens, targets = cut(batch[:, :-1]), cut(batch[:, 1:])
        logits = model(tokens, where, attend)
        # Divided by the tokens of all processes, so that the sum over them is the mean.
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / batch[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if share:
            dist.all_reduce(total)
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        losses.append(total.item())
    return losses


def main() -> int:
    """Train both ways; 0 if the curves agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    asked = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()

    text = "\n".join(passage.text for passage in passages(400)).encode()
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, asked.length + 1, asked.length)
    batches = [rows[[(2 * n) % len(rows), (2 * n + 1) % len(rows)]] for n in range(asked.steps)]

    where = positions(asked.length, sharding="zigzag")
    ours = train(
        batches,
        lambda x: shard(x, 1, sharding="zigzag"),
        where,
        lambda q, k, v: context_parallel_attention(q, k, v, mask=tw.causal(), layout="bshd", sharding="zigzag"),
        share=True,
    )
    agreed = torch.tensor(True)
    if rank == 0:
        alone = train(
            batches,
            lambda x: x,
            torch.arange(asked.length),
            lambda q, k, v: tw.attention(q, k, v, mask=tw.causal(), layout="bshd"),
            share=False,
        )
        print(f"{len(text):,} bytes of text, {asked.length} tokens a sequence, {len(where)} of them on each process")
        print(f"{'step':>6} {f'{count} processes':>14} {'one device':>14} {'difference':>12}")
        for n in sorted({*range(0, asked.steps, max(1, asked.steps // 12)), asked.steps - 1}):
            print(f"{n:>6} {ours[n]:>14.6f} {alone[n]:>14.6f} {ours[n] - alone[n]:>12.1e}")
        worst = max(abs(a - b) for a, b in zip(ours, alone, strict=True))
        agreed = torch.tensor(worst < AGREE)
        print(f"largest difference {worst:.1e}: {'the curves agree' if agreed else f'more than {AGREE:g}'}")
    dist.broadcast(agreed, 0)
    dist.destroy_process_group()
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
