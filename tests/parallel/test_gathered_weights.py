"""Of a weight that is gathered for a forward no codes stay until backward; the bits stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import unclamp
from ranks import run_ranks
from unclamp import Delayed, Dynamic, Guarded, PerBlock, PerRow, Recipe

IN, OUT, ROWS = 24, 40, 6
"""No two of the tensors of a layer have one shape."""
KINDS = {
    "delayed": Recipe.uniform(Delayed(history_len=2)),
    "dynamic": Recipe.uniform(Dynamic()),
    "rows": Recipe.uniform(Dynamic(granularity=PerRow())),
    "blocks with a history": Recipe(weight=Delayed(granularity=PerBlock(8, 8))),
    "smoothed": Recipe(smooth=True, weight=Guarded()),
}


def _train(rank: int, wrapper: str, kind: str, *, after: bool) -> tuple[int, list[Any]]:
    """Return the bytes of a weight's codes that backward keeps, and the gradients of 3 steps."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT)
    model: nn.Module = nn.Sequential(layer, nn.ReLU())
    group = () if wrapper == "none" else None
    if not after:
        unclamp.convert(model, KINDS[kind], group=group)
    if wrapper == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if wrapper == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if after:
        unclamp.convert(model, KINDS[kind], group=group)
    kept = 0

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        if x.element_size() == 1 and x.numel() == IN * OUT:
            kept += x.numel()
        return x

    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-5)
    results = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, IN, generator=generator).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            y = model(x)
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert x.grad is not None
        results.append((y.tolist(), x.grad.tolist()))
    return kept, results


def _both(rank: int, wrapper: str, kind: str, after: bool) -> Any:
    """All ranks have one batch, so that the mean of their gradients is that of each."""
    return _train(rank, wrapper, kind, after=after), _train(rank, "none", kind, after=after)


@pytest.mark.parametrize(
    ("wrapper", "kind", "after"),
    [
        *(("fsdp2", kind, False) for kind in KINDS),
        ("fsdp2", "delayed", True),
        ("fsdp1", "delayed", False),
        ("fsdp1", "rows", True),
    ],
)
def test_no_codes_of_a_gathered_weight_stay(wrapper: str, kind: str, after: bool) -> None:
    for (kept, results), (kept_plain, plain) in run_ranks(2, _both, wrapper, kind, after):
        assert kept == 0
        assert kept_plain == 3 * IN * OUT
        assert results == plain
