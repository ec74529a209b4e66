"""A wrapped model has the names of the plain one, whichever was first: wrapper or conversion."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import unclamp
from unclamp import Recipe
from unclamp.nn import find_ledgers
from unclamp.nn.named import named_modules

# torch's own, of what loads its compiler, and of sharding over one process.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*world size:UserWarning"
)


class Net(nn.Module):
    """A model with an attribute called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.module = nn.Sequential(nn.Linear(8, 8))
        self.model = nn.ModuleDict({"base_layer": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model["base_layer"](self.module(self.body(x))))


NAMES = ["body.0", "body.1.0", "module.0", "model.base_layer", "head"]


class Fabric(nn.Module):
    """As Lightning Fabric's wrapper: the model and what it was before other wrappers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._forward_module = model
        self._original_module = getattr(model, "module", model)


class Mine(DataParallel):
    """A user's own kind of a wrapper of torch."""


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


AROUND: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda m: m,
    "ddp": DistributedDataParallel,
    "data parallel": DataParallel,
    "average": AveragedModel,
    "compile": torch.compile,
    "checkpoint": checkpoint_wrapper,
    "fabric": Fabric,
    "a subclass": Mine,
}
"""What wraps a whole model, and keeps its parameters."""


def part(net: Net, how: str) -> None:
    """Wrap parts of a model."""
    wrap = AROUND[how]
    net.body[1] = wrap(net.body[1])
    net.head = wrap(net.head)


def names(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(site.fqn for ledger in find_ledgers(model) for site in ledger.sites))


PAIRS = [p for p in itertools.product(AROUND, AROUND) if p != ("compile", "compile")]


@pytest.mark.parametrize(("inside", "outside"), PAIRS, ids=" in ".join)
def test_whatever_wraps_it_a_model_has_the_names_of_the_plain_one(inside, outside) -> None:
    first, then = Net(), Net()
    unclamp.convert(first, Recipe())
    wrapped = []
    for net in (first, then):
        part(net, inside)
        wrapped.append(AROUND[outside](AROUND[inside](net)))
    report = unclamp.convert(wrapped[1], Recipe())
    assert list(report.converted) == NAMES
    for model in wrapped:
        assert names(model) == NAMES


def test_fsdp_puts_no_part_into_a_name() -> None:
    first, then = Net(), Net()
    unclamp.convert(first, Recipe())
    for net in (first, then):
        net.body[1] = fsdp1(net.body[1])
    wrapped = [fsdp1(first), fsdp1(then)]
    unclamp.convert(wrapped[1], Recipe())
    assert [names(model) for model in wrapped] == [NAMES, NAMES]


GLOBS = ["body.*", "body.1.0", "^head", "head", "module.*", "module.0", "model.*", "base_layer",
         "*.0", "^module.0", "mod*", "*"]  # fmt: skip


@pytest.mark.parametrize("outside", [name for name in AROUND if name != "nothing"])
def test_globs_for_the_plain_model_do_the_same_in_a_wrapped_one(outside) -> None:
    for glob in GLOBS:
        done = []
        for how in ("nothing", outside):
            net = AROUND[how](Net())
            recipe = Recipe().override(glob, input="dynamic")
            unclamp.convert(net, recipe)
            own = [site for ledger in find_ledgers(net) for site in ledger.sites]
            switched = unclamp.switch(net, glob, weight="dynamic").switched
            skipped = AROUND[how](Net())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", unclamp.UnclampWarning)  # "*" leaves no layer
                report = unclamp.convert(skipped, Recipe(), skip=[glob])
            kinds = {str(s.name): s.operand.scaling.kind for s in own}
            done.append((kinds, list(switched), report.skipped))
        assert done[0] == done[1], glob


def test_globs_in_the_spelling_of_the_wrapped_model_match_too() -> None:
    net = Net()
    del net.module
    model = torch.compile(DistributedDataParallel(net))
    skip = ["module.head", "_orig_mod.module.body.1.*", "^_orig_mod.module.model.base_layer"]
    report = unclamp.convert(model, Recipe(), skip=skip)
    assert list(report.skipped) == ["body.1.0", "model.base_layer", "head"]
    assert list(report.converted) == ["body.0"]


def test_a_users_own_wrapper_keeps_its_name() -> None:
    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.module = net

    assert list(unclamp.convert(Wrapper(Net()), Recipe()).converted) == [
        f"module.{name}" for name in NAMES
    ]


@pytest.mark.parametrize(
    ("library", "kind", "is_wrapper"),
    [
        ("deepspeed.runtime.engine", "DeepSpeedEngine", True),
        ("megatron.core.transformer.module", "Float16Module", True),
        ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel", True),
        ("megatron.core.transformer.module", "MegatronModule", False),
        ("mine", "DistributedDataParallel", False),
    ],
)
def test_wrappers_of_other_libraries_are_known_by_library_and_class(
    library: str, kind: str, is_wrapper: bool
) -> None:
    base = type(kind, (nn.Module,), {"__module__": library})
    wrapper = type("Wrapper", (base,), {})()
    wrapper.module = Net()
    found = list(unclamp.convert(wrapper, Recipe()).converted)
    assert found == (NAMES if is_wrapper else [f"module.{name}" for name in NAMES])


def test_the_keys_of_a_state_dict_are_torchs_own() -> None:
    plain = DistributedDataParallel(Net()).state_dict().keys()
    model = DistributedDataParallel(Net())
    unclamp.convert(model, Recipe())
    assert unclamp.weights_only(model.state_dict()).keys() == plain
    assert all(key.startswith("module.") for key in model.state_dict())


def test_names_are_unique_in_every_wrapped_model() -> None:
    for inside, outside in PAIRS:
        net = Net()
        part(net, inside)
        model = AROUND[outside](AROUND[inside](net))
        products = {n: m for n, m in named_modules(model) if isinstance(m, nn.Linear)}
        assert sorted(products) == sorted(NAMES)


def test_coverage_has_the_names_of_the_plain_model() -> None:
    x = torch.randn(2, 8)
    net = Net()
    part(net, "checkpoint")
    found = [unclamp.coverage(m, x) for m in (Net(), net, torch.compile(net))]
    assert [[p.fqn for p in each.products] for each in found] == [NAMES] * 3


def test_a_group_is_given_by_the_plain_name_and_by_the_wrapped_one(recwarn) -> None:
    for glob in ("head", "module.head", "^module.head", "^head"):
        net = Net()
        del net.module
        model = DistributedDataParallel(net)
        unclamp.convert(model, Recipe(), group={glob: ()})
    assert [str(w.message) for w in recwarn] == []
