"""The attention of the study's model: observed at the steps that are counted, and in FP8."""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import unclamp
from bench.timing import compare
from unclamp.nn import find_ledgers
from unclamp.nn.counting import COUNTED_EVERY
from unclamp.study.config import DataConfig, ModelConfig
from unclamp.study.models import build_model

LINEAR = ["*_proj", "lm_head"]
MOST = 1.3
"""What observing may cost: a step with it, at the default cadence, over one without."""


def steps(model: nn.Module, count: int) -> Callable[[], Any]:
    """Return what makes so many optimizer steps."""
    data = DataConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (data.batch_size, data.seq_len), generator=generator)

    def run() -> None:
        for _ in range(count):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def measure() -> dict[str, dict[str, float]]:
    """Time steps of the plain model, with its attention observed, and with it in FP8."""
    torch.manual_seed(0)
    plain = build_model(ModelConfig())
    observed, looked_at, in_fp8 = (copy.deepcopy(plain) for _ in range(3))
    for model in (observed, looked_at):
        unclamp.observe(model, skip=LINEAR)
    find_ledgers(looked_at)[0].inspect("always")
    attention = unclamp.Recipe().override("*.[qp][kv]", scaling="delayed")
    unclamp.convert(in_fp8, attention, skip=LINEAR)
    every = f"observed, every {COUNTED_EVERY}th counted"
    results = compare(
        f"the attention of the study's model, {COUNTED_EVERY} steps",
        {
            "plain": steps(plain, COUNTED_EVERY),
            every: steps(observed, COUNTED_EVERY),
            "each step inspected": steps(looked_at, COUNTED_EVERY),
            "qk and pv in FP8, emulated": steps(in_fp8, COUNTED_EVERY),
        },
        target={every: MOST},
        rounds=5,
        warm_up=1,
    )
    return {f"attention: {name}": result for name, result in results.items()}


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__).parse_args()
    measure()
