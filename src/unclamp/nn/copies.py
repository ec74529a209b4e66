"""Copies of a converted model: what they clamp in evaluation, and how they follow their source."""

from dataclasses import dataclass

import torch
from torch import nn

from unclamp.errors import ConvertError
from unclamp.names import ROLES, SiteName
from unclamp.nn.attach import find_ledgers
from unclamp.nn.ledger import Ledger
from unclamp.nn.products import products_of
from unclamp.numerics import Stat
from unclamp.shown import Shown
from unclamp.totals import clamp_error, overshoot
from unclamp.written import counted, percent, times

SHOWN_SITES = 8
UNKNOWN_AGE = "of unknown age (an average, or an old copy without its source)"


@dataclass(frozen=True, kw_only=True)
class EvaluatedSite:
    """What the casts of one operand of one layer saw in evaluations.

    Attributes:
        name: Layer and role.
        casts: Casts counted.
        elements: Elements in them.
        saturated: Elements clamped.
        underflowed: Non-zero elements that became zero.
        nonfinite: Inf and NaN elements.
        recast: Casts repeated with the tensor's own scale, because they would have clamped.
        overshoot: Largest amax over the largest representable value.
        clamp_error: Share of the squares that clamping removed, from 0 to 1.
    """

    name: SiteName
    casts: int
    elements: int
    saturated: int
    underflowed: int
    nonfinite: int
    recast: int
    overshoot: float
    clamp_error: float


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluationCounts(Shown):
    """What a model's casts saw in evaluations: since it was made, or since the last reset.

    Attributes:
        sites: The sites that cast anything, most clamped elements first.
        age: By how many updates the scales are older than those of the model that this one was
            copied from; 0 where no older source is known; None where nobody knows: they are an
            average of several states, or those of an old copy that was pickled without its source.
    """

    sites: tuple[EvaluatedSite, ...]
    age: int | None

    @property
    def elements(self) -> int:
        """Elements in all casts."""
        return sum(site.elements for site in self.sites)

    @property
    def saturated(self) -> int:
        """Elements clamped."""
        return sum(site.saturated for site in self.sites)

    def __str__(self) -> str:
        clamped = [site for site in self.sites if site.saturated]
        old = {None: UNKNOWN_AGE, 0: "up to date"}.get(
            self.age, f"{counted(self.age or 0, 'update')} old"
        )
        lines = [
            f"clamped {self.saturated:,} of {counted(self.elements, 'element')} in evaluation, at "
            f"{len(clamped)} of {counted(len(self.sites), 'site')}; scales: {old}"
        ]
        lines += [
            f"  {site.name}: {counted(site.saturated, 'element')} clamped, overshoot "
            f"{times(site.overshoot)}, clamp error {percent(site.clamp_error)}"
            for site in clamped[:SHOWN_SITES]
        ]
        return "\n".join(lines)


def evaluation_counts(model: nn.Module, *, reset: bool = False) -> EvaluationCounts:
    """Return what the casts of a converted model saw in evaluations; waits for the device.

    Forwards without gradients count if the module is in `eval()`, or if the model is a copy that
    has not trained. No training, no optimizer and no recorder is needed. Copies start at zero.

    Args:
        model: A converted model, a part of it, or a copy.
        reset: Start counting anew afterwards.

    Raises:
        ConvertError: `model` has no converted layer.

    Numerics: where a site has a scale a block, `overshoot` is that of the largest amax over the
    largest inverse scale.

    Example:
        >>> import torch, unclamp
        >>> model = torch.nn.Linear(8, 8)
        >>> report = unclamp.convert(model, unclamp.Recipe())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> model(torch.ones(4, 8)).sum().backward()
        >>> optimizer.step()
        >>> with torch.no_grad():
        ...     y = model.eval()(torch.full((4, 8), 2.0))
        >>> print(unclamp.evaluation_counts(model))
        clamped 32 of 96 elements in evaluation, at 1 of 2 sites; scales: up to date
          (the model itself) input: 32 elements clamped, overshoot 2.00x, clamp error 25 %
    """
    ledgers = _ledgers(model, "evaluation_counts")
    sites = [site for ledger in ledgers for site in _sites(ledger)]
    products: dict[Ledger, set[int]] = {ledger: set() for ledger in ledgers}
    for _, own, _ in products_of(model):
        products[own.ledger].add(own.number)
    ages = [each.evaluated.age(each.updates, frozenset(own)) for each, own in products.items()]
    known = [age for age in ages if age is not None]
    if reset:
        for ledger in ledgers:
            ledger.evaluated.reset()
    return EvaluationCounts(
        sites=tuple(sorted(sites, key=lambda site: (-site.saturated, str(site.name)))),
        age=max(known) if len(known) == len(ages) else None,
    )


def _sites(ledger: Ledger) -> list[EvaluatedSite]:
    rows = ledger.evaluated.stats.cpu()
    errors = clamp_error(rows[:, Stat.SATURATED_SQUARE], rows[:, Stat.SQUARE]).tolist()
    found = []
    for site, row, error in zip(ledger.sites, rows.tolist(), errors, strict=True):
        if not row[Stat.CASTS]:
            continue
        peak = row[Stat.AMAX] / row[Stat.SCALE_INV] if row[Stat.AMAX] > 0 else 0.0
        found.append(
            EvaluatedSite(
                name=site.name,
                casts=int(row[Stat.CASTS]),
                elements=int(row[Stat.ELEMENTS]),
                saturated=int(row[Stat.SATURATED]),
                underflowed=int(row[Stat.UNDERFLOWED]),
                nonfinite=int(row[Stat.NONFINITE]),
                recast=int(row[Stat.RECAST]),
                overshoot=overshoot(peak, site.operand.format.max),
                clamp_error=error if row[Stat.SATURATED] else 0.0,
            )
        )
    return found


def refresh(copy: nn.Module, *, from_: nn.Module) -> None:
    """Give a copy of a converted model the scaling state that its source has now.

    An average of the weights, a teacher or any other copy has scales of the step at which it was
    made; nothing updates them. Call this before evaluating it, or after each update of the
    average. Histories, scales and the number of updates are taken over, site by site of the same
    name; weights stay. What the copy has pending of a training of its own stays too. It waits
    for no device.

    Args:
        copy: A converted model; a wrapper such as `AveragedModel` is fine.
        from_: The model that trains, with layers of the same names.

    Raises:
        ConvertError: One of them has no converted layer, both share their scaling state, or the
            copy has a site that `from_` has not.

    Numerics: a site of another scaling or format than its source's takes its scale from the
    history, as after a switch. One with other blocks keeps what it has.

    Example:
        >>> import copy, torch, unclamp
        >>> model = torch.nn.Linear(8, 8)
        >>> report = unclamp.convert(model, unclamp.Recipe())
        >>> average = copy.deepcopy(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> model(torch.ones(4, 8)).sum().backward()
        >>> optimizer.step()
        >>> unclamp.evaluation_counts(average).age
        1
        >>> unclamp.refresh(average, from_=model)
        >>> unclamp.evaluation_counts(average).age
        0
    """
    targets, sources = _ledgers(copy, "refresh"), _ledgers(from_, "refresh")
    if not set(targets).isdisjoint(sources):
        raise ConvertError("expected a copy with scaling state of its own, got the same model")
    there = {
        site.name: (ledger, index)
        for ledger in sources
        for index, site in enumerate(ledger.sites)
        if index not in ledger.gone
    }
    here = [
        (target, index, site.name)
        for target in targets
        for index, site in enumerate(target.sites)
        if index not in target.gone
    ]
    missing = [name for _, _, name in here if name not in there]
    if missing:
        raise ConvertError(
            f"expected a source with the sites of the copy, got one without {missing[0]}"
            + (f" and {len(missing) - 1:,} more" if len(missing) > 1 else "")
        )
    pairs: dict[tuple[Ledger, Ledger], list[tuple[int, int]]] = {}
    for target, index, name in here:
        source, other = there[name]
        pairs.setdefault((target, source), []).append((index, other))
    for (target, source), indices in pairs.items():
        _take_over(target, source, indices)
    for _, own, module in products_of(copy):
        if own.weight_name is not None:
            own.note_origin(getattr(module, own.weight_name))


@torch.no_grad()
def _take_over(target: Ledger, source: Ledger, pairs: list[tuple[int, int]]) -> None:
    fits = [(i, j) for i, j in pairs if target.sites[i].grids == source.sites[j].grids]
    here = target.layout.numbers_of([i for i, _ in fits])
    there = source.layout.numbers_of([j for _, j in fits])
    length = min(target.layout.longest, source.layout.longest)
    target.ring.write(here, source.ring.newest(there, length))
    target.scale[here] = source.scale[there].to(target.scale.device)
    others = [i for i, j in fits if target.sites[i].operand != source.sites[j].operand]
    if others:
        target.rescale(others)
    target.restore_updates(source.count())
    numbers = {i // len(ROLES): j // len(ROLES) for i, j in pairs}
    target.evaluated.copied_from(source.steps, source.evaluated, numbers)


def _ledgers(model: nn.Module, name: str) -> list[Ledger]:
    ledgers = find_ledgers(model) if isinstance(model, nn.Module) else []
    if not ledgers:
        raise ConvertError(
            f"expected a converted model for unclamp.{name}, got "
            + ("one without converted layers" if isinstance(model, nn.Module) else f"{model!r}")
        )
    return ledgers
