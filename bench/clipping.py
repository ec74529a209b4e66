"""Does clamping of gradients act as gradient clipping does, where the learning rate is too high?

    .venv/bin/python -m bench.clipping results.jsonl [--seeds 200 201] [--arms hp delayed]

From scratch on the study's text, without gradient clipping but in arm `hp-clip`. The arms tell the
explanations apart: with only the gradients in FP8, delayed scaling clamps them and guarded scaling
does not, and all else is equal. Results are kept a line a run; a run that is there is not repeated.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import unclamp
from unclamp import Delayed, Guarded, HighPrecision, Recipe
from unclamp.analysis import find_spikes
from unclamp.analysis.paired import paired_difference
from unclamp.nn import find_ledgers
from unclamp.nn.update import Update
from unclamp.numerics import Stat
from unclamp.report.words import difference_cell
from unclamp.study.config import ModelConfig
from unclamp.study.data import Batches, read_text
from unclamp.study.models import build_model

SEEDS = tuple(range(200, 206))
LR, STEPS, LAST = 2e-2, 240, 40
HIGH = HighPrecision()
ARMS: dict[str, Recipe | None] = {
    "hp": None,
    "hp-clip": None,
    "delayed": Recipe.uniform(Delayed()),
    "delayed-gradients": Recipe(input=HIGH, weight=HIGH, grad_output=Delayed()),
    "guarded-gradients": Recipe(input=HIGH, weight=HIGH, grad_output=Guarded()),
}


def trained(arm: str, seed: int, *, lr: float = LR, steps: int = STEPS) -> dict[str, float | int]:
    """Train a run; return its final loss, spikes, and the share of gradient casts that clamped."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(layers=2))
    recipe = ARMS[arm]
    casts = clamped = 0
    if recipe is not None:
        unclamp.convert(model, recipe, skip=("lm_head",))
        (ledger,) = find_ledgers(model)
        rows = [site.name.role == "grad_output" for site in ledger.sites]

        def count(update: Update) -> None:
            nonlocal casts, clamped
            casts += len(update.stats[rows])
            clamped += int((update.stats[rows][:, Stat.SATURATED] > 0).sum())

        ledger.subscribe(count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = np.frombuffer(read_text((), seq_len=128), dtype=np.uint8)
    batches = Batches(tokens, batch_size=4, seq_len=128, seed=seed)
    losses, norms = [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 10)
        tokens_, labels = batches.batch(step)
        loss = model(input_ids=tokens_, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        most = 1.0 if arm == "hp-clip" else float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), most).item())
        optimizer.step()
        losses.append(loss.item())
    return {
        "loss": statistics.fmean(losses[-LAST:]),
        "loss_spikes": len(find_spikes(losses)),
        "norm_spikes": len(find_spikes(norms)),
        "clamped": clamped / max(casts, 1),
    }


def main(path: Path, seeds: Sequence[int], arms: Sequence[str], lr: float) -> None:
    """Train what is missing, and print the table."""
    torch.set_num_threads(1)
    lines = path.read_text().splitlines() if path.exists() else []
    found = {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}
    for seed in seeds:
        for arm in arms:
            if (arm, seed) not in found:
                row = {"arm": arm, "seed": seed, **trained(arm, seed, lr=lr)}
                found[arm, seed] = row
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print("| arm | final loss | minus hp | spikes of loss | of gradient norm | clamped |")
    print("|---|---|---|---|---|---|")
    for arm in arms:
        own = [found[arm, seed] for seed in seeds]
        gap = paired_difference(
            [row["loss"] for row in own], [found["hp", seed]["loss"] for seed in seeds]
        )
        cells = [
            f"{statistics.fmean(row['loss'] for row in own):.3f}",
            "-" if arm == "hp" else difference_cell(gap, len(ARMS) - 1),
            str(sum(row["loss_spikes"] for row in own)),
            str(sum(row["norm_spikes"] for row in own)),
            f"{100 * statistics.fmean(row['clamped'] for row in own):.1f} %",
        ]
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.clipping", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--lr", type=float, default=LR)
    arguments = parser.parse_args()
    main(arguments.results, arguments.seeds, arguments.arms, arguments.lr)
