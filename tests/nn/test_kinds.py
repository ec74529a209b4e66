"""Which modules are matrix products, whatever their class, and how their class changes and back."""

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unclamp import Fp8Linear, Recipe, UnclampWarning, convert, revert
from unclamp.nn import Converted, find_ledgers


class Mixed:
    """As torchtitan's `Module`: a base that `nn.Linear` does not know."""

    extra = "kept"


class Titan(nn.Linear, Mixed):
    pass


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Wrapped(Tensor):
    """A weight that holds other data than it shows, as torchao's int8 weights do."""


def trained(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(5, 4, requires_grad=True)
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]  # pyright: ignore


def test_a_class_with_the_forward_of_linear_is_converted_and_trains_as_linear_does() -> None:
    torch.manual_seed(0)
    plain, titan = nn.Linear(4, 3), Titan(4, 3)
    titan.load_state_dict(plain.state_dict())
    for layer in (plain, titan):
        assert list(convert(layer, Recipe()).converted) == [""]
    assert isinstance(titan, Fp8Linear)
    assert isinstance(titan, Titan)
    assert titan.extra == "kept"
    assert type(titan).__name__ == "Fp8Titan"
    assert all(torch.equal(a, b) for a, b in zip(trained(plain), trained(titan), strict=True))
    assert revert(titan).reverted == ("",)
    assert type(titan) is Titan


def test_revert_takes_away_the_adaptor_and_nothing_that_came_in_front_of_it_since() -> None:
    layer = Titan(4, 3)
    convert(layer, Recipe())
    # What `fully_shard` does: a class of its own in front of the one it finds.
    layer.__class__ = type("FSDPFp8Titan", (Mixed2, type(layer)), {"sharded": True})  # pyright: ignore
    revert(layer)
    made = type(layer)
    assert made.__name__ == "FSDPTitan"
    assert made.__mro__[1:3] == (Mixed2, Titan)
    assert made.sharded is True  # pyright: ignore[reportAttributeAccessIssue]
    assert not isinstance(layer, Converted)
    assert layer(torch.randn(2, 4)).shape == (2, 3)


class Mixed2:
    pass


def test_a_layer_that_was_parametrized_since_is_reverted_and_stays_parametrized() -> None:
    layer = nn.Linear(4, 3)
    convert(layer, Recipe())
    parametrize.register_parametrization(layer, "weight", Doubling())
    before = layer.weight.detach().clone()
    assert revert(layer).reverted == ("",)
    assert parametrize.is_parametrized(layer, "weight")
    assert torch.equal(layer.weight, before)
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, before, layer.bias))


def test_a_layer_that_is_parametrized_already_is_left_alone_and_says_why() -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Doubling())
    with pytest.warns(UnclampWarning, match="no layer is in FP8"):
        assert "convert it first" in convert(layer, Recipe()).skipped[""]
    parametrize.remove_parametrizations(layer, "weight")
    assert list(convert(layer, Recipe()).converted) == [""]


def test_where_a_class_cannot_be_made_nothing_is_converted() -> None:
    class Tagged(nn.Linear):
        def __init_subclass__(cls, *, tag: str) -> None:
            pass

    model = nn.Sequential(nn.Linear(4, 4), Tagged(4, 4))
    with pytest.raises(TypeError, match="tag"):
        convert(model, Recipe())
    assert type(model[0]) is nn.Linear
    assert find_ledgers(model) == []


def test_classes_of_models_that_are_gone_are_gone() -> None:
    def made_and_dropped() -> weakref.ref[type]:
        plain = type("Passing", (nn.Linear,), {})
        layer = plain(4, 3)
        convert(layer, Recipe())
        revert(layer)
        return weakref.ref(plain)

    classes = [made_and_dropped() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in classes] == [None] * 3


@pytest.mark.parametrize("made", [nn.Linear, Titan])
def test_converted_layers_are_copied_and_pickled(made: type[nn.Linear]) -> None:
    layer = made(4, 3)
    convert(layer, Recipe())
    trained(layer)
    find_ledgers(layer)[0].update()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        ours, theirs = layer.state_dict(), twin.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_weight_that_is_a_tensor_subclass_is_left_alone_and_says_why() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    with pytest.warns(UnclampWarning, match="no layer is in FP8"):
        report = convert(layer, Recipe())
    assert report.converted == {}
    assert "Wrapped" in report.skipped[""]


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counting(self: Any, *args: Any) -> Any:
        self.calls = self.__dict__.get("calls", 0) + 1
        return function(self, *args)

    return counting


def test_methods_with_a_bare_super_work_after_revert_and_where_the_class_is_still_in_use() -> None:
    class Base(nn.Linear):
        @classmethod
        def kind(cls) -> str:
            return "base"

        @property
        def size(self) -> int:
            return self.in_features

    reverted, kept = Base(4, 3), Base(4, 3)
    for layer in (reverted, kept):
        convert(layer, Recipe())

    class Front(type(reverted)):  # pyright: ignore[reportGeneralTypeIssues]
        def forward(self, x: Tensor, *, times: float = 2.0) -> Tensor:  # pyright: ignore
            """Double."""
            return super().forward(x) * times

        def extra_repr(self) -> str:
            return f"in front, {super().extra_repr()}"

        @classmethod
        def kind(cls) -> str:
            return f"front of {super().kind()}"

        @property
        def size(self) -> int:
            return super().size + 1

        @counted
        def half(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

        def own_class(self) -> type:
            return __class__  # pyright: ignore

    for layer in (reverted, kept):
        layer.__class__ = Front
    assert revert(reverted).reverted == ("",)
    x = torch.randn(2, 4)
    plain = nn.functional.linear(x, reverted.weight, reverted.bias)
    assert torch.equal(reverted(x), 2 * plain)
    assert torch.equal(reverted.forward(x, times=3.0), 3 * plain)  # pyright: ignore
    assert torch.equal(reverted.half(x), plain / 2)  # pyright: ignore
    assert reverted.calls == 1
    assert repr(reverted).count("in front, in_features=4") == 1
    assert (type(reverted).kind(), reverted.size) == ("front of base", 5)
    assert reverted.own_class() is type(reverted)  # pyright: ignore
    assert type(reverted).forward.__doc__ == "Double."
    assert not isinstance(reverted, Converted)
    # The other one has the class as it was.
    assert isinstance(kept, Converted)
    assert type(kept) is Front
    assert kept.own_class() is Front
    assert kept(x).shape == kept.half(x).shape == (2, 3)
