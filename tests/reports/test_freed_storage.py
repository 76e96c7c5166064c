"""FSDP2 frees the storage of what it has not gathered: looking at it ended the process (SIGSEGV)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FREED = """
import torch, fxbt
from torch import nn
layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
model.unsharded = torch.zeros(1 << 20)
model.unsharded.untyped_storage().resize_(0)
fast = fxbt.optimize(model)
with torch.no_grad():
    for rows in (7, 9):
        x = torch.randn(2, rows, 32)
        assert torch.allclose(fast(x), model(x), atol=1e-5)
assert fast.report.hits["attention"] == 1 and not fast.report.fallbacks
"""

SHARDED = """
import copy, os, sys, torch, fxbt
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
expected = copy.deepcopy(model)
mesh = init_device_mesh("cpu", (2,))
if sys.argv[1] == "first":
    model = fxbt.optimize(model)
for part in (*model.layers, model):
    fully_shard(part, mesh=mesh)
if sys.argv[1] == "last":
    model = fxbt.optimize(model)
for _ in range(3):
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(model(x), expected(x))
    expected(x).square().sum().backward()
    model(x).square().sum().backward()
for found, wanted in zip(model.parameters(), expected.parameters()):
    torch.testing.assert_close(found.grad.full_tensor(), wanted.grad, rtol=1e-4, atol=1e-4)
with torch.no_grad():
    torch.testing.assert_close(model(x), expected(x))
dist.destroy_process_group()
os._exit(0)  # torch's own threads end some such processes with 'terminate called', without fxbt too
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_tensor_whose_storage_is_freed_is_left_alone() -> None:
    process = run(FREED)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("order", ["first", "last"])
def test_fully_sharded_in_two_processes(order: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [run(SHARDED, order, RANK=rank, **together) for rank in "01"]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
