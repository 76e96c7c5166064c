"""A kernel of one's own for a block of one's own, on CPUs. Run: python examples/lowering_swiglu.py"""

import torch
import torch.nn.functional as F
from torch import nn

import fxbt

fxbt.block("swiglu", "silu(x gate^T) * (x up^T)")


class SwiGLU(fxbt.Rule):
    """silu(x gate^T) * (x up^T) as one node"""

    name = outline = "swiglu"

    def pattern(self, op, x):
        return op.silu(op.linear(x, op.weight("gate"))) * op.linear(x, op.weight("up"))


# Here goes what you have: a torch.library op, Triton, C. `both` is made once, and again when a weight changes.
@fxbt.lowering("swiglu", device="cpu", prepare={"both": lambda gate, up: torch.cat([gate, up])})
def in_one_product(x, both):
    gate, up = F.linear(x, both).chunk(2, -1)
    return F.silu(gate).mul_(up)


class FeedForward(nn.Module):
    """x [batch, length, width] -> the same shape"""

    def __init__(self, width: int = 64, inner: int = 160):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward(), FeedForward()).eval()
    fast = fxbt.optimize(model, rules=[SwiGLU()])
    with torch.inference_mode():
        fast.warmup(torch.randn(2, 5, 64))
        for shape in [(2, 5, 64), (3, 9, 64)]:
            x = torch.randn(*shape)
            print(f"{shape}: largest difference {(fast(x) - model(x)).abs().max():.1e}")
    print(fast.report)


if __name__ == "__main__":
    main()
