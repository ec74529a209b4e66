"""A pipeline whose stages several ranks hold begins as one process does, in each microbatch."""

import numpy as np
import pytest
import torch
from pipelined import MICROBATCHES, SCHEDULES, STEPS, Case, Outcome, all_on_rank, alone, on_rank

import unclamp
from ranks import run_ranks

SPLITS = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""torch 2.11 cannot split the node of a function in Python."""
delayed = unclamp.Recipe()
cases = {
    **{name: Case(schedule=name, recipe=delayed, copies="group") for name in SCHEDULES},
    **{
        f"{name}, fsdp2": Case(schedule=name, recipe=delayed, copies="fsdp2")
        for name in ("GPipe", "1F1B", "Interleaved1F1B")
    },
    **{  # with shapes told: a DDP's own reducer takes the run for shapes for a training
        f"{name}, ddp": Case(schedule=name, recipe=delayed, copies="ddp", is_static=True)
        for name in ("GPipe", "1F1B", "Interleaved1F1B")
    },
    "checkpointed": Case(schedule="1F1B", recipe=delayed, copies="fsdp2", checkpoints=True),
    "checkpointed, reentrant": Case(
        schedule="1F1B",
        recipe=delayed,
        copies="ddp",
        checkpoints=True,
        is_reentrant=True,
        is_static=True,
    ),
    "checkpointed, zero bubble": Case(
        schedule="InterleavedZeroBubble", recipe=delayed, copies="group", checkpoints=True
    ),
    "evaluations between": Case(
        schedule="Interleaved1F1B", recipe=delayed, copies="group", evaluates=True
    ),
    "one evaluates first": Case(
        schedule="Interleaved1F1B", recipe=delayed, copies="group", odd="evaluates"
    ),
    "guarded": Case(
        schedule="1F1B", recipe=unclamp.Recipe.uniform(unclamp.Guarded(margin=3)), copies="fsdp2"
    ),
}
cases = {k: case for k, case in cases.items() if not (IS_OLD and case.schedule in SPLITS)}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Outcome]]:
    ranks = run_ranks(4, all_on_rank, list(cases.values()))
    return {name: [outcomes[i] for outcomes in ranks] for i, name in enumerate(cases)}


@pytest.mark.parametrize("name", cases)
def test_a_fresh_start_is_that_of_the_single_process(name: str, trained):
    """What is left is the order of sums; a rank's loss is a mean of half, its gradients twice."""
    truth, ranks = alone(cases[name]), trained[name]
    assert {site for rank in ranks for site in rank.sites} == set(truth.sites)
    for rank in ranks:
        assert rank.updates == truth.updates == STEPS
        for site, seen in rank.sites.items():
            factor = 2 if site.endswith("grad_output") else 1
            single = truth.sites[site]
            np.testing.assert_allclose(
                seen.history / factor, single.history, rtol=1e-6, atol=0, err_msg=site
            )
            np.testing.assert_allclose(
                seen.scale * factor, single.scale, rtol=1e-6, atol=0, err_msg=site
            )
        for parameter, weight in rank.weights.items():
            np.testing.assert_allclose(
                weight, truth.weights[parameter], rtol=0, atol=1e-5, err_msg=parameter
            )
    losses = [rank.losses for rank in ranks if rank.losses]
    np.testing.assert_allclose(np.mean(losses, axis=0), truth.losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("odd", ["microbatches", "step"])
def test_nobody_waits_where_one_rank_has_more_microbatches(odd: str):
    case = Case(schedule="1F1B", recipe=delayed, copies="group", odd=odd)
    ranks = run_ranks(4, on_rank, case, patience_s=60)
    for one, other in (ranks[:2], ranks[2:]):
        assert one.updates == other.updates == STEPS
        for site, seen in one.sites.items():
            np.testing.assert_array_equal(seen.history, other.sites[site].history)
            np.testing.assert_array_equal(seen.scale, other.sites[site].scale)
    extra = STEPS * MICROBATCHES if odd == "microbatches" else MICROBATCHES
    assert len(ranks[3].losses) == len(ranks[2].losses) + extra
