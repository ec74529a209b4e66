"""The same sum in another order has other bits: bias, batch size, ranks, micro-batches."""

import torch

from unclamp.traps.trap import Between, Documented, Trap


def normal(*shape, seed, device):
    """Return normal numbers that are the same on every device."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=seeded).to(device)


def addmm_rounds_once(device):
    """Compare `addmm` with a matmul and a sum, in bfloat16."""
    x, w, bias = normal(3, 256, 256, seed=0, device=device).bfloat16()
    differ = torch.addmm(bias, x, w) != x @ w + bias
    return {"elements that differ": differ.float().mean().item()}


def first_row(device):
    """Multiply the first row alone, and with 255 others."""
    a = normal(256, 1024, seed=0, device=device)
    b = normal(1024, 256, seed=1, device=device)
    differ = a[:1] @ b != (a @ b)[:1]
    return {"elements that differ": differ.float().mean().item()}


def two_halves_of_k(device):
    """Sum two halves of K, as two tensor-parallel ranks do."""
    facts = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = normal(256, 1024, seed=0, device=device).to(dtype)
        b = normal(1024, 256, seed=1, device=device).to(dtype)
        halves = a[:, :512] @ b[:512] + a[:, 512:] @ b[512:]
        facts[f"{dtype}: differ"] = (halves != a @ b).float().mean().item()
    return facts


def four_micro_batches(device):
    """Take the gradient of a weight of a batch, and of its four parts."""
    x, dy = normal(2, 256, 64, seed=0, device=device)
    added = torch.zeros(64, 64, device=device)
    for at in range(0, 256, 64):
        added += dy[at : at + 64].t() @ x[at : at + 64]
    differ = added != dy.t() @ x
    return {"elements that differ": differ.float().mean().item()}


_SOME = {"elements that differ": Between(low=0.05, high=1.0)}

TRAPS = (
    Trap(
        name="addmm",
        belief="`addmm` is a matmul and a sum.",
        truth="It adds the bias before it rounds to bfloat16: about 28 % of the elements differ.",
        experiment=addmm_rounds_once,
        devices=("cpu", "cuda"),
        documented=(Documented(expected={"elements that differ": Between(low=0.15, high=0.4)}),),
        cost="A layer written as `x @ w + b` is no bit-exact reference for `nn.Linear`.",
        remedy="Products add the bias in float32 and round once; with casts off a layer is "
        "`nn.Linear`, bit for bit.",
        see="docs/scaling.md",
    ),
    Trap(
        name="first-row",
        belief="A row of a matmul does not depend on the other rows.",
        truth="Another shape may take another kernel, which adds in another order: nearly every "
        "float32 element of a row changes when it is multiplied alone.",
        experiment=first_row,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected=_SOME, source="the share is that of MKL's kernels; others have their own"
            ),
        ),
        cost="Batch size changes bits: generation one token at a time is not the training "
        "forward, and a last odd batch is not its part of a full one.",
        remedy="Comparisons are made at equal shapes; replays repeat the very batches.",
        see="docs/explain.md",
    ),
    Trap(
        name="tensor-parallel-sum",
        belief="Tensor parallelism computes the same numbers.",
        truth="A sum over K in two halves is another sum: most float32 elements and a third of "
        "the bfloat16 ones change.",
        experiment=two_halves_of_k,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected={
                    "torch.float32: differ": Between(low=0.05, high=1.0),
                    "torch.bfloat16: differ": Between(low=0.1, high=0.7),
                }
            ),
        ),
        cost="Losses of two layouts part after some hundred steps without any fault.",
        remedy="Scales are made of maxima, which have no order: they are equal on any layout, "
        "and the tests hold them to the bit.",
        see="docs/distributed.md",
    ),
    Trap(
        name="micro-batches",
        belief="Four micro-batches give the gradient of their batch.",
        truth="They give its value to rounding, in other bits: four fifths of the elements of a "
        "weight's gradient differ.",
        experiment=four_micro_batches,
        devices=("cpu", "cuda"),
        documented=(Documented(expected=_SOME),),
        cost="Accumulation is not bit-reproducible against a larger batch.",
        remedy="Histories and counts are merged over the micro-batches of a step: there is one "
        "update for each, and replays keep the cut.",
        see="docs/training.md",
    ),
)
