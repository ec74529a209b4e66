"""Ranks that share amaxes decide alike, without a word: an outlier of one rank counts for all."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import unclamp
from ranks import run_ranks
from unclamp import Autopilot, Delayed, Dynamic, Guarded, Recipe, Rule
from unclamp.nn import find_ledgers

STEPS = 30
OUTLIER_STEP = 8
RULE = Rule(ladder=(Delayed(4), Guarded(), Dynamic()), floor=10)


def _steered(rank: int) -> tuple[list[Any], list[str], float]:
    """Train on a rank's own data, with an outlier on rank 1 alone; return what was decided."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    unclamp.convert(net, Recipe.uniform(Delayed(4)))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pilot = Autopilot(model, rule=RULE, untested=True)
    seen = 0.0
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(4, 8, generator=generator).clamp(-1, 1)
        x[0, 0] = 1.0
        if (step, rank) == (OUTLIER_STEP, 1):
            x[0, 0] = 64.0
        seen = max(seen, float(x.abs().max()))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        pilot.step()
    scalings = [site.operand.scaling.kind for site in find_ledgers(model)[0].sites]
    return [each.to_dict() for each in pilot.decisions], scalings, seen


def test_an_outlier_of_one_rank_switches_on_both() -> None:
    (first, scalings, seen), (second, others, theirs) = run_ranks(2, _steered)
    assert (seen, theirs) == (1.0, 64.0)  # rank 0 never saw it
    assert first == second
    assert scalings == others
    (up,) = [d for d in first if (d["step"], d["fqn"], d["role"]) == (OUTLIER_STEP, "0", "input")]
    assert (up["kind"], up["amax"], up["overshoot"]) == ("up", 64.0, 64.0)
    (down,) = [d for d in first if (d["fqn"], d["role"], d["kind"]) == ("0", "input", "down")]
    assert down["step"] == OUTLIER_STEP + RULE.floor
