"""Compiles the CPU kernels of a study beside its first runs, which are in high precision.

Kernels are kept on disk, so this happens once a machine; the other workers load them. A worker
that needs one before it is there compiles it too, and both keep the same.
"""

from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from unclamp.nn import find_ledgers
from unclamp.study.loop import RunPlan, batches_of, build, do_step
from unclamp.study.worker import Speaker, speaking


def is_worthwhile(plans: Sequence[RunPlan]) -> bool:
    """Whether nothing needs a kernel at first, and something does later.

    A model of somebody's own is not made once more for this: it may be large.
    """
    return (
        bool(plans)
        and plans[0].recipe is None
        and any(plan.recipe is not None for plan in plans)
        and not plans[0].config.model.hf_model
    )


def compile_kernels(plans: Sequence[RunPlan], tell: Connection) -> None:
    """Do one step of each recipe, with a closer look at each cast; where kernels are kept, nothing.

    For a process of its own, forked from the one that `preload` is imported in.
    """
    from unclamp.study import preload  # noqa: PLC0415 - the fork has it; who asks for one does not

    if preload.is_loaded:
        return
    each = {str(plan.recipe): plan for plan in plans if plan.recipe is not None}
    # What is wrong the run of that recipe says.
    with speaking(Speaker(tell.send)), suppress(Exception):
        for plan in each.values():
            training = build(**plan.arguments)
            for ledger in find_ledgers(training.model):
                ledger.inspect("always")
            do_step(training, batches_of(plan.config, training.model, plan.seed).batch(0))
