"""Do many processes have the numbers of one? Scales, histories, codes and losses, side by side.

Each way to train on several ranks makes the same steps as one process that sees the whole batch,
with a model of 8,400 parameters, on CPU processes that meet through gloo. Each rank averages its
loss over its own part, as a user's loop does, so that its gradients are as many times larger as
there are parts: that factor, a power of two, is taken out. Where ranks cut the batch into
microbatches, the process that they are compared with does too. Run by itself,
`python -m bench.parallel`.
"""

import argparse
import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import unclamp
from bench.ways import HAS_HISTORY, SCALINGS, WAYS, Seen, Way, alone, on_rank


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far ranks are from the single process: relative, the largest of all casts and steps.

    Attributes:
        codes: Share of elements whose code differs, at least: distributions of codes are compared.
    """

    scales: float
    histories: float
    codes: float
    losses: float


def difference(ranks: list[Seen], single: Seen, parts: int) -> Difference:
    """Compare what ranks saw with what a process alone saw."""
    scales = histories = 0.0
    for seen in ranks:
        for site, made in seen.scales.items():
            factor = parts if site[1] == "grad_output" else 1
            scales = max(scales, _apart([s * factor for s in made], single.scales[site]))
            for ours, theirs in zip(seen.histories[site], single.histories[site], strict=True):
                histories = max(histories, _apart([h / factor for h in ours], theirs))
    losses = [seen.losses for seen in ranks if seen.losses]
    mean = [math.fsum(each) / len(each) for each in zip(*losses, strict=True)]
    return Difference(
        scales=scales,
        histories=histories,
        codes=_codes_apart(ranks, single),
        losses=_apart(mean, single.losses),
    )


def _apart(ours: list[float], theirs: list[float]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)


def _codes_apart(ranks: list[Seen], single: Seen) -> float:
    """Return the share of elements that would have to change for the distributions to be equal.

    Parts add up to the whole, and a tensor that n ranks have counts n times: so shares are taken.
    """
    moved = total = 0.0
    for site, casts in single.codes.items():
        holders = [seen.codes[site] for seen in ranks if site in seen.codes]
        for number, whole in enumerate(casts):
            together = torch.stack([each[number] for each in holders]).sum(0)
            if not whole.sum():  # an expert without tokens
                continue
            apart = (together / together.sum() - whole / whole.sum()).abs().sum() / 2
            moved, total = moved + float(apart * whole.sum()), total + float(whole.sum())
    return moved / total


# ---- processes and table -----------------------------------------------------------------------

Table = dict[str, dict[str, Difference]]


def _work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    found = {
        (name, column): on_rank(way, scaling)
        for name, way in WAYS.items()
        for column, scaling in columns(way).items()
        if way.ranks == ranks
    }
    torch.save(found, f"{folder}/{ranks}-{rank}")
    dist.barrier()
    dist.destroy_process_group()


def columns(way: Way) -> dict[str, unclamp.Scaling]:
    """Return what is measured: without agreement, only that of which there is one otherwise."""
    return {k: s for k, s in SCALINGS.items() if way.shares or k in HAS_HISTORY}


def measure() -> Table:
    """Train in each way, and compare with one process."""
    torch.set_num_threads(1)
    ranks: dict[tuple[str, str], list[Seen]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted({way.ranks for way in WAYS.values()}):
            mp.spawn(_work, args=(count, folder), nprocs=count)  # pyright: ignore[reportPrivateImportUsage]
            for rank in range(count):
                # Our own file, of plain values and the class above.
                for key, seen in torch.load(
                    Path(folder) / f"{count}-{rank}", weights_only=False
                ).items():
                    ranks[key].append(seen)
    return {
        name: {
            column: difference(ranks[name, column], alone(way, scaling), way.parts)
            for column, scaling in columns(way).items()
        }
        for name, way in WAYS.items()
    }


def table(found: Mapping[str, Mapping[str, Difference]]) -> str:
    """Return the table in Markdown."""
    lines = [f"| | {' | '.join(SCALINGS)} |", f"|---|{'---|' * len(SCALINGS)}"]
    for name, cells in found.items():
        shown = [_cell(cells[c], c) if c in cells else "" for c in SCALINGS]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(apart: Difference, column: str) -> str:
    histories = apart.histories if column in HAS_HISTORY else None
    figures = (apart.scales, histories, apart.codes, apart.losses)
    return ", ".join("-" if x is None else f"{x:.0e}" if x else "0" for x in figures)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__).parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of torch's own
    print("scales, histories, codes, losses: relative difference from one process\n")
    print(table(measure()))
