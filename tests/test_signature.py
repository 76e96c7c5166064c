"""Calls: what makes two calls the same, what a call may hold, and how it is rebuilt."""

from collections import OrderedDict, namedtuple
from enum import Enum

import pytest
import torch
from torch import nn

from fxbt.capture.call import Binder, Call, make_call
from fxbt.capture.containers import named_leaves
from fxbt.errors import NotCapturable

Pair = namedtuple("Pair", "first second")


class Mode(Enum):
    A = 1
    B = 2


class Model(nn.Module):
    def forward(self, x, mask=None, flag=False, *, extra=None, **rest):
        return x


X, MASK = torch.zeros(2, 3), torch.ones(2, 3)


def key(*args, **kwargs):
    return make_call(Model(), *args, **kwargs).key


def test_positional_and_keyword_calls_share_a_key():
    call = make_call(Model(), X, MASK)
    assert call.key == key(mask=MASK, x=X) == key(X, mask=MASK)
    assert call.names == ["x", "mask"]
    assert call.args == () and list(call.kwargs) == ["x", "mask"]


def test_flags_given_by_position_stay_there():
    call = make_call(Model(), X, None, True)
    assert call.args == (X, None, True)
    assert call.names == ["args[0]"]
    assert call.key != key(X, None, flag=True)


def test_shapes_and_values_do_not_matter():
    assert key(X) == key(torch.ones(7, 9))


@pytest.mark.parametrize(
    "other",
    [
        {"x": X.double()},
        {"x": X[0]},
        {"x": X.clone().requires_grad_()},
        {"x": X, "mask": None},
        {"x": X, "mask": MASK},
        {"x": X, "unknown": MASK},
        {"x": (X,)},
        {"x": [X]},
        {"x": {"a": X}},
    ],
    ids=["dtype", "rank", "requires_grad", "None", "more", "extra", "tuple", "list", "dict"],
)
def test_key_tells_apart(other):
    assert key(x=X) != key(**other)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (True, 1),
        (1, 1.0),
        (0.0, -0.0),
        ("1", 1),
        (Mode.A, Mode.B),
        (torch.float16, torch.float32),
        ([], ()),
        (1.0, 1 + 0j),
    ],
)
def test_static_values_are_told_apart_with_their_types(one, two):
    assert key(X, flag=one) != key(X, flag=two)


def test_nan_is_one_value():
    assert key(X, flag=float("nan")) == key(X, flag=float("nan"))


def test_modes_are_part_of_the_key():
    keys = [key(X)]
    with torch.no_grad():
        keys.append(key(X))
    with torch.inference_mode():
        keys.append(key(X))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            keys.append(key(X))
    assert len(set(keys)) == 5


def test_the_same_tensor_twice_is_one_tensor():
    twice = make_call(Model(), X, X)
    assert len(twice.tensors) == 1
    assert twice.key != key(X, X.clone())
    args, kwargs = twice.rebuild([MASK])
    assert kwargs["x"] is MASK and kwargs["mask"] is MASK


def test_rebuild_makes_fresh_containers_of_the_same_types():
    batch = {"a": [X, (MASK, 3)], "b": Pair(X, None), "c": OrderedDict(z=MASK)}
    call = make_call(Model(), batch)
    new = [torch.full((1,), 1.0), torch.full((1,), 2.0)]
    _, kwargs = call.rebuild(new)
    rebuilt = kwargs["x"] if "x" in kwargs else call.rebuild(new)[0][0]
    assert rebuilt is not batch and rebuilt["a"] is not batch["a"]
    assert type(rebuilt["b"]) is Pair and type(rebuilt["c"]) is OrderedDict
    assert rebuilt["a"][0] is new[0] and rebuilt["b"].first is new[0] and rebuilt["c"]["z"] is new[1]
    assert rebuilt["a"][1][1] == 3 and rebuilt["b"].second is None
    assert len(list(named_leaves(rebuilt, ""))) == len(list(named_leaves(batch, ""))) == 6


def test_names_say_where_a_nested_tensor_stands():
    assert make_call(Model(), x={"a": [X, MASK]}).names == ["x['a'][0]", "x['a'][1]"]


def test_model_outputs_are_containers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    given = outputs.BaseModelOutput(last_hidden_state=X, hidden_states=(MASK,))
    call = make_call(Model(), x=given)
    assert len(call.tensors) == 2
    rebuilt = call.rebuild([MASK, X])[1]["x"]
    assert type(rebuilt) is type(given) and rebuilt.last_hidden_state is MASK and rebuilt.hidden_states[0] is X


class Opaque:
    pass


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Opaque(), "argument mask holds a Opaque"),
        ({"deep": [Opaque()]}, r"argument mask\['deep'\]\[0\] holds a Opaque"),
        (X.to_sparse(), "is a sparse_coo tensor"),
        (torch.nested.nested_tensor([X[0], X[0]]), "is a nested tensor"),
        (X.as_subclass(Subclass), "holds a Subclass"),
    ],
    ids=["object", "nested object", "sparse", "nested tensor", "subclass"],
)
def test_what_a_graph_cannot_take(value, words):
    with pytest.raises(NotCapturable, match=words) as caught:
        key(X, mask=value)
    assert not caught.value.silent


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_an_object_is_its_attributes():
    length = [key(X, mask=Holder(x=X, length=length)) for length in (3, 3, 4)]
    assert length[0] == length[1] != length[2]
    assert key(X, mask=Holder(x=X)) == key(X, mask=Holder(x=X)) != key(X, mask=Holder(y=X))
    assert key(X, mask=Holder(kind=Holder)) != key(X, mask=Holder(kind=Opaque))


def test_one_object_in_two_places_is_another_call():
    one, other = Holder(x=X), Holder(x=X)
    assert key(X, mask=[one, one]) != key(X, mask=[one, other])


def test_an_object_that_holds_itself_is_no_tree():
    holder = Holder(x=X)
    holder.again = [holder]
    with pytest.raises(NotCapturable, match=r"argument mask.again\[0\] is a Holder that contains itself"):
        key(X, mask=holder)


def test_tracing_tensors_are_refused_silently():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    for value in (fake, torch.fx.Proxy(torch.fx.Graph().placeholder("x"))):
        with pytest.raises(NotCapturable) as caught:
            key(value)
        assert caught.value.silent


@pytest.mark.parametrize(
    "call", [lambda b: b.call((X, X, X, X, X), {}), lambda b: b.call((X,), {"x": X})], ids=["too many", "twice"]
)
def test_wrong_calls_are_left_to_the_model(call):
    assert call(Binder(Model().forward)).args


def test_text_shows_dtypes_ranks_values_and_modes():
    call = make_call(Model(), X, flag=True)
    assert str(call) == "(x=float32[?, ?], flag=True) grad"
    with torch.no_grad():
        assert str(call) == "(x=float32[?, ?], flag=True)"
    assert isinstance(call, Call)
