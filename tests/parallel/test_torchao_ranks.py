"""torchao's own float8 training on two processes, beside this one: the same weights, bit for bit.

Where torchao is not installed these tests are skipped. Its all-gather of FP8 does not heed
`round_scales_to_power_of_2`, so scales are compared as `Dynamic()` makes them. Of its tensor
parallelism what splits tokens is left out: it sends FP8 as such, which gloo refuses ("Invalid
scalar type").
"""

import importlib
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from gathering import Wire, batch, listening, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import unclamp
from ranks import run_ranks
from unclamp import Dynamic, Recipe

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")

SIZES = (32, 64, 48, 2)
"""Rows are divisible by 2 ranks, since torchao's weights cannot be shared unevenly."""


def torchao(module: str) -> Any:
    """Import one of torchao's modules, which warn of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torchao.float8{module}")


def converted(model: nn.Module, **settings: Any) -> nn.Module:
    """Return a model in torchao's FP8, multiplied as on a machine without FP8."""
    config = torchao("").Float8LinearConfig(emulate=True, **settings)
    return torchao("").convert_to_float8_training(model, config=config)


def bits(x: Tensor) -> list[Any]:
    return x.contiguous().view(torch.uint8).tolist()


# ---- FSDP2 gathers codes -----------------------------------------------------------------------


@dataclass
class Gathered:
    """What layers multiplied by, and what went over the wire for it.

    Attributes:
        codes: Of each weight in the order of the layers' forwards, as bytes.
        scales: Whose reciprocals multiply, of each.
        wires: What a forward and a backward sent.
        outputs: Of the model in each step.
    """

    codes: list[Any] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(SIZES)]
    return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))


def _ours() -> nn.Module:
    model = _net()
    unclamp.convert(model, Recipe.uniform(Dynamic()))
    unclamp.gather_codes(shard(model))
    return model


def _theirs() -> nn.Module:
    return shard(converted(_net(), enable_fsdp_float8_all_gather=True))  # pyright: ignore


def _gathered(model: Any, rank: int) -> Gathered:
    """Look at the weights of three steps, between which these become larger and smaller."""
    seen = Gathered()

    def look(layer: Any, _: Any) -> None:
        weight = layer.weight
        if hasattr(weight, "quantized"):
            codes, scale = weight.quantized.codes, weight.quantized.scale_inv
        else:
            codes, scale = weight._data, weight._scale.reciprocal()
        seen.codes.append(bits(codes))
        seen.scales.append(scale.item())

    for block in model:
        block[0].register_forward_pre_hook(look)
    for step, factor in enumerate((3.7, 0.013, 1.0)):
        with listening() as wire:
            y = model(batch(step, rank))
            y.square().mean().backward()
        seen.wires.append(wire)
        seen.outputs.append(y.tolist())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
    return seen


def _both(rank: int) -> tuple[Gathered, Gathered]:
    return _gathered(_ours(), rank), _gathered(_theirs(), rank)


def test_codes_scales_and_bytes_on_the_wire_are_those_of_torchaos_all_gather() -> None:
    # Bytes of a rank's part: of a code one, and of a bias four. (Beside a bias in float32 torchao's
    # codes travel as bytes; alone they would travel as FP8, which gloo refuses.)
    halves = [b * a // 2 + 4 * b // 2 for a, b in pairwise(SIZES)]
    told = run_ranks(2, _both)
    for ours, theirs in told:
        assert len(ours.codes) == 3 * 3
        assert ours.codes == theirs.codes
        assert ours.scales == theirs.scales
        for step in range(3):
            assert sorted(ours.wires[step].gathered) == sorted(2 * halves)
            assert sorted(theirs.wires[step].gathered) == sorted(2 * halves)
        # A hidden value next to the middle between two codes may be rounded to either.
        torch.testing.assert_close(
            torch.tensor(ours.outputs), torch.tensor(theirs.outputs), rtol=1e-2, atol=1e-2
        )
    assert told[0][0].codes == told[1][0].codes


# ---- tensor parallel ---------------------------------------------------------------------------


def _part(how: str, x: Tensor, rank: int) -> Tensor:
    return x if how == "colwise" else x.chunk(2, 1)[rank]


def _gradient(how: str, dy: Tensor, rank: int) -> Tensor:
    return dy.chunk(2, 1)[rank] if how == "colwise" else dy


def _layer(rank: int) -> dict[str, tuple[list[Any], list[Any]]]:
    """Return output and gradients of one layer, ours and torchao's, for each way to cut it."""
    mesh = init_device_mesh("cpu", (2,))
    parallel = torchao(".float8_tensor_parallel")
    styles = {
        "colwise": (ColwiseParallel, parallel.Float8ColwiseParallel),
        "rowwise": (RowwiseParallel, parallel.Float8RowwiseParallel),
    }
    return {
        how: (
            _passed(how, rank, parallelize_module(_shared(), mesh, ours())),
            _passed(how, rank, parallelize_module(_in_theirs(), mesh, theirs())),
        )
        for how, (ours, theirs) in styles.items()
    }


def _plain() -> nn.Sequential:
    torch.manual_seed(1)
    layer = nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        layer.weight[3, 5], layer.weight[12, 20] = 3.0, -4.0  # amaxes of parts differ
    return nn.Sequential(layer)


def _shared() -> nn.Module:
    model = _plain()
    unclamp.convert(model, Recipe.uniform(Dynamic(shared=True)))
    return model[0]


def _in_theirs() -> nn.Module:
    model: Any = converted(_plain())
    return model[0]


def _passed(how: str, rank: int, layer: nn.Module) -> list[Any]:
    made = torch.Generator().manual_seed(2)
    x = torch.randn(6, 32, generator=made) * torch.linspace(1, 3, 32)
    dy = torch.randn(6, 16, generator=made)
    given = _part(how, x, rank).clone().requires_grad_()
    y = layer(given)
    y.backward(_gradient(how, dy, rank).clone())
    weight: Any = layer.weight
    assert given.grad is not None
    return [y.tolist(), given.grad.tolist(), weight.grad.full_tensor().tolist()]


def test_a_layer_is_torchaos_in_parts_where_scales_are_shared() -> None:
    for told in run_ranks(2, _layer):
        for how, (ours, theirs) in told.items():
            for made, wanted in zip(ours, theirs, strict=True):
                # Codes and scales are equal, and float32 holds products of codes exactly. A sum of
                # 32 of up to 40 has the order of a GEMM: 32 roundings of 2^-24 of it.
                torch.testing.assert_close(
                    torch.tensor(made),
                    torch.tensor(wanted),
                    rtol=1e-6,
                    atol=1e-4,
                    msg=lambda text, how=how: f"{how}: {text}",
                )
