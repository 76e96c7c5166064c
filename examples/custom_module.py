"""fxbt.optimize on an encoder of one's own: no transformers, attention spelled by hand.

Run it with `.venv/bin/python examples/custom_module.py` after `make demo`.
"""

import math

import torch
from torch import Tensor, nn

import fxbt


class Block(nn.Module):
    """A pre-norm transformer block whose attention is written with einsum.

    `x` is [batch, length, width]; `mask` is [batch, length], True on positions that may be looked at.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.split(self.query(y)), self.split(self.key(y)), self.split(self.value(y))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        x = x + self.out(mixed.flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Token ids [batch, length] and mask [batch, length] -> a dict with `states` [batch, length, width]."""

    def __init__(self, vocabulary: int = 1000, width: int = 128, heads: int = 4, layers: int = 3):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, mask)
        return {"states": x}


def main() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    fast = fxbt.optimize(model)
    assert isinstance(fast, Encoder)

    with torch.inference_mode():
        # Captures now, for calls in this mode; else the first call does, and returns the original's own output.
        fast.warmup(torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.bool))
        for batch, length in [(2, 16), (5, 9), (1, 40)]:  # one graph serves every shape
            ids = torch.randint(0, 1000, (batch, length))
            mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
            # At the tokens: where the mask is False nothing is computed, and `fast` returns zeros.
            difference = (fast(ids, mask)["states"] - model(ids, mask)["states"])[mask].abs().max()
            print(f"{batch} x {length}: largest difference {difference:.1e}")

    print(fast.report)
    print(fast.report.why("attention"))
    assert fxbt.restore(fast) is model


if __name__ == "__main__":
    main()
