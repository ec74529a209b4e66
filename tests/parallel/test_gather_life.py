"""A model that gathers codes goes through whatever a model goes through."""

import io
from typing import Any, ClassVar

import pytest
import torch
from gathering import SIZES, Seen, batch, converted, net, shard, train
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint as checkpointed
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

import unclamp
from ranks import run_ranks
from unclamp import ConvertError, Delayed, Dynamic, Guarded, HighPrecision, PerRow, Recipe
from unclamp.nn import Converted
from unclamp.nn.gathered import GatheredCodes

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SETTINGS = [
    "fused",
    "foreach",
    "bf16",
    "offload",
    "unsharded after forward",
    "accumulation",
    "reentrant",
    "not reentrant",
    "composable",
    "weights written",
    "warm-up",
    "switch",
    "switch to rows and back",
    "late",
    "revert",
    "inspected",
]


class _Checkpointed(nn.Sequential):
    use_reentrant: ClassVar[bool] = False

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:  # where it would pass for a training: docs/copies.md
            return super().forward(input)
        x = input.detach().requires_grad_() if not input.requires_grad else input
        out = checkpoint(super().forward, x, use_reentrant=self.use_reentrant)
        assert isinstance(out, Tensor)
        return out


class _Reentrant(_Checkpointed):
    use_reentrant: ClassVar[bool] = True


def _run(rank: int, setting: str, *, gathers: bool) -> Seen:
    how: dict[str, Any] = {}
    if setting == "bf16":
        how["mp_policy"] = MIXED
    if setting == "offload":
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if setting == "unsharded after forward":
        how["reshard_after_forward"] = False
    model = net()
    recipe = Recipe(input=Dynamic(), weight=Guarded(3), grad_output=Dynamic())
    recipe = recipe.override("1.*", weight=Delayed(3)).override("2.*", weight=Dynamic())
    if setting == "warm-up":
        recipe = Recipe(weight=Delayed(3), warmup_steps=2)
    unclamp.convert(model, recipe)
    if setting in ("reentrant", "not reentrant"):
        for number, block in enumerate(model):
            assert isinstance(block, nn.Sequential)
            model[number] = (_Reentrant if setting == "reentrant" else _Checkpointed)(*block)
    if setting == "composable":
        for block in model:
            checkpointed(block)
    shard(model, **how)
    if setting == "inspected":
        for ledger in unclamp.nn.find_ledgers(model):  # pyright: ignore[reportAttributeAccessIssue]
            ledger.inspect("always")
    if gathers and setting != "late":
        assert len(unclamp.gather_codes(model).gathered) == len(SIZES) - 1

    def between(step: int) -> None:
        if setting == "weights written" and step == 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.75)
        if setting == "switch" and step == 1:
            unclamp.switch(model, "*", weight=Dynamic())
        if setting == "switch to rows and back" and step in (1, 3):
            unclamp.switch(model, "0.*", weight=Dynamic(PerRow()) if step == 1 else Dynamic())
        if setting == "revert" and step == 2:
            unclamp.revert(model)
        if setting == "late" and step == 1 and gathers:
            unclamp.gather_codes(model)

    return train(
        model, rank, between=between, microsteps=2 if setting == "accumulation" else 1, how=setting,
    )  # fmt: skip


def _settings(rank: int) -> dict[str, tuple[Seen, Seen]]:
    return {s: (_run(rank, s, gathers=False), _run(rank, s, gathers=True)) for s in SETTINGS}


def test_training_is_that_of_whole_weights_in_every_setting() -> None:
    for results in run_ranks(2, _settings):
        assert list(results) == SETTINGS
        different = [setting for setting, (a, b) in results.items() if a != b]
        assert different == []


def _hybrid(rank: int) -> tuple[Seen, Seen]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    plain, model = (converted(Dynamic(), mesh=mesh) for _ in range(2))
    unclamp.gather_codes(model)
    return train(plain, rank, steps=3), train(model, rank, steps=3)


def test_training_is_that_of_whole_weights_on_a_mesh_of_two_dimensions() -> None:
    for plain, gathered in run_ranks(4, _hybrid):
        assert gathered == plain


# ---- what others see ---------------------------------------------------------------------------


def _state(rank: int, tool: str) -> tuple[list[float], list[float]]:
    plain, model = converted(Delayed(3)), converted(Delayed(3))
    unclamp.gather_codes(model)
    first = train(model, rank, steps=2)
    assert first == train(plain, rank, steps=2)
    dcp = tool == "dcp"
    state: dict[str, Any] = dict(get_model_state_dict(model) if dcp else model.state_dict())
    assert list(state) == list(plain.state_dict())
    assert {type(getattr(x, "_local_tensor", x)) for x in state.values()} == {Tensor}
    assert {x.dtype for key, x in state.items() if "unclamp" not in key} == {torch.float32}
    file = io.BytesIO()
    torch.save({key: getattr(x, "_local_tensor", x) for key, x in state.items()}, file)
    file.seek(0)
    torch.load(file, weights_only=True)
    state = {key: x.clone() for key, x in state.items()}
    again, other = converted(Delayed(3)), converted(Delayed(3))
    unclamp.gather_codes(again)
    train(again, rank, steps=1)
    for one in (again, other):
        if dcp:
            set_model_state_dict(one, state)
        else:
            one.load_state_dict({k: x.clone() for k, x in state.items()}, assign=tool == "assign")
    return train(again, rank, steps=2).losses, train(other, rank, steps=2).losses


@pytest.mark.parametrize("tool", ["torch", "assign", "dcp"])
def test_a_state_dict_is_that_of_whole_weights_and_loads(tool: str) -> None:
    for again, other in run_ranks(2, _state, tool):
        assert again == other


def _names(rank: int) -> None:
    model = converted(Dynamic())
    parameters, names = list(model.parameters()), [n for n, _ in model.named_parameters()]
    unclamp.gather_codes(model)
    train(model, rank, steps=1)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [n for n, _ in model.named_parameters()] == names
    seen: list[Tensor] = []
    layer = model[0][0]  # pyright: ignore[reportIndexIssue]
    layer.register_forward_hook(lambda module, *_: seen.append(module.weight))
    model(batch(0, rank)).sum().backward()
    assert isinstance(seen[0], GatheredCodes)
    assert seen[0].shape == (63, 32)
    assert torch.zeros_like(seen[0]).sum() == 0
    with pytest.raises(unclamp.UnsupportedError, match="read by its own layer alone"):
        seen[0] + 1  # pyright: ignore[reportUnusedExpression]
    assert "GatheredCodes([63, 32]" in repr(seen[0])
    unclamp.revert(model)
    assert not any(isinstance(m, Converted) for m in model.modules())
    model(batch(0, rank)).sum().backward()
    assert not isinstance(seen[1], GatheredCodes)
    assert isinstance(model, FSDPModule)
    assert {type(p._local_tensor) for p in model.parameters()} == {Tensor}  # pyright: ignore


def test_parameters_stay_what_they_are_and_revert_undoes_it() -> None:
    run_ranks(2, _names)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def _report(rank: int) -> tuple[str, str]:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    recipe = Recipe.uniform(Dynamic()).override("0", weight=Dynamic(PerRow()))
    recipe = recipe.override("1", weight=HighPrecision()).override("2", smooth=True)
    recipe = recipe.override("3", grad_input=HighPrecision())
    unclamp.convert(model, recipe)
    shard(nn.Sequential(*list(model)[:5]))
    report = unclamp.gather_codes(model)
    assert unclamp.gather_codes(model).left["4"] == "its codes are gathered already"
    tied = _Tied()
    unclamp.convert(tied, Recipe.uniform(Dynamic()))
    shard(nn.Sequential(tied))
    return str(report), str(unclamp.gather_codes(tied))


def test_the_report_says_what_is_gathered_as_it_is_and_why() -> None:
    for text, tied in run_ranks(2, _report):
        assert text == (
            "gathers the codes of 1 weight\n"
            "  4\n"
            "  left 0: its two GEMMs multiply different casts of its weight\n"
            "  left 1: its weight is not cast\n"
            "  left 2: it is smoothed\n"
            "  left 3: its GEMM grad_input is in high precision\n"
            "  left 5: FSDP2 does not shard its weight"
        )
        assert tied == (
            "gathers the codes of 0 weights\n  left head: another module has its weight too"
        )


def test_a_model_that_is_not_ready_is_an_error() -> None:
    with pytest.raises(ConvertError, match=r"call unclamp\.convert before gather_codes"):
        unclamp.gather_codes(net())
    model = net()
    unclamp.convert(model, Recipe.uniform(Dynamic()))
    with pytest.raises(ConvertError, match="call fully_shard before gather_codes"):
        unclamp.gather_codes(model)
