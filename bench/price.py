"""Is the price of a cast what the cast costs? Prices against true replays of planted cases.

A training goes on to the step at which something is planted. There each cast tells its price; then
the step is done again for each input and weight that clamped, with it alone un-clamped, and the
difference of the losses is what its clamping cost. Nothing else differs between the two: the step
is the first after the snapshot. For rounding, each cast in turn is left out. The tables are those
of docs/price.md; `python -m bench.price --quick` takes a case of each kind.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr

import unclamp
from bench.explain import cases
from truths.delays import DelayCase
from truths.llamas import LlamaCase
from truths.trainings import SPIKE, Case
from unclamp.explain import Training
from unclamp.explain.facts import model_facts
from unclamp.explain.replay import Replay, Trace
from unclamp.explain.screening import free_gradients
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.training import Batch, take_state
from unclamp.names import SiteName
from unclamp.nn import find_ledgers
from unclamp.nn.update import Update
from unclamp.numerics.inspection import CLAMP_PRICE, PRICES, ROUNDING_PRICE, ROUNDINGS
from unclamp.policy import unclamped
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.data import Batches, read_text
from unclamp.study.loop import build, do_step, tokenize
from unclamp.study.outlier import plant_batch
from unclamp.study.planting import planting_of

LEAST = 0.01
"""Sites that cost less than this share of what all clamping of the case costs are in no ratio."""
OTHERS = ("other cause: bad batch", "other cause: learning rate")
SIZES = (16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0)
OUTLIER_STEPS = (40, 80)
"""The first planted step of the study's scenario, and one after it learnt from the others."""


@dataclass(frozen=True, kw_only=True)
class Priced:
    """One cast that was done with and without.

    Attributes:
        site: Whose.
        price: As the run's log would tell it.
        free: The same with no gradient clamped.
        cost: The loss with the cast less the loss without.
        clamp_error: Of the cast.
        overshoot: Likewise.
    """

    site: SiteName
    price: float
    free: float
    cost: float
    clamp_error: float = 0.0
    overshoot: float = 0.0


class Heard:
    """Prices that casts tell while a replay runs."""

    def __init__(self, model: torch.nn.Module, field: int) -> None:
        self.prices: dict[SiteName, float] = {}
        self._ledgers, self._field = find_ledgers(model), field

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hear in this context."""
        ends = []
        for ledger in self._ledgers:
            ledger.inspect("priced", by=self)
            ends.append(ledger.subscribe(partial(self._hear, ledger)))
        yield
        for end in ends:
            end()
        for ledger in self._ledgers:
            ledger.inspect("never", by=self)

    def _hear(self, ledger: Any, update: Update) -> None:
        assert update.details is not None
        for site, row in zip(ledger.sites, update.details.tolist(), strict=True):
            if row[PRICES]:
                name = SiteName(site.fqn, site.role)
                is_known = self._field == CLAMP_PRICE or row[ROUNDINGS] == row[PRICES]
                price = row[self._field] if is_known else math.nan
                self.prices[name] = self.prices.get(name, 0.0) + price


def prepared(training: Training, build: Any, step: Any, batches: Iterable[Any], at: int) -> Replay:
    """Train to a step, and return what does it again."""
    for n, batch in enumerate(batches):
        if n == at:
            snapshot = Snapshot(
                step=at, state=take_state(training), batches={at: Batch.of(batch)},
                facts=model_facts(training.model),
            )  # fmt: skip
            return Replay(build(), step, snapshot)
        step(training, batch)
    raise ValueError(f"expected {at + 1} batches or more")


def loss_at(replay: Replay, trace: Trace) -> float:
    """Return the loss of the step that is done again."""
    return trace.losses[replay.snapshot.step]


def heard(replay: Replay, changes: Mapping[SiteName, Any], field: int) -> tuple[Trace, Heard]:
    """Do the step once, and hear what its casts cost."""
    ears = Heard(replay.training.model, field)
    return replay.run(changes, last=replay.snapshot.step, watching=ears.watching), ears


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was done again and again.

    Attributes:
        casts: Its clamped inputs and weights, each with the others as they were.
        whole: What they cost together: the loss less that with all of them un-clamped.
    """

    casts: list[Priced]
    whole: float


def clamp_costs(replay: Replay) -> Step:
    """Return the price and the cost of each clamped input and weight."""
    at = replay.snapshot.step
    actual, told = heard(replay, {}, CLAMP_PRICE)
    _, freed = heard(replay, free_gradients(replay), CLAMP_PRICE)
    every = {site: free for site in replay.sites if (free := unclamped(replay.original(site)))}
    whole = loss_at(replay, actual) - loss_at(replay, replay.run(every, last=at))
    made = []
    for site, count in actual.sites.items():
        scaling = unclamped(replay.original(site))
        if site.role == "grad_output" or not count.saturated or scaling is None:
            continue
        cost = loss_at(replay, actual) - loss_at(replay, replay.run({site: scaling}, last=at))
        made.append(
            Priced(
                site=site,
                price=told.prices[site],
                free=freed.prices[site],
                cost=cost,
                clamp_error=count.clamp_error,
                overshoot=count.overshoot,
            )
        )
    return Step(casts=made, whole=whole)


def rounding_costs(replay: Replay) -> list[Priced]:
    """Return the price of rounding, and what leaving each cast out saves, where none clamps."""
    at = replay.snapshot.step
    own = {site: unclamp.Dynamic() for site in replay.sites}
    actual, told = heard(replay, own, ROUNDING_PRICE)
    made = []
    for site, price in told.prices.items():
        if not math.isfinite(price):
            continue
        without = replay.run({**own, site: unclamp.HighPrecision()}, last=at)
        cost = loss_at(replay, actual) - loss_at(replay, without)
        made.append(Priced(site=site, price=price, free=price, cost=cost))
    return made


# ---- what is measured --------------------------------------------------------------------------


def of_case(case: Any) -> Replay:
    """Return the step of a planted case at which its outlier comes."""
    return prepared(case.build(), case.build, case.step, case.batches(), case.spike)


def of_outlier(seed: int, at: int) -> Replay:
    """Return a planted step of the study's scenario with delayed scaling."""
    config = StudyConfig.from_toml(default_toml())
    arguments: dict[str, Any] = {
        "config": config.to_dict(), "scenario": "outlier", "seed": seed,
        "recipe": unclamp.Recipe().to_dict(),
    }  # fmt: skip
    make = partial(build, **arguments)
    training = make()
    text = read_text((), seq_len=config.data.seq_len)
    shape = {"batch_size": config.data.batch_size, "seq_len": config.data.seq_len}
    batches = Batches(tokenize(config.model, training.model, text), **shape, seed=seed)
    steps = config.marked_steps("outlier")

    def planted() -> Iterator[Any]:
        for n in range(at + 2):
            batch = batches.batch(n)
            if n in steps:
                pairs = planting_of(training.model).pairs(steps.index(n))
                share = config.outlier.share
                batch = plant_batch(batch, seed=seed, step=n, share=share, pairs=pairs)
            yield batch

    return prepared(training, make, do_step, planted(), at)


def families(*, quick: bool) -> dict[str, list[Any]]:
    """Return the planted cases whose harm shows in the step that clamps, by kind."""
    return {
        kind: members[:1] if quick else members
        for kind, members in cases().items()
        if not any(isinstance(case, DelayCase) for case in members) and kind not in OTHERS
    }


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the rank correlation; None where there is none of so few, or of equal ones."""
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def row(name: str, steps: Sequence[Step]) -> str:
    """Return a row of the table, of cases with several casts each."""
    groups = [step.casts for step in steps]
    everyone = [one for group in groups for one in group]
    ratios, by_free, sums = [], [], []
    for group, step in zip(groups, steps, strict=True):
        told = [one for one in group if abs(one.cost) >= LEAST * abs(step.whole) > 0]
        sums += [sum(one.free for one in group) / step.whole] if step.whole else []
        ratios += [one.price / one.cost for one in told]
        by_free += [one.free / one.cost for one in told]

    def named(by: str) -> str:
        right = [_worst(g, by) == _worst(g, "cost") for g in groups if g]
        return f"{sum(right)} of {len(right)}"

    def ranks(by: str) -> str:
        return _two(correlation([getattr(p, by) for p in everyone], [p.cost for p in everyone]))

    ways = ("free", "price", "clamp_error")
    cells = [
        name, str(len(groups)), str(len(everyone)), *(ranks(by) for by in ways),
        *(named(by) for by in ways), _spread(by_free), _spread(ratios), _spread(sums),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _worst(group: Sequence[Priced], by: str) -> SiteName:
    return max(group, key=lambda one: getattr(one, by)).site


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    low, high = min(ratios), max(ratios)
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def print_families(*, quick: bool) -> None:
    """Print how well prices of clamping tell what it cost, by kind of planted case."""
    print("| planted | cases | clamped casts | rank correlation with the cost: price, gradients "
          "not clamped | price as logged | clamp error | costliest cast named: price, gradients "
          "not clamped | price as logged | clamp error | price over cost, gradients not clamped "
          "| price over cost, as logged | sum of prices over what all cost together |")  # fmt: skip
    print("|" + "---|" * 12)
    for kind, members in families(quick=quick).items():
        print(row(kind, [clamp_costs(of_case(case)) for case in members]), flush=True)
    for at in OUTLIER_STEPS[: 1 if quick else None]:
        groups = [clamp_costs(of_outlier(seed, at)) for seed in range(1 if quick else 3)]
        print(row(f"scenario `outlier`, step {at}", groups), flush=True)


def print_sizes(*, quick: bool) -> None:
    """Print where first order ends: one cast, clamped by more and more."""
    print("\n| overshoot, quadratic loss | price | cost | price over cost "
          "| overshoot, behind a norm | price | cost | price over cost |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for size in SIZES[::4] if quick else SIZES:
        cells = []
        for case in (Case(size=size, decoys=0), NormCase(size=size, decoys=0)):
            priced = clamp_costs(of_case(case)).casts
            site = case.culprits[0]
            one = next((p for p in priced if p.site == site), None)
            cells += (
                ["-"] * 4 if one is None else
                [f"{one.overshoot:.2f}x", f"{one.free:.3g}", f"{one.cost:.3g}",
                 f"{one.free / one.cost:.2f}"]
            )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


class Normed(torch.nn.Module):
    """A model whose outputs have their size taken from them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.paths = model.paths
        self._forward = model.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what it gives, each row with a root mean square of 1."""
        return torch.nn.functional.rms_norm(self._forward(x), (x.shape[-1],))


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """A planted case with a norm behind it: what is left of a clamped channel is its direction."""

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        """Return the training."""
        training = super().build(recipe)
        return Training(
            model=Normed(training.model), optimizer=training.optimizer,
            scheduler=training.scheduler,
        )  # fmt: skip

    def batches(self) -> Iterator[Any]:
        """Yield batches with the targets behind the same norm."""
        for x, target, rate in super().batches():
            yield x, torch.nn.functional.rms_norm(target, (target.shape[-1],)), rate


def print_rounding(*, quick: bool) -> None:
    """Print how well prices of rounding tell what it costs, where nothing clamps."""
    print("\n| rounding, dynamic scaling | casts | rank correlation | same sign "
          "| sum of prices | what all cost together | price over cost, median |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for seed in range(1 if quick else 3):
        case = LlamaCase(seed=seed)
        replay = prepared(case.build(), case.build, case.step, case.batches(), SPIKE - 4)
        priced = rounding_costs(replay)
        at = replay.snapshot.step
        own = {site: unclamp.Dynamic() for site in replay.sites}
        plain = dict.fromkeys(replay.sites, unclamp.HighPrecision())
        whole = loss_at(replay, replay.run(own, last=at)) - loss_at(
            replay, replay.run(plain, last=at)
        )
        prices, costs = [p.price for p in priced], [p.cost for p in priced]
        same = sum(p.price * p.cost > 0 for p in priced)
        ratios = [p.price / p.cost for p in priced if p.cost]
        print(
            f"| a small Llama, seed {seed} | {len(priced)} | {_two(correlation(prices, costs))} | "
            f"{same} of {len(priced)} | {sum(prices):.2e} | {whole:.2e} | "
            f"{statistics.median(ratios):.2f} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.price", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case of each kind")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    began = time.perf_counter()
    for table in (print_families, print_sizes, print_rounding):
        table(quick=quick)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
