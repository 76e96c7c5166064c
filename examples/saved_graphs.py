"""fxbt.save and fxbt.load: a second process runs optimised graphs that it did not capture.

Run it twice with `.venv/bin/python examples/saved_graphs.py FOLDER`: the first run writes the graphs, the second reads
them. `fxbt.optimize(model, cache=True)` does both by itself, in the cache folder.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import fxbt


class Encoder(nn.Module):
    """Three of torch's own layers over [batch, length, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 16, 64)
    with torch.inference_mode():
        is_first = not any(folder.glob("graph-*.json"))
        fast = fxbt.optimize(model) if is_first else fxbt.load(folder, model)
        start = time.perf_counter()
        output = fast(x)
        print(f"The first call took {time.perf_counter() - start:.2f} s, largest difference", end=" ")
        print(f"{(output - model(x)).abs().max():.1e}")
    if is_first:
        print("Wrote", *[path.name for path in fxbt.save(fast, folder)])
    print(fast.report)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
            main(Path(name))
