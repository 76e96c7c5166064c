"""`keep_original=False`: weights in a file are the same weights, whoever reads or writes them, and memory is freed."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from models import ENCODER, VOCAB, huggingface
from torch import nn

import fxbt
import fxbt.lower.cpu.linears
import fxbt.lower.spill
from fxbt.lower.spill import SMALLEST, spilled

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="weights are mapped onto a file on Linux only"),
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"),
]
SIZE = 160  # a weight of 100 KiB: more than SMALLEST


@pytest.fixture(autouse=True)
def every_linear_is_packed(torchs_kernels, monkeypatch):
    monkeypatch.setattr(fxbt.lower.cpu.linears, "PACKED_FROM_ELEMENTS", 0)
    monkeypatch.setattr(fxbt.lower.cpu.linears, "is_avx512_supported", lambda: True)


class Block(nn.Module):
    """Two linears whose weights are packed, one that is merged of two, and a table that is read as it is."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(200, SIZE)
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.left, self.right = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids):
        x = self.table(ids)
        x = self.second(F.gelu(self.first(x))) + x
        return self.left(x) * self.right(x).tanh()


LINEARS = {f"{name}.weight" for name in ("first", "second", "left", "right")}
IDS = torch.tensor([[3, 7, 11], [13, 150, 199]])


@pytest.fixture
def model():
    return Block().eval()


@pytest.fixture
def values(model):
    """The weights' bits before anything was done."""
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def fast(model, values):
    with torch.no_grad():
        fast = fxbt.optimize(model, (IDS,), keep_original=False)
        fast(IDS)
    assert in_file(model) == LINEARS
    return fast


def in_file(model):
    """The parameters whose memory is mapped onto a file."""
    return {name for name, p in model.named_parameters() if not p.untyped_storage().resizable()}


def same(found, expected):
    found = dict(found)
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def outputs(model, ids=IDS):
    with torch.no_grad():
        return model(ids)


def agree(fast, model, ids=IDS):
    torch.testing.assert_close(outputs(fast, ids), model.forward(ids).detach(), rtol=1e-5, atol=1e-5)


def test_the_values_are_the_same_bits(fast, model, values):
    agree(fast, model, IDS[:1, :2])
    assert same(fast.state_dict(), values) and same(model.state_dict(), values)
    assert same(fast.named_parameters(), values)
    assert fxbt.restore(fast) is model and same(model.state_dict(), values)


def test_the_report_has_the_bytes(fast):
    graph = fast.report.latest
    assert graph.spilled.nbytes == 4 * SIZE * SIZE * 4
    assert "moved to a file" in str(fast.report) and "0.4 MiB" in str(fast.report)


def test_without_the_option_nothing_moves(model, values):
    fast = fxbt.optimize(model)
    outputs(fast)
    assert not in_file(model) and fast.report.latest.spilled is None
    assert "moved to a file" not in str(fast.report)


def test_parameters_stay_the_objects_they_were(model, values):
    before = dict(model.named_parameters())
    outputs(fxbt.optimize(model, (IDS,), keep_original=False))
    assert in_file(model) == LINEARS
    assert all(p is before[name] and isinstance(p, nn.Parameter) for name, p in model.named_parameters())


def test_special_bits_survive(model):
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, -3e38])
    with torch.no_grad():
        model.first.weight[1, 3:8] = special
    bits = model.first.weight.detach().clone().view(torch.int32)
    outputs(fxbt.optimize(model, (IDS,), keep_original=False))
    assert "first.weight" in in_file(model)
    assert torch.equal(model.first.weight.detach().view(torch.int32), bits)


# Who reads


def test_saving_and_loading(fast, values, tmp_path):
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file), values)
    other = Block()
    other.load_state_dict(fast.state_dict())
    assert same(other.state_dict(), values) and not in_file(other)


def test_copies_and_pickles(fast, model, values):
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.deepcopy(model)):
        assert same(other.state_dict(), values) and not in_file(other)
        agree(other, model)
    again = copy.deepcopy(fast)
    outputs(again), outputs(again)
    assert in_file(again) == LINEARS
    with torch.no_grad():
        again.first.weight.zero_()
    assert same(fast.state_dict(), values)


def test_raw_memory_and_numpy(fast, model, values):
    weight = model.first.weight
    assert (weight.detach().numpy() == values["first.weight"].numpy()).all()
    assert torch.equal(torch.from_dlpack(weight.detach()), values["first.weight"])
    assert torch.equal(weight.detach().clone().view(torch.uint8), values["first.weight"].view(torch.uint8))


def test_the_original_forward_and_another_signature(fast, model):
    kept = Block().eval()
    kept.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(IDS), kept(IDS), rtol=0, atol=0)
    agree(fast, kept, IDS[0])
    assert len(fast.report.graphs) == 2
    agree(fast, kept, IDS[0])


def test_gradients_and_training(fast, model, values):
    kept = Block().train()
    kept.load_state_dict(values)
    fast.train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (fast, kept)]
    for _ in range(3):
        for trained, optimizer in zip((fast, kept), optimizers, strict=True):
            optimizer.zero_grad()
            trained(IDS).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dict(fast.named_parameters()), dict(kept.named_parameters()), rtol=1e-3, atol=1e-4)
    agree(fast.eval(), kept.eval())


# Who writes


def scale(model):
    with torch.no_grad():
        model.first.weight.mul_(2)


def load(model):
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def swap_data(model):
    model.second.weight.data = torch.randn(SIZE, SIZE)


def write_data(model):
    model.left.weight.data.normal_()


def new_parameter(model):
    model.right.weight = nn.Parameter(torch.randn(SIZE, SIZE))


def cast_there_and_back(model):
    model.double().float()


@pytest.mark.parametrize("change", [scale, load, swap_data, write_data, new_parameter, cast_there_and_back])
@pytest.mark.filterwarnings("ignore::fxbt.FxbtWarning")
def test_changes_are_followed(change, fast, model):
    change(fast)
    kept = Block().eval()
    kept.load_state_dict(model.state_dict())
    for _ in range(3):
        agree(fast, kept)


def test_writes_do_not_reach_a_forked_process_or_come_back_from_it(fast, model, values):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no test framework in here: only the exit code and the pipe
        model.first.weight.data.fill_(1.0)
        os.write(writer, b"written")
        os._exit(0 if bool((model.first.weight == 1.0).all()) else 1)
    assert os.read(reader, 7) == b"written"
    assert os.waitpid(child, 0)[1] == 0
    assert same(model.state_dict(), values)


def test_a_changed_weight_stays_in_memory_and_graphs_go_on(fast, model):
    scale(fast)
    agree(fast, model)
    agree(fast, model)
    assert list(fast.report.fallbacks) == []


# What stays


def test_a_weight_that_something_else_looks_at_stays(model):
    view = model.first.weight.data[3]
    tied = nn.Parameter(model.second.weight.data)
    fast = fxbt.optimize(model, (IDS,), keep_original=False)
    outputs(fast)
    assert in_file(model) == {"left.weight", "right.weight"}
    assert fast.report.latest.spilled.kept["another tensor shares its memory"] == 2 * SIZE * SIZE * 4
    view.fill_(7.0)
    tied.data[5] = 7.0
    assert (model.first.weight[3] == 7).all() and (model.second.weight[5] == 7).all()


def test_small_weights_and_those_that_calls_read_stay():
    assert SMALLEST > 8 * 8 * 4
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    fast = fxbt.optimize(model, (torch.randn(3, 8),), keep_original=False)
    outputs(fast, torch.randn(3, 8))
    assert not in_file(model) and fast.report.latest.spilled.kept["small"] == 8 * 8 * 4


def test_with_gradients_nothing_moves(model):
    fast = fxbt.optimize(model, keep_original=False)
    fast(IDS), fast(IDS)
    assert not in_file(model) and fast.report.latest.spilled is None


def test_a_disk_that_is_full_keeps_all(model, values, monkeypatch):
    def full(weights):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fxbt.lower.spill, "_mapped", full)
    fast = fxbt.optimize(model, (IDS,), keep_original=False)
    agree(fast, model)
    assert not in_file(model) and same(model.state_dict(), values)
    (reason,) = fast.report.latest.spilled.kept
    assert "No space left on device" in reason and fast.report.latest.spilled.nbytes == 0


def test_a_write_while_the_file_is_written_is_kept(monkeypatch):
    weight = nn.Parameter(torch.zeros(SIZE, SIZE))
    mapped = fxbt.lower.spill._mapped

    def with_a_write(weights):
        pages = mapped(weights)
        weight.detach().fill_(3.0)
        return pages

    monkeypatch.setattr(fxbt.lower.spill, "_mapped", with_a_write)
    with spilled([weight]) as result:
        pass
    assert result.nbytes == 0 and result.kept["the weight changed during the move"] == weight.nbytes
    assert (weight == 3).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_every_dtype_and_shape(dtype):
    tensors = [torch.randint(0, 2, shape).to(dtype) for shape in ((SMALLEST + 1,), (300, 301), (7, 11, 1301))]
    before = [tensor.clone() for tensor in tensors]
    with spilled(tensors) as result:
        pass
    assert result.nbytes == sum(tensor.nbytes for tensor in tensors) and not result.kept
    for tensor, value in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value) and tensor.is_contiguous() and tensor.dtype is dtype
    del tensors[0], result
    assert torch.equal(tensors[0], before[1])


def test_a_folder_in_memory_is_refused(model, monkeypatch):
    monkeypatch.setattr(fxbt.lower.spill, "_file_system", lambda folder: "tmpfs")
    with pytest.raises(ValueError, match="which is in memory itself; set TMPDIR to a folder on a disk"):
        fxbt.optimize(model, keep_original=False)


def test_another_system_is_refused(model, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="needs Linux's memory mapping, but this is darwin"):
        fxbt.optimize(model, keep_original=False)


def test_threads_keep_their_answers(fast, model):
    expected, wrong = outputs(fast), []

    def call():
        for _ in range(50):
            if not torch.equal(outputs(fast), expected):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_save_pretrained(tmp_path):
    settings = {**ENCODER, "hidden_size": SIZE, "intermediate_size": 2 * SIZE}
    model = huggingface("BertModel", **settings)("sdpa").eval()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    call = {"input_ids": torch.randint(3, VOCAB, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    with torch.no_grad():
        fast = fxbt.optimize(model, call, keep_original=False)
        expected = model(**call).last_hidden_state
        torch.testing.assert_close(fast(**call).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert len(in_file(model)) >= 12  # six linears in each of two layers
    fast.save_pretrained(tmp_path)
    assert same(type(model).from_pretrained(tmp_path).state_dict(), values)


MEASURE = """
import json, torch, fxbt, sys
from torch import nn
torch.cpu._is_avx512_supported = lambda: True  # so that the rule packs
def resident():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {kind: int(status[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}
model = nn.Sequential(*[nn.Sequential(nn.Linear(2048, 2048), nn.GELU()) for _ in range(4)]).eval()  # 64 MiB
x = torch.randn(4, 2048)
with torch.no_grad():
    fast = fxbt.optimize(model, (x,), keep_original=sys.argv[1] == "keep")
    for _ in range(3):
        fast(x)
    spilled = fast.report.latest.spilled
    print(json.dumps({**resident(), "moved": spilled.nbytes if spilled else 0}))
"""


def test_memory_is_freed():
    """Memory that is the process's own falls by what was moved; of the file, single pages are looked at."""
    environment = {**os.environ, "FXBT_TUNE": "0"}
    kept, freed = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", MEASURE, mode], capture_output=True, check=True, env=environment
            ).stdout
        )
        for mode in ("keep", "free")
    )
    assert freed["moved"] == 4 * 2048 * 2048 * 4
    assert kept["RssAnon"] - freed["RssAnon"] > 0.9 * freed["moved"]
    assert freed["RssFile"] - kept["RssFile"] < 0.1 * freed["moved"]
