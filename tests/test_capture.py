"""Capture: dynamic shapes with exact guards, structure of outputs, what is refused and why, a model left as it was."""

import threading

import pytest
import torch
import transformers
from models import enliven
from packaging import version
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.capture.code_later import code_written_later
from fxbt.capture.model_state import ModelState
from fxbt.capture.trace_errors import where
from fxbt.errors import CaptureError

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Block(nn.Module):
    """Uses its parameters, a buffer, a plain tensor attribute and a literal; returns nested outputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("shift", torch.randn(4), persistent=False)
        self.plain = torch.randn(4)

    def forward(self, x, mask=None, scale=2.0):
        y = self.norm(self.linear(x)) * scale + self.shift + self.plain + torch.tensor(0.5)
        y = y if mask is None else y * mask[..., None]
        return {"y": y, "pair": (x, [y.sum(-1), None]), "size": x.shape[0], "name": "block"}


def made(forward, **attributes):
    """A module with that forward."""
    model = type("Made", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def runs_like(model, captured, **kwargs):
    call = make_call(model, **kwargs)
    captured.guards(*call.tensors)
    found = pytree.tree_unflatten(captured.module(*call.tensors), captured.out_spec)
    same(found, model(**kwargs))


def same(found, expected):
    (found, spec), (expected, expected_spec) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert spec == expected_spec
    for new, old in zip(found, expected, strict=True):
        assert torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old


def targets(captured):
    return [node.target for node in captured.module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("example", [(2, 5), (1, 5), (1, 1), (3, 1)], ids=str)
def test_one_graph_for_all_shapes(example):
    model = Block()
    captured = capture(model, make_call(model, x=torch.randn(*example, 4), mask=torch.ones(*example)))
    for shape in [(2, 5), (1, 7), (6, 2), example]:
        try:
            runs_like(model, captured, x=torch.randn(*shape, 4), mask=torch.rand(*shape))
        except AssertionError as guard:
            assert "shape" in str(guard)
            assert 1 in example and shape != example  # only a size of one in the example may narrow the graph


def test_placeholders_are_the_tensors_and_weights_the_originals():
    model = Block()
    call = make_call(model, x=torch.randn(2, 3, 4), mask=torch.ones(2, 3))
    module = capture(model, call).module
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    assert [node.target for node in placeholders] == ["x", "mask"]
    assert module.get_parameter("linear.weight") is model.linear.weight
    assert module.get_buffer("shift") is model.shift
    assert any(buffer is model.plain for buffer in module.buffers())
    assert all("val" in node.meta for node in placeholders)
    stacks = [n.meta["nn_module_stack"] for n in module.graph.nodes if n.target is aten.linear.default]
    assert list(stacks[0].values())[-1][0] == "linear"


def test_unused_tensors_keep_their_places():
    model = made(lambda self, x, unused, y: x + y)
    captured = capture(model, make_call(model, torch.ones(2), torch.zeros(3), torch.ones(2)))
    assert captured.module(torch.ones(2), torch.zeros(3), torch.ones(2))[0].tolist() == [2.0, 2.0]


def test_tensors_inside_containers():
    model = made(lambda self, batch: batch["a"] + batch["more"][0])
    batch = {"a": torch.randn(2, 3), "more": (torch.randn(2, 3), 7)}
    runs_like(model, capture(model, make_call(model, batch=batch)), batch=batch)


def test_no_tensors_at_all():
    model = made(lambda self, n: torch.arange(n) * self.factor, factor=3)
    assert capture(model, make_call(model, n=3)).module()[0].tolist() == [0, 3, 6]


def test_a_branch_on_a_size_is_a_guard():
    model = made(lambda self, x: x * 2 if x.shape[1] > 4 else x * 3)
    captured = capture(model, make_call(model, x=torch.ones(2, 6)))
    runs_like(model, captured, x=torch.ones(3, 9))
    with pytest.raises(AssertionError, match=r"x\.shape\[1\] > 4"):
        captured.guards(torch.ones(2, 3))


def test_equal_sizes_are_guarded():
    model = made(lambda self, x, y: x + y)
    captured = capture(model, make_call(model, x=torch.ones(2, 6), y=torch.ones(2, 6)))
    captured.guards(torch.ones(3, 7), torch.ones(3, 7))
    for other in [(1, 7), (3, 1)]:  # broadcasts in the original, which the graph's shapes do not know of
        with pytest.raises(AssertionError, match="shape"):
            captured.guards(torch.ones(*other), torch.ones(3, 7))


def test_a_fixed_size_is_a_guard():
    model = Block()
    captured = capture(model, make_call(model, x=torch.randn(2, 3, 4)))
    with pytest.raises(AssertionError, match=r"x\.shape\[2\] == 4"):
        captured.guards(torch.ones(2, 3, 5))


@pytest.mark.parametrize("squeeze", [lambda x: x.squeeze(1), lambda x: x.squeeze(), lambda x: x.squeeze((0, 1))])
def test_squeeze_of_a_dynamic_axis_is_guarded(squeeze):
    """Traced as keeping the axis, so that a size of one is another graph: the rank decides what follows."""
    model = made(lambda self, x: squeeze(x) * 2 if squeeze(x).dim() == 2 else squeeze(x) * 3)
    captured = capture(model, make_call(model, x=torch.ones(2, 6)))
    with pytest.raises(AssertionError, match=r"x\.shape\[1\]"):
        captured.guards(torch.ones(2, 1))
    narrow = torch.ones(2, 1)
    runs_like(model, capture(model, make_call(model, x=narrow)), x=narrow)


def test_in_place_writes_inside_become_functional():
    def forward(self, x):
        y = x * 2
        y[:, 0] = 0
        y.add_(1)
        return y

    model = made(forward)
    captured = capture(model, make_call(model, x=torch.randn(3, 4)))
    assert not any(t._schema.is_mutable for t in targets(captured) if hasattr(t, "_schema"))
    runs_like(model, captured, x=torch.randn(5, 2))


def test_no_asserts_remain():
    model = made(lambda self, x: x.to(torch.float64).softmax(-1).to(x.dtype))
    names = [str(target) for target in targets(capture(model, make_call(model, x=torch.randn(2, 3))))]
    assert names and not any("assert" in name for name in names)


def count(self, x):
    self.calls += 1
    return x * 2


def cache(self, x):
    self.cached = x * 2 if self.cached is None else self.cached + x.sum()
    return self.cached


def append(self, x, seen):
    seen.append(x)
    return x * 2


def data_dependent(self, x):
    for _ in range(int(x.sum())):  # this line
        x = x * 2
    return x


def raising(self, x):
    self.leaked = x * 2
    return x.numpy() if self.leaked.sum() else x


REFUSED = {
    "counter": (made(count, calls=0), (), r"changes attributes of the model \(model: calls\)"),
    "kept tensor": (made(cache, cached=None), (), "reads the value that an earlier call left .* cached"),
    "input written": (made(lambda self, x: x.add_(1)), (), "writes in place to its argument x"),
    "generator returned": (made(lambda self, x: (x, {"kv": iter(())})), (), r"output\[1\]\['kv'\] holds a tuple_iter"),
    "object returned": (made(lambda self, x: object()), (), "output holds a object, which a graph cannot return"),
    "data dependent": (made(data_dependent), (), "on the values.*\\n.*range\\(int\\(x.sum\\(\\)\\)\\):  # this"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_and_leave_the_model(case):
    model, more, words = REFUSED[case]
    before = dict(vars(model))
    with pytest.raises(CaptureError, match=words):
        capture(model, make_call(model, torch.ones(2, 3), *more))
    assert vars(model) == before


def test_written_buffers_are_inputs_and_outputs_and_stay_as_they_are():
    model, reference = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(4, 3)
    captured = capture(model, make_call(model, x))
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)
    names = ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert captured.effects.names == names and not any(
        node.op == "get_attr" and node.target in names for node in captured.module.graph.nodes
    )
    values = captured.module(x, *captured.effects.inputs())
    torch.testing.assert_close(captured.effects.outputs(values), (reference(x),))
    captured.effects.put(values)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_no_fake_tensor_is_left_after_a_failure():
    model = made(raising, leaked=None, layers=[], inner=nn.Linear(2, 2))
    state = ModelState(model)
    weight = model.inner.weight
    with pytest.raises(CaptureError) as caught:
        capture(model, make_call(model, torch.ones(2, 3)), rehearse=False)
    assert caught.value.where
    assert model.leaked is None and model.inner.weight is weight and state.holds()


def test_random_state_is_not_disturbed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    captured = capture(model, make_call(model, torch.ones(2, 3)))
    assert torch.equal(torch.rand(3), expected)
    assert any("dropout" in str(target) for target in targets(captured))


def test_grad_mode_is_the_callers():
    model = Block()
    x = torch.randn(2, 3, 4, requires_grad=True)
    with torch.enable_grad():
        captured = capture(model, make_call(model, x=x))
        captured.module(x)[0].sum().backward()
    assert x.grad is not None and model.linear.weight.grad is not None
    with torch.inference_mode():
        captured = capture(model, make_call(model, x=torch.randn(2, 3, 4)))
        runs_like(model, captured, x=torch.randn(5, 3, 4))


def test_autocast_is_the_callers():
    model = Block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(model, make_call(model, x=torch.randn(2, 3, 4)))
        runs_like(model, captured, x=torch.randn(5, 3, 4))


def test_lazily_made_tensors_are_met_by_the_rehearsal():
    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(3.0)
        return x + self.table

    model = made(forward, table=None)
    runs_like(model, capture(model, make_call(model, x=torch.zeros(2, 3))), x=torch.ones(4, 3))


def test_where_is_the_innermost_line_of_user_code():
    try:
        torch.ones(2) @ torch.ones(3)
    except RuntimeError as error:
        assert where(error).endswith("torch.ones(2) @ torch.ones(3)")
    assert where(RuntimeError("never raised")) == ""


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bert(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        attn_implementation=implementation,
    )
    model = transformers.BertModel(config).eval()

    def inputs(batch, length):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": mask}

    captured = capture(model, make_call(model, **inputs(1, 6), output_hidden_states=True))
    for shape in [(1, 6), (2, 9), (5, 3)]:
        runs_like(model, captured, **inputs(*shape), output_hidden_states=True)


def test_assertions_about_values_stay_in_the_graph() -> None:
    class Cut(nn.Module):
        """Keeps as many columns as the largest value says."""

        def forward(self, x, lengths):
            longest = lengths.max().item()
            torch._check(longest >= 2)
            torch._check(longest <= x.shape[1])
            return x * 2, torch.arange(longest)

    model = Cut()
    x, lengths = torch.randn(2, 7), torch.tensor([3, 5])
    captured = capture(model, make_call(model, x, lengths))
    assert captured.module(x, torch.tensor([2, 6]))[1].shape == (6,)
    with pytest.raises(RuntimeError):
        captured.module(x, torch.tensor([2, 9]))


def in_images(self, x, grid):
    """Each image's own patches, less their mean, the tall images' doubled: told apart by their sizes, in Python."""
    lengths = grid.prod(-1)
    lengths[0] += 0  # a write to what follows from the sizes
    parts = [part - part.mean(0) for part in x.split(lengths.tolist())]
    parts = [part * 2 if height > 3 else part for part, (height, _) in zip(parts, grid.tolist(), strict=True)]
    return torch.cat(parts) * torch.repeat_interleave(grid[:, 0], lengths)[:, None]


def captured_on_two_images(forward):
    model, grid = made(forward), torch.tensor([[2, 3], [4, 2]])
    captured = capture(model, make_call(model, x=torch.randn(14, 4), grid=grid))
    runs_like(model, captured, x=torch.randn(14, 4), grid=grid.clone())
    return captured


def test_sizes_that_python_reads_are_constants_with_a_guard():
    captured = captured_on_two_images(in_images)
    with pytest.raises(AssertionError, match=r"grid == \[\[2, 3\], \[4, 2\]\]"):
        captured.guards(torch.randn(14, 4), torch.tensor([[2, 4], [3, 2]]))
    with pytest.raises(AssertionError, match="grid.shape"):
        captured.guards(torch.randn(14, 4), torch.tensor([[2, 3], [4, 2], [1, 1]]))


def test_sizes_that_python_does_not_read_stay_inputs():
    model = made(lambda self, x, grid: x * grid.prod(-1)[:, None])
    captured = capture(model, make_call(model, x=torch.randn(2, 4), grid=torch.tensor([[2, 3], [4, 2]])))
    runs_like(model, captured, x=torch.randn(3, 4), grid=torch.tensor([[1, 3], [4, 5], [6, 6]]))


@pytest.mark.parametrize("lengths", [torch.arange(300), torch.tensor([1.0, 2.0]), torch.ones(2, 4).long()])
def test_values_that_are_no_sizes_are_not_made_constants(lengths):
    model = made(lambda self, x, lengths: x * sum(1 for value in lengths.flatten().tolist() if value > 1))
    with pytest.raises(CaptureError, match="data-dependent"):
        capture(model, make_call(model, x=torch.randn(2, 4), lengths=lengths))


def test_vmap_becomes_plain_operations():
    def forward(self, x):
        def fits(i, j):
            return (j <= i) & j.new_ones((), dtype=torch.bool)

        steps = torch.arange(x.shape[0])
        return torch.vmap(torch.vmap(fits, in_dims=(None, 0)), in_dims=(0, None))(steps, steps).float() @ x

    model = made(forward)
    captured = capture(model, make_call(model, x=torch.randn(4, 3)))
    runs_like(model, captured, x=torch.randn(6, 3))


@pytest.mark.parametrize("library", ["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid"])
def test_gated_delta_rule_is_not_unrolled(library):
    modeling = pytest.importorskip(f"transformers.models.{library}.modeling_{library}")
    if version.parse(transformers.__version__).major < 5:
        pytest.skip("transformers 4 has no way of solving the triangular system at once")
    model = made(lambda self, q, k, v, g, beta: modeling.torch_chunk_gated_delta_rule(q, k, v, g, beta)[0])

    def inputs(batch, length):
        vectors = {name: torch.randn(batch, length, 2, 4) for name in "qkv"}
        return {**vectors, "g": -torch.rand(batch, length, 2), "beta": torch.rand(batch, length, 2)}

    captured = capture(model, make_call(model, **inputs(2, 5)))
    assert sum(node.target is aten.linalg_solve_triangular.default for node in captured.module.graph.nodes) == 2
    assert len(captured.module.graph.nodes) < 250  # thousands, if unrolled
    runs_like(model, captured, **inputs(3, 9))


@pytest.mark.parametrize("library", ["kimi_linear", "bailing_hybrid", "glm5_next"])
@pytest.mark.parametrize("with_state", [True, False])
def test_kimi_delta_attention_is_not_unrolled(library, with_state):
    modeling = pytest.importorskip(f"transformers.models.{library}.modeling_{library}")

    def forward(self, q, k, v, g, beta, state=None):
        options = {"initial_state": state, "output_final_state": with_state, "use_qk_l2norm_in_kernel": with_state}
        return modeling.chunk_kimi_delta_attention(q, k, v, g, beta, **options)

    def inputs(batch, length):
        vectors = {name: torch.randn(batch, length, 2, 4) for name in "qkv"}
        state = {"state": torch.randn(batch, 2, 4, 4)} if with_state else {}
        return {**vectors, "g": -torch.rand(batch, length, 2, 4), "beta": torch.rand(batch, length, 2), **state}

    model = made(forward)
    captured = capture(model, make_call(model, **inputs(2, 70)))
    assert len(captured.module.graph.nodes) < 300  # thousands, if unrolled
    for batch, length in ((3, 65), (2, 128)):
        given = inputs(batch, length)
        call = make_call(model, **given)
        captured.guards(*call.tensors)
        found = pytree.tree_unflatten(captured.module(*call.tensors), captured.out_spec)
        for new, old in zip(found, model(**given), strict=True):
            torch.testing.assert_close(new, old, atol=2e-5, rtol=1e-4)


def test_experts_without_tokens_are_no_branch():
    modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    if version.parse(transformers.__version__).major < 5:
        pytest.skip("transformers 4 writes these experts another way")
    config = transformers.SwitchTransformersConfig(d_model=4, d_ff=8, num_experts=3)
    model = made(lambda self, x, selected, weights: self.experts(x, selected, weights))
    model.experts = modeling.SwitchTransformersExperts(config)
    model.eval()

    def inputs(tokens, used):
        selected = nn.functional.one_hot(torch.randint(used, (tokens, 1)), 3)
        return torch.randn(tokens, 4), selected, torch.rand(tokens, 1)

    captured = capture(model, make_call(model, *inputs(7, 2)))
    for tokens, used in ((9, 3), (4, 1), (5, 2)):
        given = inputs(tokens, used)
        captured.guards(*given)
        torch.testing.assert_close(captured.module(*given)[0], model(*given))


def test_stacked_experts_without_tokens_are_no_branch():
    name = "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter"
    modeling = pytest.importorskip(name, reason="this transformers has no privacy filter")
    config = transformers.OpenAIPrivacyFilterConfig(hidden_size=4, intermediate_size=8, num_local_experts=5)
    model = made(lambda self, x, selected, weights: self.experts(x, selected, weights))
    model.experts = enliven(modeling.OpenAIPrivacyFilterExperts(config))
    model.eval()

    def inputs(tokens, used):
        selected = torch.rand(tokens, used).argsort(-1)[:, :2]
        return torch.randn(tokens, 4), selected, torch.rand(tokens, selected.shape[1])

    captured = capture(model, make_call(model, *inputs(7, 3)))
    for tokens, used in ((9, 5), (4, 2), (1, 4)):
        given = inputs(tokens, used)
        captured.guards(*given)
        torch.testing.assert_close(captured.module(*given)[0], model(*given))


@pytest.mark.parametrize("given", [True, False], ids=["boxes of patches given", "boxes of patches made"])
def test_text_on_patches_of_an_image(given):
    modeling = pytest.importorskip("transformers.models.udop.modeling_udop")

    def forward(self, images, tokens, boxes, patches, mask):
        return modeling.combine_image_text_embeddings(
            images, tokens * 1, boxes, patches, mask, num_patches=4, image_size=8, patch_size=2
        )

    def inputs(batch, length):
        corners = torch.rand(batch, length, 2) / 2
        boxes = torch.cat([corners, corners + torch.rand_like(corners) / 2], -1)
        boxes[0, 0], boxes[-1, 1] = 0.0, 1.0
        return {
            "images": torch.randn(batch, 16, 3),
            "tokens": torch.randn(batch, length, 3),
            "boxes": boxes,
            "patches": torch.rand(batch, 16, 4) if given else None,
            "mask": torch.ones(batch, length).long(),
        }

    model = made(forward)
    captured = capture(model, make_call(model, **inputs(2, 5)))
    for shape in ((3, 9), (2, 40), (2, 2)):
        runs_like(model, captured, **inputs(*shape))


def test_conversions_to_what_is_there_already_change_nothing():
    def forward(self, x):
        self.table = self.table.to(device=x.device, dtype=x.dtype)
        self.linear = self.linear.to(x.dtype)
        return self.linear(x) + self.table

    model = made(forward, linear=nn.Linear(4, 4))
    model.register_buffer("table", torch.randn(4))
    captured = capture(model, make_call(model, x=torch.randn(2, 4)))
    assert captured.module.get_buffer("table") is model.table
    runs_like(model, captured, x=torch.randn(5, 4))


def test_another_thread_converts_its_model_meanwhile():
    other = nn.Linear(2, 2)

    def forward(self, x):
        thread = threading.Thread(target=other.double)
        thread.start()
        thread.join()
        return x * 2

    model = made(forward)
    capture(model, make_call(model, x=torch.randn(2, 4)), rehearse=False)
    assert other.weight.dtype is torch.float64 and other(torch.ones(1, 2).double()).shape == (1, 2)


def assigned(self, x):
    self.table = self.table.to(x.dtype, copy=True) + 1
    return x + self.table


def converted(self, x):
    return self.linear.to(torch.float64)(x.double())


@pytest.mark.parametrize(
    "forward, words", [(assigned, "replaces table by another tensor"), (converted, "converts weight of a")]
)
def test_conversions_that_change_something_are_refused(forward, words):
    model = made(forward, linear=nn.Linear(4, 4))
    model.register_buffer("table", torch.zeros(4))
    with pytest.raises(CaptureError, match=words):
        capture(model, make_call(model, x=torch.randn(2, 4)), rehearse=False)
    assert model.linear.weight.dtype is torch.float32


class Framed(nn.Module):
    """A convolution padded to whole frames, by the count that tensors of the model and the length give."""

    def __init__(self, kernel=7, stride=4):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, kernel, stride)
        self.register_buffer("kernel", torch.tensor(kernel), persistent=False)
        self.register_buffer("stride", torch.tensor(stride), persistent=False)

    def forward(self, x):
        length, padding = x.shape[-1], self.kernel - self.stride
        frames = torch.ceil((length - self.kernel + padding) / self.stride + 1).to(torch.int64) - 1
        extra = frames * self.stride + self.kernel - padding - length
        x = x * 2 if max(padding, extra) >= length else x
        return self.conv(nn.functional.pad(x, (padding, extra)))[..., :frames]


def test_numbers_that_follow_from_sizes_are_sizes():
    model = Framed()
    captured = capture(model, make_call(model, x=torch.randn(2, 2, 40)))
    assert aten.ceil.default not in targets(captured)
    for length in (5, 39, 40, 41, 42, 43, 1000):
        runs_like(model, captured, x=torch.randn(3, 2, length))
    with pytest.raises(AssertionError, match=r"< x\.shape\[2\]"):
        captured.guards(torch.randn(2, 2, 3))
    with pytest.raises(AssertionError, match="< 4194304"):  # where float32 might round past an integer
        captured.guards(torch.empty(2, 2, 5_000_000, device="meta"))


def test_tensors_whose_values_are_part_of_a_graph_are_guarded():
    model = Framed()
    x = torch.randn(2, 2, 40)
    captured = capture(model, make_call(model, x=x))
    model.stride.fill_(5)
    with pytest.raises(AssertionError, match="stride == 4"):
        captured.guards(x)
    model.stride.data = torch.tensor(4)
    captured.guards(x)


def test_a_length_divided_by_torch_is_a_size():
    model = made(lambda self, x: x.view(x.shape[0], torch.div(x.shape[1], 2, rounding_mode="trunc"), 2).sum(1))
    captured = capture(model, make_call(model, x=torch.randn(2, 8)))
    runs_like(model, captured, x=torch.randn(3, 12))


def written(self, x):
    count = torch.tensor(x.shape[1])
    count.view(1)[0] = 3
    return x[:, :count]


def of_values(self, x):
    return x[:, : (x > 0).sum() + self.seen]


@pytest.mark.parametrize("forward", [written, of_values])
def test_numbers_that_are_written_or_follow_from_values_are_no_sizes(forward):
    model = made(forward)
    model.register_buffer("seen", torch.tensor(1))
    captured = capture(model, make_call(model, x=torch.randn(2, 8)))
    assert aten.item.default in targets(captured)
    runs_like(model, captured, x=torch.randn(3, 9))


def test_a_tensor_that_is_counted_up_is_no_constant():
    def forward(self, x):
        self.seen.add_(1)
        return x[:, : self.seen]

    model = made(forward)
    model.register_buffer("seen", torch.tensor(1))
    x = torch.randn(2, 8)
    captured = capture(model, make_call(model, x))
    assert not captured.read and aten.item.default in targets(captured)
    for seen in (2, 3, 4):
        values = captured.module(x, *captured.effects.inputs())
        captured.effects.put(values)
        assert torch.equal(values[0], x[:, :seen]) and model.seen == seen


def test_a_value_that_decides_and_is_written_is_refused():
    def forward(self, x):
        y = x[:, : self.seen]
        self.seen.add_(1)
        return y

    model = made(forward)
    model.register_buffer("seen", torch.tensor(1))
    with pytest.raises(CaptureError, match="branches on the value of seen, which it also writes"):
        capture(model, make_call(model, torch.randn(2, 8)))


def branching(self, x, mask):
    if not torch.isfinite(x).all():
        raise ValueError("x is not finite")
    if mask.any():
        x = x.masked_fill(mask[..., None], self.filling.item())
    if self.ready.item():
        x = x + 1
    return x * 2 if (mask.sum() > 100) else x


def branching_model():
    model = made(branching)
    model.register_buffer("filling", torch.tensor(5.0))
    model.register_buffer("ready", torch.tensor(True))
    return model


def test_branches_go_the_way_of_the_example_and_the_graph_asserts_it():
    model = branching_model()
    x, mask = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = True
    captured = capture(model, make_call(model, x=x, mask=mask))
    runs_like(model, captured, x=torch.randn(3, 7, 4), mask=torch.rand(3, 7) > 0.5)
    line = branching.__code__.co_firstlineno
    many = torch.randn(9, 20, 4), torch.ones(9, 20) > 0
    for other, asks in (((x, mask & False), line + 3), ((x / 0, mask), line + 1), (many, line + 7)):
        with pytest.raises(RuntimeError, match=f"another way than .* at .*test_capture.py:{asks}, which found"):
            captured.module(*other)
    model.ready.fill_(False)
    with pytest.raises(RuntimeError, match=f"test_capture.py:{line + 5}, which found True"):
        captured.module(x, mask)


def test_branches_are_followed_where_only_a_batch_of_one_will_do():
    model = made(lambda self, x: x * 2 if x.any() else (x if x.shape[0] == 1 else -x))
    ones = made(lambda self, x: (x * 2 if x.any() else x) + (1 if x.shape[0] == 1 else 2))
    for one in (model, ones):
        runs_like(one, capture(one, make_call(one, x=torch.ones(1, 5))), x=torch.ones(1, 7))


def until_all_are_done(self, x, steps=30):
    for _ in range(steps):
        x = x + 1
        if (x > 20).all():
            break
    return x


def test_failed_attempts_print_nothing(capfd, caplog):
    with pytest.raises(CaptureError):
        capture(made(data_dependent), make_call(made(data_dependent), torch.ones(2, 3)))
    assert capfd.readouterr() == ("", "") and "user code" not in caplog.text


def test_a_loop_that_asks_at_every_step_is_refused():
    model = made(until_all_are_done)
    with pytest.raises(CaptureError, match=r"at every step.*\n.*test_capture.py:\d+: if \(x > 20\).all\(\):"):
        capture(model, make_call(model, x=torch.zeros(2, 3)))


def in_windows(self, x, grid):
    """Each image's patches in the order of its windows of 2 x 2, which may hang over its edges."""
    parts = []
    for image, sides in zip(x.split(grid.prod(-1).tolist()), grid.tolist(), strict=True):
        height, width = map(int, sides)
        order = torch.arange(height * width).reshape(height, width)
        order = nn.functional.pad(order, (0, width % 2, 0, height % 2), value=-1)
        order = order.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1)
        parts.append(image[order[order >= 0]])
    return torch.cat(parts)


def test_what_follows_from_constant_sizes_is_known():
    captured = captured_on_two_images(in_windows)
    with pytest.raises(AssertionError, match=r"grid == "):
        captured.guards(torch.randn(14, 4), torch.tensor([[3, 2], [2, 4]]))


def scanned(self, x):
    state, states = x[:, 0] * 0.0, []
    for i in range(x.shape[1]):
        state = state * 0.5 + x[:, i]
        states.append(state)
    return torch.stack(states, 1)


def scanned_by_item(self, x):
    return [row.sum() for row in (x[i] for i in range(x.shape[0]))], x


def scanned_in_chunks(self, x):
    return sum(x[:, 4 * i : 4 * i + 4].sum(1) for i in range(x.shape[1] // 4))


def test_a_loop_over_the_sequence_is_refused_before_it_is_unrolled():
    model = made(scanned)
    with pytest.raises(CaptureError, match=r"one length only\n.*test_capture.py:\d+: for i in range\(x.shape\[1\]\):"):
        capture(model, make_call(model, x=torch.randn(2, 9)))


@pytest.mark.parametrize("forward", [scanned_by_item, scanned_in_chunks])
def test_loops_over_items_and_chunks_are_unrolled(forward):
    model = made(forward)
    captured = capture(model, make_call(model, x=torch.randn(2, 9)))
    runs_like(model, captured, x=torch.randn(2, 10))


def test_a_loop_over_features_is_unrolled():
    model = made(lambda self, x: sum(x[:, i] * i for i in range(x.shape[1])))
    captured = capture(model, make_call(model, x=torch.randn(2, 3, 4)))
    runs_like(model, captured, x=torch.randn(5, 3, 4))


@pytest.mark.parametrize("library", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_a_selective_scan_is_one_operation(library):
    modeling = pytest.importorskip(f"transformers.models.{library}.modeling_{library}")
    if not hasattr(modeling, "mamba_selective_scan"):
        pytest.skip("this version of transformers has the loop inside of a larger function")

    def forward(self, x, dt, a, b, c, d, z):
        more = {"D": d, "z": z, "delta_bias": d, "delta_softplus": True, "return_last_state": True}
        return modeling.mamba_selective_scan(x, dt, -a.exp(), b, c, **more)

    def inputs(batch, length):
        channels = {name: torch.randn(batch, 3, length, requires_grad=True) for name in ("x", "dt", "z")}
        states = {name: torch.randn(batch, 4, length, requires_grad=True) for name in "bc"}
        return {**channels, **states, "a": torch.randn(3, 4, requires_grad=True), "d": torch.randn(3)}

    model = made(forward)
    with torch.enable_grad():
        captured = capture(model, make_call(model, **inputs(2, 5)))
        assert torch.ops.fxbt.selective_scan.default in targets(captured)
        given = inputs(4, 9)
        call = make_call(model, **given)
        captured.guards(*call.tensors)
        found, expected = captured.module(*call.tensors), model(**given)
        variables = [tensor for tensor in given.values() if tensor.requires_grad]
        gradients = [torch.autograd.grad([o.sin().sum() for o in outputs], variables) for outputs in (found, expected)]
    for new, old in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}], ids=str)
def test_recurrent_networks_are_one_operation_for_all_lengths(kind, options):
    model = nn.Sequential(kind(4, 3, **options))
    captured = capture(model, make_call(model, torch.randn(6, 5, 4)))
    assert len(captured.module.graph.nodes) < 40 * (1 + 3 * len(options))
    for shape in ((9, 2, 4), (3, 7, 4)):
        x = torch.randn(*shape)
        captured.guards(x)
        expected = pytree.tree_leaves(model(x))
        for new, old in zip(captured.module(x), expected, strict=True):
            torch.testing.assert_close(new, old)


def test_the_code_of_a_graph_is_written_when_it_runs_in_this_thread_alone():
    def made():
        return fx.GraphModule({}, fx.symbolic_trace(lambda x: (x + 1, {"y": x})).graph)

    others = []
    with code_written_later():
        module = made()
        thread = threading.Thread(target=lambda: others.append(made()))
        thread.start()
        thread.join()
        assert "_code" not in vars(module) and others[0].code
        x = torch.ones(2)
        for _ in range(2):
            assert module(x)[0].tolist() == [2, 2] and module(x)[1]["y"] is x
        assert "_code" in vars(module)
        late = made()
    assert late(x)[0].tolist() == others[0](x)[0].tolist() == [2, 2]
    late.recompile()
    assert late.code == others[0].code
