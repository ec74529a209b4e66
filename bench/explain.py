"""Spikes with planted causes: is the planted set the one that is named, and what does it cost?

The truth is found without a replay: each case is trained from its start with every subset of the
planted sites un-clamped by the recipe. The true set is the smallest that removes 90 % of what the
planted sites cause together. `python -m bench.explain` runs all cases, and with `--only delayed`
those with that in their name; `--table underflow`, `nulls`, `families` or `chaos` runs cases that
the others have not.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import unclamp
from bench.chaos import chaos
from bench.nulls import families, nulls
from bench.timing import compare
from bench.underflow import underflow
from truths.delays import RATES, DelayCase, Through
from truths.llamas import LlamaCase
from truths.trainings import Case, losses_with
from unclamp.analysis.explanation import NOT_CLAMPING
from unclamp.explain import Explanation, Limits, Snapshots, explain_spike
from unclamp.explain.watch import LEVEL_POINTS
from unclamp.names import SiteName
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.data import Batches, read_text
from unclamp.study.loop import build, do_step, tokenize

ENOUGH = 0.9
AnyCase = Case | LlamaCase | DelayCase
OTHER_TABLES = {"underflow": underflow, "nulls": nulls, "families": families, "chaos": chaos}
HARMLESS = ((0.0,), (0.0,))
"""Paths whose outlier meets a column of zeros."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case, its truth, and what was found."""

    kind: str
    case: AnyCase
    truth: list[SiteName]
    shares: dict[str, float]
    found: Explanation
    seconds: float
    step_s: float

    @property
    def is_right(self) -> bool:
        """Whether the named set is the planted one; of other causes, whether clamping is blamed."""
        if self.case.other:
            return self.found.verdict == "not clamping"
        return set(self.found.named) == set(self.truth)

    @property
    def share_error(self) -> float:
        """Largest difference of a planted site's share from the brute-force Shapley value."""
        found = {site.name: site.share for site in self.found.sites}
        errors = [abs(found.get(name, 0.0) - share) for name, share in self.shares.items()]
        return max(errors, default=0.0)


def cases() -> dict[str, list[AnyCase]]:
    """Return all cases by kind."""
    short = unclamp.Delayed(history_len=4)
    wide = unclamp.Delayed(margin=1)
    return {
        "MLP, one site": [
            Case(seed=1),
            Case(seed=2, decoys=3),
            Case(seed=3, size=128.0),
            Case(seed=4, size=40.0, decoys=2),
            Case(seed=5, scaling=short),
            Case(seed=6, scaling=wide, size=128.0),
            Case(seed=7, dropout=0.1),
            Case(seed=8, decoys=6),
            Case(seed=9, paths=((2.0,),)),
            Case(seed=10, scaling=unclamp.Static(scale=20.0)),
        ],
        "MLP, two in series": [
            Case(seed=11, paths=((1.0, 1.0),)),
            Case(seed=12, paths=((3.0, 1.0),)),
            Case(seed=13, paths=((0.5, 1.0),), size=96.0),
            Case(seed=14, paths=((2.0, 0.7),), decoys=2),
            Case(seed=15, paths=((1.0, 1.0),), scaling=short),
            Case(seed=16, paths=((1.0, 2.0),), decoys=3),
            Case(seed=17, paths=((1.0, 1.0),), dropout=0.1),
            Case(seed=18, paths=((4.0, 0.5),)),
        ],
        "MLP, three in series": [
            Case(seed=19, paths=((1.0, 1.0, 1.0),)),
            Case(seed=20, paths=((3.0, 1.0, 0.5),)),
            Case(seed=21, paths=((2.0, 2.0, 1.0),), decoys=2),
            Case(seed=22, paths=((1.0, 1.0, 1.0),), size=128.0),
        ],
        "MLP, two in parallel": [
            Case(seed=23, paths=((1.0,), (1.0,))),
            Case(seed=24, paths=((1.0,), (1.0,)), parts=(1.0, 0.7)),
            Case(seed=25, paths=((1.0,), (1.0,)), parts=(1.0, 0.5), size=128.0),
            Case(seed=26, paths=((1.0,), (2.0,)), parts=(1.0, 0.4)),
            Case(seed=27, paths=((1.0,), (1.0,)), decoys=3),
            Case(seed=28, paths=((1.0,), (1.0,)), scaling=short),
            Case(seed=29, paths=((1.0,), (1.0,)), parts=(1.0, 0.15)),
            Case(seed=30, paths=((1.0,), (1.0,)), dropout=0.1),
        ],
        "MLP, three in parallel": [
            Case(seed=31, paths=((1.0,), (1.0,), (1.0,))),
            Case(seed=32, paths=((1.0,), (1.0,), (1.0,)), parts=(1.0, 0.8, 0.6)),
            Case(seed=33, paths=((1.0,), (1.0,), (1.0,)), decoys=3, size=128.0),
        ],
        "MLP, series and parallel": [
            Case(seed=34, paths=((1.0, 1.0), (1.0,))),
            Case(seed=35, paths=((3.0, 1.0), (2.0,))),
            Case(seed=36, paths=((1.0, 1.0), (1.0,)), decoys=3),
        ],
        "Llama, one site": [
            *(LlamaCase(seed=seed) for seed in range(3)),
            LlamaCase(seed=3, scaling=short),
            LlamaCase(layout="first", seed=4),
            LlamaCase(layout="first", seed=5),
        ],
        "Llama, two in parallel": [LlamaCase(layout="parallel", seed=s) for s in range(6, 10)],
        "Llama, two in series": [LlamaCase(layout="series", seed=s) for s in range(10, 14)],
        "other cause: bad batch": [
            *(Case(other="bad batch", seed=s, decoys=3, paths=HARMLESS) for s in range(40, 44)),
            *(LlamaCase(layout="decoys", other="bad batch", seed=s) for s in range(44, 47)),
        ],
        "other cause: learning rate": [
            *(Case(other="learning rate", seed=s, decoys=3, paths=HARMLESS) for s in range(47, 51)),
            *(LlamaCase(layout="decoys", other="learning rate", seed=s) for s in (51, 53, 54)),
        ],
        "delayed, through a gradient": list(_delayed("grad_output", seed=100)),
        "delayed, through a weight": list(_delayed("weight", seed=110)),
        "delayed, through the optimizer": list(_delayed("optimizer", seed=120)),
        "other cause, harm that is not read": [
            DelayCase(through="grad_output", delay=8, other="bad batch", seed=130),
            DelayCase(through="grad_output", delay=16, other="learning rate", seed=131),
            DelayCase(through="weight", delay=4, other="bad batch", seed=132),
            DelayCase(through="weight", delay=12, other="learning rate", seed=133),
            DelayCase(through="optimizer", delay=8, other="bad batch", seed=134),
            DelayCase(through="optimizer", delay=16, other="learning rate", seed=135),
        ],
        "other cause, early clamps in a decoy": [
            DelayCase(through="grad_output", delay=12, other="bad batch", harmed="decoy", seed=140),
            DelayCase(through="weight", delay=8, other="learning rate", harmed="decoy", seed=141),
            DelayCase(through="optimizer", delay=6, other="bad batch", harmed="decoy", seed=142),
        ],
    }


def _delayed(through: Through, *, seed: int) -> Iterator[DelayCase]:
    for n, delay in enumerate(RATES[through]):
        yield DelayCase(through=through, delay=delay, seed=seed + n)


def run_case(kind: str, case: AnyCase, folder: Path, *, limits: Limits | None = None) -> Result:
    """Train, find the truth, explain."""
    run = folder / f"{kind}-{case.seed}".replace(" ", "-").replace(",", "").replace(":", "")
    losses, step_s = _record(case, run)
    truth, shares = _truth(case, losses)
    began = time.perf_counter()
    found = explain_spike(run, build=partial(case.build), step=case.step, limits=limits or Limits())
    seconds = time.perf_counter() - began
    return Result(
        kind=kind,
        case=case,
        truth=truth,
        shares=shares,
        found=found,
        seconds=seconds,
        step_s=step_s,
    )


def _record(case: AnyCase, run: Path) -> tuple[list[float], float]:
    training = case.build()
    losses: list[float] = []
    seconds: list[float] = []
    with (
        unclamp.Recorder(training.model, run) as recorder,
        Snapshots(
            training,
            run,
            build=partial(case.build),
            step=case.step,
            every=4,
            keep=6,
            after=3,
            recorder=recorder,
        ) as snapshots,
    ):
        for n, batch in snapshots.follow(case.batches()):
            began = time.perf_counter()
            loss = case.step(training, batch)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
            recorder.step(n, loss=loss)
            snapshots.after(n, loss)
    return losses, sorted(seconds)[len(seconds) // 2]


def _truth(case: AnyCase, losses: Sequence[float]) -> tuple[list[SiteName], dict[str, float]]:
    """Return the smallest set of planted sites, and their Shapley values, by training anew."""
    at = case.spike
    sites = case.involved if isinstance(case, DelayCase) else case.culprits
    level = statistics.median(losses[at - LEVEL_POINTS : at])
    if isinstance(case, DelayCase) and case.other:
        free = losses_with(case, case.suspects)[at]
        harmed = (losses[at] - free) / (losses[at] - min(level, free))
        if harmed >= NOT_CLAMPING:
            raise ValueError(f"{case} is planted wrongly: by training anew it is the clamp's harm")
    if case.other or not sites:
        return [], {}
    with_free = {
        members: losses_with(case, list(members))[at]
        for size in range(len(sites) + 1)
        for members in itertools.combinations(sites, size)
    }
    rise = losses[at] - min(level, with_free[tuple(sites)])
    removed = {members: (losses[at] - loss) / rise for members, loss in with_free.items()}
    target = ENOUGH * min(1.0, removed[tuple(sites)])
    enough = [m for m in removed if removed[m] >= target]
    best = min(enough, key=lambda m: (len(m), -removed[m]))
    shares = {}
    orders = list(itertools.permutations(sites))
    for site in sites:
        gains = []
        for order in orders:
            before = order[: order.index(site)]
            key = tuple(s for s in sites if s in before)
            after = tuple(s for s in sites if s in before or s == site)
            gains.append(removed[after] - removed[key])
        shares[str(site)] = sum(gains) / len(gains)
    return list(best), shares


def measure(folder: Path | None = None, *, only: str = "") -> list[Result]:
    """Run every case with a text in its kind and print the tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for kind, members in cases().items():
                for case in members if only in kind else ():
                    result = run_case(kind, case, folder or Path(scratch))
                    results.append(result)
                    print(_line(result), flush=True)
    finally:
        torch.set_num_threads(threads)
    print_table(results)
    return results


def growth() -> None:
    """Print how the cost grows with the number of sites that clamp, and with the budget."""
    print("\n| sites | sites that clamp | budget | replays | named rightly |")
    print("|---|---|---|---|---|")
    for decoys, budget in ((1, 100), (8, 100), (32, 100), (64, 100), (64, 20)):
        loud = ((2 + decoys) / 3) ** 0.5
        case = Case(seed=60, paths=((1.0,), (1.0,)), decoys=decoys, parts=(loud, loud))
        with tempfile.TemporaryDirectory() as scratch:
            result = run_case("growth", case, Path(scratch), limits=Limits(replays=budget))
        sites = 6 * (2 + decoys)
        print(
            f"| {sites} | {result.found.clamped_sites} | {budget} | {result.found.replays} | "
            f"{result.is_right} |",
            flush=True,
        )


def snapshot_cost() -> None:
    """Print what taking snapshots costs a step of the study's model."""
    config = StudyConfig.from_toml(default_toml())
    recipe = unclamp.Recipe()
    arguments = {
        "config": config.to_dict(), "scenario": "text", "seed": 0, "recipe": recipe.to_dict()
    }  # fmt: skip
    training = build(**arguments)
    shape = {"batch_size": config.data.batch_size, "seq_len": config.data.seq_len}
    tokens = tokenize(config.model, training.model, read_text((), seq_len=config.data.seq_len))
    batch = Batches(tokens, **shape, seed=0).batch(0)
    with tempfile.TemporaryDirectory() as scratch:
        snapshots = Snapshots(training, scratch, build=build, step=do_step, arguments=arguments)
        count = itertools.count()

        def plain() -> None:
            do_step(training, batch)

        def taken() -> None:
            n = next(count)
            snapshots.before(n, batch)
            snapshots.after(n, do_step(training, batch))

        def ten(run: Callable[[], None]) -> Callable[[], None]:
            def runs() -> None:
                for _ in range(10):
                    run()

            return runs

        compare(
            "ten steps of the study's model, one snapshot",
            {"plain": ten(plain), "with snapshots": ten(taken)},
            rounds=9,
        )


def _line(result: Result) -> str:
    found = result.found
    named = ", ".join(str(site) for site in found.named) or "-"
    mark = "ok  " if result.is_right else "MISS"
    return (
        f"{mark} {result.kind}, seed {result.case.seed}: {found.stated}, "
        f"{100 * (found.clamping_share or 0):.0f} %, height {found.height:.2f}, named {named}, "
        f"truth {[str(site) for site in result.truth]}, share error {result.share_error:.3f}, "
        f"{found.replays} replays, {result.seconds:.1f} s, reproduced {found.reproduced}"
    )


def print_table(results: Sequence[Result]) -> None:
    """Print a row a kind, as docs/explain.md has them."""
    print("\n| planted | cases | right | clamped sites | replays | steps' time | share error |")
    print("|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(result.kind for result in results):
        mine = [result for result in results if result.kind == kind]
        clamped = [result.found.clamped_sites for result in mine]
        replays = [result.found.replays for result in mine]
        steps = sum(result.seconds / result.step_s for result in mine) / len(mine)
        print(
            f"| {kind} | {len(mine)} | {sum(r.is_right for r in mine)} | {min(clamped)} to "
            f"{max(clamped)} | {min(replays)} to {max(replays)} | {steps:.0f} | "
            f"{max(r.share_error for r in mine):.3f} |"
        )
    causes = [r for r in results if not r.case.other]
    others = [r for r in results if r.case.other]
    print(
        f"\nplanted sets named: {sum(r.is_right for r in causes)} of {len(causes)}; "
        f"other causes blamed on clamping: {sum(not r.is_right for r in others)} of {len(others)}"
    )


def to_dict(results: Sequence[Result]) -> dict[str, Any]:
    """Return the figures for bench/results.json."""
    return {
        kind: {
            "cases": len(mine),
            "right": sum(r.is_right for r in mine),
            "replays": sum(r.found.replays for r in mine) / len(mine),
        }
        for kind in dict.fromkeys(r.kind for r in results)
        for mine in [[r for r in results if r.kind == kind]]
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.explain", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where the runs stay")
    parser.add_argument("--only", default="", help="only cases with this text in their kind")
    parser.add_argument(
        "--table", choices=OTHER_TABLES, help="cases that the others have not, in place of them"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        OTHER_TABLES[options.table]()
        sys.exit()
    if not options.only:
        snapshot_cost()
        growth()
    done = measure(options.folder, only=options.only)
    print(json.dumps(to_dict(done)))
