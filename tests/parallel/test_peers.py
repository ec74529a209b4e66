"""What torchao asks of its own float8 training on several processes, asked of this one.

| criterion | where |
|---|---|
| losses of FSDP2, with and without the one-byte all-gather, over 10 steps of Adam | here |
| memory of FSDP2: one block's codes in a forward, two in a backward | here |
| no whole weight between forward and backward | `test_gather.py`, `test_gathered_weights.py` |
| one byte an element in the all-gather | `test_gather.py` |
| tensor parallel = sequence parallel = one process | `test_tensor.py` |
| FSDP2 over tensor parallel | `test_tensor.py` |
| signal to noise of a mixture of experts | `test_experts.py` |
"""

import gc
from typing import Any

import torch
import torch.distributed as dist
from gathering import batch, converted, net
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import unclamp
from ranks import run_ranks
from unclamp import Delayed, Dynamic, Guarded, Recipe, Scaling

STEPS = 10
WEIGHTS: dict[str, Scaling] = {"delayed": Delayed(), "guarded": Guarded(), "dynamic": Dynamic()}


def _losses(model: nn.Module, rank: int) -> list[float]:
    """Train with Adam; gradients of replicas are averaged by hand."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for step in range(STEPS):
        loss = model(batch(step, rank)).square().mean()
        loss.backward()
        if not isinstance(model, FSDPModule):
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                assert parameter.grad is not None
                parameter.grad.div_(dist.get_world_size())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _three_ways(rank: int) -> dict[str, list[list[float]]]:
    found = {}
    for name, scaling in WEIGHTS.items():
        replica, sharded, gathered = net(), converted(scaling), converted(scaling)
        recipe = Recipe.uniform(Dynamic()).override("*", weight=scaling)
        unclamp.convert(replica, recipe, group=dist.group.WORLD)
        unclamp.gather_codes(gathered)
        found[name] = [_losses(model, rank) for model in (replica, sharded, gathered)]
    return found


def test_ten_steps_of_adam_have_the_losses_of_replicas() -> None:
    for found in run_ranks(2, _three_ways):
        for name, (replica, sharded, gathered) in found.items():
            assert replica == sharded == gathered, name
            assert replica[-1] < replica[0]


# ---- memory ------------------------------------------------------------------------------------

SIDE, BLOCKS = 48, 4


def _whole_bytes() -> int:
    """Return the bytes of all tensors that have as many elements as a whole weight."""
    gc.collect()
    held: dict[int, int] = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, nn.Parameter) and x.numel() == SIDE * SIDE and not x.is_meta:
            storage = x.untyped_storage()
            held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def _memory(rank: int) -> dict[str, list[int]]:
    """Return what is there of whole weights at each block of a forward and of a backward."""
    model: Any = converted(Dynamic(), (32, *[SIDE] * BLOCKS, 1))
    unclamp.gather_codes(model)
    found: dict[str, list[int]] = {"forward": [], "backward": []}
    for block in model:
        block[0].register_forward_hook(lambda *_: found["forward"].append(_whole_bytes()))
        block[0].register_full_backward_pre_hook(
            lambda *_: found["backward"].append(_whole_bytes())
        )
    loss = model(batch(0, rank).requires_grad_()).square().mean()
    found["between"] = [_whole_bytes()]
    loss.backward()
    model.zero_grad()
    found["after"] = [_whole_bytes()]
    return found


def test_memory_of_whole_weights_is_bounded_by_the_codes_of_one_block_or_two() -> None:
    codes = SIDE * SIDE
    for found in run_ranks(2, _memory):
        assert max(found["forward"]) == codes
        assert codes <= max(found["backward"]) <= 2 * codes  # FSDP2 fetches the next one early
        assert found["between"] == found["after"] == [0]
