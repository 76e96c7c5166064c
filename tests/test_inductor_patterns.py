"""torch's own list of attention spellings: Inductor's 82 inference variants, each found.

Source: `torch._inductor.fx_passes.fuse_attention`, the functions as torch registers them, on its example shapes.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.fx_passes import fuse_attention

import fxbt

LARGEST = 10**6  # elements of an example that is taken as it is; one has 1024 x 128 x 128


def variants(kind: str) -> dict[str, Any]:
    listed = fuse_attention._get_sfdp_patterns(torch.device("cpu"))
    return {name: registered for name, registered in listed if name.endswith(kind)}


VARIANTS = variants("_inference")


class Spelled(nn.Module):
    def __init__(self, function: Any, numbers: dict[str, float]):
        super().__init__()
        self.function, self.numbers = function, numbers

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, **self.numbers)


def values_like(example: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = example.shape if example.numel() < LARGEST else (6, 12, 8)
    if example.ndim == 0:
        return torch.tensor(2.0, dtype=example.dtype)
    if example.dtype is torch.bool or example.ndim == 2:
        kept = torch.rand(shape, generator=generator) > 0.3
        kept[..., 0] = True
        return kept.to(example.dtype)
    values = torch.randn(shape, generator=generator).to(example.dtype)
    if example.is_contiguous():
        return values
    return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype).copy_(values)


def leaves(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def errors(found: Any, exact: Any) -> list[float]:
    return [float((f.double() - e.double()).abs().max()) for f, e in zip(leaves(found), leaves(exact), strict=True)]


def test_torch_lists_the_variants_that_are_meant():
    assert len(VARIANTS) == 82


@pytest.mark.parametrize("name", VARIANTS)
def test_the_attention_is_found(name):
    registered = VARIANTS[name]
    model = Spelled(registered["search_fn"], registered["scalar_workaround"]).eval()
    fast = fxbt.optimize(model)
    inputs = [values_like(example, seed) for seed, example in enumerate(registered["example_inputs"])]
    with torch.no_grad():
        fast(*inputs)
        found, expected = fast(*inputs), model(*inputs)
    assert not fast.report.fallbacks
    assert fast.report.hits["attention"] == 1
    for new, old in zip(leaves(found), leaves(expected), strict=True):
        assert (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride())
    if leaves(expected)[0].dtype is torch.float32:
        torch.testing.assert_close(found, expected)
        return
    exact = model(*(x.double() if x.is_floating_point() else x for x in inputs))
    # Some variants round to float16 themselves, in float64 too: the last rounding may go either way, by one step.
    step = torch.finfo(torch.float16).eps * float(leaves(exact)[0].abs().max())
    for new, old in zip(errors(found, exact), errors(expected, exact), strict=True):
        assert new <= old + step
