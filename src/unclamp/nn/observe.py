"""What FP8 would do to a model, asked while it trains as it always did.

An observed model computes bit for bit what it computed before. Each linear layer also casts its
operands as a recipe says, counts what that loses, and drops the codes: the same histories, counts
and closer looks as FP8 training, a `Recorder` records them alike, but no loss is affected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from unclamp.errors import RecipeError, naming_arguments
from unclamp.names import Role, SiteName
from unclamp.nn.attach import ConvertReport, attach, find_ledgers, revert
from unclamp.nn.covering import Example, covering
from unclamp.nn.first import is_routed
from unclamp.nn.update import Update
from unclamp.numerics import Stat, empty_stats, merge_stats
from unclamp.numerics.inspection import CLAMP_PRICE, PRICES
from unclamp.recipe import Recipe
from unclamp.rule import as_scaling, check_scaling
from unclamp.scaling import Dynamic, Scaling
from unclamp.shown import Shown
from unclamp.totals import clamp_error, overshoot, share
from unclamp.written import counted, percent, times

SHOWN_SITES = 8
TOTALS = ("_total", "_clamped", "_overshoot", "_errors", "_idle", "_longest_idle", "_price",
          "_priced")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ObservedSite:
    """What the casts of one operand of one layer would have lost.

    Attributes:
        fqn: Dotted name of the layer.
        role: Which operand.
        casts: Casts counted: of a layer that is called several times a step, each of them.
        elements: Elements in all of them.
        saturated: Elements that would have been clamped.
        clamped_steps: Optimizer steps in which any would have been.
        underflowed: Non-zero elements that would have become zero.
        nonfinite: Inf and NaN elements.
        overshoot: Largest amax over the largest representable value.
        clamp_error: Share of the squares that clamping would have removed, mean over the steps in
            which it would have: the clamp error of a report.
        price: By how much clamping would have raised the loss, to first order and in units of the
            loss as backward saw it: the sum over the steps in which it was priced, as it is while
            a `Recorder` records. None without any; None for a gradient.
    """

    fqn: str
    role: Role
    casts: int
    elements: int
    saturated: int
    clamped_steps: int
    underflowed: int
    nonfinite: int
    overshoot: float
    clamp_error: float
    price: float | None = None


class Observation(Shown):
    """An observed model; made by `observe`. Ends with `stop`, or as a context manager.

    Attributes:
        report: The layers that are observed, and those left out and why; with an example also
            its `coverage`.
    """

    @torch.inference_mode(False)  # its totals are written in every step
    def __init__(self, model: nn.Module, report: ConvertReport) -> None:
        """Prefer `unclamp.observe`."""
        self.report = report
        self._model = model
        self._ledger = next(iter(find_ledgers(model)), None)
        rows = 0 if self._ledger is None else len(self._ledger.sites)
        self._total = empty_stats(rows)
        self._clamped = torch.zeros(rows, dtype=torch.int64)
        self._overshoot = torch.zeros(rows, dtype=torch.float64)
        self._errors = torch.zeros(rows, dtype=torch.float64)
        self._price = torch.zeros(rows, dtype=torch.float64)
        self._priced = torch.zeros(rows, dtype=torch.int64)
        self._idle = torch.zeros(rows, dtype=torch.int64)
        self._longest_idle = torch.zeros(rows, dtype=torch.int64)
        self._steps = 0
        self._end = None if self._ledger is None else self._ledger.subscribe(self._add)

    def sites(self) -> list[ObservedSite]:
        """Return what each site would have lost so far, the largest sum of clamp errors first."""
        if self._ledger is None:
            return []
        rows = zip(
            self._ledger.sites,
            self._total.cpu().tolist(),
            self._clamped.cpu().tolist(),
            self._overshoot.cpu().tolist(),
            self._errors.cpu().tolist(),
            self._price.cpu().tolist(),
            self._priced.cpu().tolist(),
            strict=True,
        )
        sites = [
            ObservedSite(
                fqn=site.fqn,
                role=site.role,
                casts=int(total[Stat.CASTS]),
                elements=int(total[Stat.ELEMENTS]),
                saturated=int(total[Stat.SATURATED]),
                clamped_steps=clamped,
                underflowed=int(total[Stat.UNDERFLOWED]),
                nonfinite=int(total[Stat.NONFINITE]),
                overshoot=overshoot(peak, site.operand.format.max),
                clamp_error=share(error, clamped),
                price=price if priced else None,
            )
            for site, total, clamped, peak, error, price, priced in rows
            if total[Stat.CASTS]
        ]
        return sorted(sites, key=lambda s: (-s.clamp_error * s.clamped_steps, s.fqn, s.role))

    def starved(self) -> dict[str, int]:
        """Return the experts that had no tokens for some steps: the most steps in a row of each.

        Experts are told by the name of a module, as in a run's page. Where that is more than the
        history of a scale looks back, the scale is of a time long past.
        """
        if self._ledger is None:
            return {}
        idle = self._longest_idle.tolist()
        sites = self._ledger.sites
        return {
            site.fqn: idle[index]
            for index, site in enumerate(sites)
            if site.role == "input" and idle[index] and is_routed(site.fqn)
        }

    def recipe(self, *, threshold: float = 1e-3, scaling: Scaling | str = Dynamic()) -> Recipe:
        """Return the recipe that was observed, with the sites that lost most scaled otherwise.

        Args:
            threshold: Sites whose clamp error so far is above it get the other scaling, from 0
                to 1.
            scaling: What they get, a scaling or its name.

        Returns:
            A recipe with an override for each layer that has such a site, the worst site's
            figures in its note. Products of attentions that no rule names stay as they are.

        Raises:
            RecipeError: `threshold` is not from 0 to 1, or `scaling` is none.

        Numerics: a site that clamped nothing has a clamp error of 0, and stays as it was.
        """
        if isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise RecipeError(f"expected a threshold from 0 to 1, got {threshold!r}")
        scaling = as_scaling(scaling)
        check_scaling("weight", scaling)  # which may have any: whether it fits depends on the site
        worst = [site for site in self.sites() if site.clamp_error > threshold]
        worst = [site for site in worst if site.fqn not in self.report.observed]
        notes: dict[str, str] = {}
        for site in worst:
            said = (
                f"{site.role}: clamp error {percent(site.clamp_error)}, "
                f"{counted(site.saturated, 'element')} "
                f"clamped in {site.clamped_steps} of {counted(self._steps, 'step')}, overshoot "
                f"{times(site.overshoot)}"
            )
            notes[site.fqn] = f"{notes[site.fqn]}; {said}" if site.fqn in notes else said
        notes = {fqn: f"observed under the recipe before: {said}" for fqn, said in notes.items()}
        recipe = Recipe() if self._ledger is None else self._ledger.recipe or Recipe()
        return recipe.at_sites(
            (SiteName(site.fqn, site.role) for site in worst), scaling, notes=notes
        )

    def stop(self) -> None:
        """Make the model the plain one that it was; later calls do nothing. Figures stay."""
        if self._end is not None:
            self._end()
            self._end = None
            revert(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __str__(self) -> str:
        sites = self.sites()
        clamped = [site for site in sites if site.saturated]
        elements = sum(site.elements for site in sites)
        lost = sum(site.underflowed for site in sites)
        lines = [
            f"observed {counted(len(self.report.converted), 'layer')} for "
            f"{counted(self._steps, 'step')}: FP8 would have clamped "
            f"{sum(s.saturated for s in sites):,} of {counted(elements, 'element')}, at "
            f"{len(clamped)} of {counted(len(sites), 'site')}, and lost "
            f"{percent(share(lost, elements))} to underflow"
        ]
        if self.report.coverage is not None:
            lines[0] += f"; {self.report.coverage.sentence()}"
        lines += [
            f"  {SiteName(site.fqn, site.role)}: {counted(site.saturated, 'element')} clamped in "
            f"{counted(site.clamped_steps, 'step')}, overshoot {times(site.overshoot)}, "
            f"clamp error {percent(site.clamp_error)}"
            + ("" if site.price is None else f", price {site.price:.3g} in all")
            for site in clamped[:SHOWN_SITES]
        ]
        starved = self.starved()
        worst = sorted(starved, key=lambda fqn: (-starved[fqn], fqn))[:SHOWN_SITES]
        lines += [
            f"  {fqn}: no tokens in {counted(starved[fqn], 'step')} in a row" for fqn in worst
        ]
        return "\n".join(lines)

    @torch.no_grad()
    def _add(self, update: Update) -> None:
        """Add a step, on the device."""
        stats = update.stats
        if self._total.device != stats.device:
            for name in TOTALS:
                setattr(self, name, getattr(self, name).to(stats.device))
        merge_stats(self._total, stats)
        clamped = stats[:, Stat.SATURATED] > 0
        self._clamped += clamped
        self._errors += torch.where(
            clamped, clamp_error(stats[:, Stat.SATURATED_SQUARE], stats[:, Stat.SQUARE]), 0
        )
        self._overshoot = torch.maximum(self._overshoot, _peak(stats))
        if update.details is not None:
            price = update.details[:, CLAMP_PRICE]
            is_known = (update.details[:, PRICES] > 0) & price.isfinite()
            self._price += torch.where(is_known, price, 0)
            self._priced += is_known
        self._idle = torch.where(stats[:, Stat.CASTS] > 0, 0, self._idle + 1)
        self._longest_idle = torch.maximum(self._longest_idle, self._idle)
        self._steps += 1


def _peak(stats: Tensor) -> Tensor:
    """Return the largest scaled element of each site; 0 where nothing was cast."""
    seen = stats[:, Stat.AMAX] > 0
    return torch.where(seen, stats[:, Stat.AMAX] / stats[:, Stat.SCALE_INV], 0)


@naming_arguments
def observe(
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    skip: Sequence[str] = (),
    example: Example | None = None,
) -> Observation:
    """Count what FP8 would lose in every linear layer of a model that goes on as it is.

    Losses, gradients, weights and the keys of its state_dict are those of the plain model, bit
    for bit. A step costs three casts a layer more. The products of attentions that no rule names
    are counted at the steps that a `Recorder` inspects, and every tenth without one.

    Args:
        model: A model that is not converted; it may itself be an `nn.Linear`.
        recipe: What each operand would get; by default delayed scaling everywhere.
        skip: Globs of modules to leave alone.
        example: A batch of the training, as `convert` takes it: the observation then says what
            share of a step's FLOPs it sees, and what it leaves out, in its print and its report.

    Where no layer is left to observe, it warns and says why.

    Returns:
        The observation: print it, ask it for `sites()`, end it with `stop()`. A `Recorder` made
        meanwhile records every cast.

    Raises:
        RecipeError: `recipe` is none.
        ConvertError: The model is converted or observed already, `skip` is a string, the
            layers lie on several devices, or the step with `example` cannot be run. The model is
            unchanged.

    Example:
        >>> import torch, unclamp
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> with unclamp.observe(model) as observation:
        ...     for size in (1.0, 1.0, 100.0):
        ...         model(torch.full((4, 8), size)).sum().backward()
        ...         optimizer.step()
        >>> print(observation)
        observed 1 layer for 3 steps: FP8 would have clamped 32 of 384 elements, at 1 of 3 sites, and lost 0 % to underflow
          (the model itself) input: 32 elements clamped in 1 step, overshoot 100.00x, clamp error 98 %
    """  # noqa: E501
    recipe = Recipe() if recipe is None else recipe
    cover = covering(model, recipe, example, skip=skip, observes=True)
    report = attach(model, recipe, skip=skip, strict=False, observes=True, cover=cover)
    return Observation(model, report)
