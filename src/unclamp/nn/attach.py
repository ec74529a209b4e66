"""Put FP8 into a model's products and take it out again: the one place that changes a user's model.

An adaptor is put in front of each layer's class *in place* (`nn.kinds`): the module object, its
parameters, hooks and attributes stay, so an optimizer made before stays valid. `revert` takes the
adaptor away. Both plan first and touch the model only when nothing can fail any more. What users
call is `nn.convert` and `nn.observe`.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from unclamp.covered import CoverageReport, pattern
from unclamp.errors import ConvertError, RecipeError, UnclampWarning
from unclamp.names import ROLES, SiteName, shown
from unclamp.nn.adapted import Adapted
from unclamp.nn.attention_rules import wanted, with_heads
from unclamp.nn.candidates import (
    Candidate,
    are_quantised,
    candidates,
    check_devices,
    device_of,
    native_plan,
    product_names,
    skipped_by,
)
from unclamp.nn.exports import leave_in, leave_out
from unclamp.nn.fastpath import keep_off
from unclamp.nn.groups import forget
from unclamp.nn.kinds import adapted, kind_of, take_away
from unclamp.nn.layout import Site
from unclamp.nn.ledger import Ledger
from unclamp.nn.operands import Operands
from unclamp.nn.payoff import Timer, unprofitable
from unclamp.nn.products import SITES, Matrix, Several, products_of, stacks
from unclamp.nn.sharded import fit_all
from unclamp.nn.uncollected import uncollected
from unclamp.nn.unmatched import (
    NO_SKIP,
    any_in_fp8,
    describe_plan,
    few,
    find_unmatched,
    kept_text,
    nothing_in_fp8,
    quantised,
    unmatched_text,
)
from unclamp.recipe import Recipe
from unclamp.rule import LayerPlan, matches
from unclamp.shown import Shown
from unclamp.written import counted

FOLDED = 4
"""So many products that differ in a number alone, as the experts of a bank, are one line."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ConvertReport(Shown):
    """What `convert` did.

    Attributes:
        converted: Each converted layer's name and what it gets.
        skipped: Each layer with a weight matrix that was left alone, and why.
        unmatched: Rules and skip globs that decided nothing, and why.
        observed: Products of attentions that are only counted, since no rule names them.
        coverage: What share of a step's FLOPs that is; None where no example was given.
    """

    converted: dict[str, LayerPlan]
    skipped: dict[str, str]
    unmatched: dict[str, str]
    observed: dict[str, LayerPlan] = field(default_factory=dict)
    coverage: CoverageReport | None = None

    def __str__(self) -> str:
        first = f"converted {counted(len(self.converted), 'layer')}, skipped {len(self.skipped)}"
        lines = [first if self.coverage is None else f"{first}: {self.coverage.sentence()}"]
        described = {fqn: describe_plan(plan) for fqn, plan in self.converted.items()}
        lines += [f"  {line}" for line in _folded(described)]
        if self.observed:
            lines.append(f"  only counted: {few(self.observed)}")
        lines += [f"  skipped {line}" for line in _folded(self.skipped, by=pattern)]
        lines += [f"  unmatched {glob!r}: {why}" for glob, why in self.unmatched.items()]
        return "\n".join(lines)


def _folded(said: Mapping[str, str], by: Callable[[str], str] | None = None) -> list[str]:
    """Return a line for each name and what is said of it; for most of a stack, if alike, one.

    A stack is of names that differ in a last number, or are the same by what is given.
    """
    lines: list[str] = []
    for stack, names in (stacks(said) if by is None else _alike(said, by)).items():
        ((usual, count),) = Counter(said[name] for name in names).most_common(1)
        is_folded = count >= FOLDED
        lines += [f"{shown(n)}: {said[n]}" for n in names if said[n] != usual or not is_folded]
        if is_folded:
            which = "of them" if count == len(names) else f"of {len(names)}, the others"
            lines.append(f"{stack if by else f'{stack}.*'}, {count} {which}: {usual}")
    return lines


def _alike(names: Iterable[str], by: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(by(name), []).append(name)
    return found


@dataclass(frozen=True, kw_only=True, repr=False)
class RevertReport(Shown):
    """What `revert` did: the layers that are `nn.Linear` again."""

    reverted: tuple[str, ...]

    def __str__(self) -> str:
        names = "".join(f"\n  {shown(fqn)}" for fqn in self.reverted)
        return f"reverted {counted(len(self.reverted), 'layer')}{names}"


Cover = Callable[[ConvertReport, Collection[str]], CoverageReport]
"""Says what share of a step's FLOPs a conversion covers that is about to be made: of its report,
and the layers that it leaves alone because FP8 does not pay there. It changes nothing."""


class Profit(NamedTuple):
    """How `convert` finds out where FP8 pays."""

    tokens: int
    timer: Timer | None = None


def attach(
    model: nn.Module,
    recipe: Recipe,
    *,
    skip: Sequence[str],
    strict: bool,
    observes: bool,
    profit: Profit | None = None,
    cover: Cover | None = None,
) -> ConvertReport:
    """Do what `convert` says; where it `observes`, casts are only counted (`nn.observe`).

    Raises:
        RecipeError: As `convert`.
        ConvertError: As `convert`; the model is observed; or it is to be, and is converted.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"expected a Recipe, got {recipe!r}; for one scaling everywhere use "
            "Recipe.uniform(Dynamic())"
        )
    if isinstance(skip, str):
        raise ConvertError(f"expected a list of globs for skip, got the string {skip!r}")
    converted, skipped = candidates(model, skip, recipe.rules, observes=observes)
    _check_not_both(model, observes=observes)
    others = {fqn: (m, own) for fqn, own, m in products_of(model)}
    devices = {fqn: device_of(m, own.weight_name) for fqn, (m, own) in others.items()}
    asked = wanted(converted, recipe)
    named = [*product_names(model), *with_heads(converted)]
    converted = asked.computed
    new = converted | {fqn: candidate for fqn, (candidate, _) in asked.observed.items()}
    devices |= {fqn: device_of(c.module, c.matrix.parameter) for fqn, c in new.items()}
    check_devices(devices)
    unmatched = find_unmatched(named, recipe, skip, [*others, *converted, *asked.observed])
    # Of a module with several products a skip glob may name the module alone.
    done = {glob for glob in skip if skipped_by(glob) in skipped.values()}
    unmatched = {g: why for g, why in unmatched.items() if why != NO_SKIP or g not in done}
    if strict and unmatched:
        raise ConvertError(unmatched_text(unmatched, product_names(model)))
    kept = _kept(others, devices, recipe, skip, warms_anew=bool(converted))
    planned = _planner(recipe)
    plans = {fqn: planned(fqn, devices[fqn]) for fqn in converted}
    left: dict[str, str] = {}
    if profit is not None:
        linear = {f: c.module for f, c in converted.items() if isinstance(c.module, nn.Linear)}
        left = unprofitable(
            linear, plans, tokens=profit.tokens, install=_install_alone, timer=profit.timer
        )
        skipped |= left
        converted = {fqn: c for fqn, c in converted.items() if fqn not in left}
        plans = {fqn: plans[fqn] for fqn in converted}
    observed = {fqn: native_plan(p, devices[fqn]) for fqn, (_, p) in asked.observed.items()}
    report = ConvertReport(converted=plans, skipped=skipped, unmatched=unmatched, observed=observed)
    # Both may raise: the model is as it was.
    if cover is not None:
        report = replace(report, coverage=cover(report, left))
    _warn(model, report, kept, observes=observes)
    with uncollected():
        ledger = next(iter(find_ledgers(model)), None) or Ledger(model)
        ledger.clock.extend_to(model)
        ledger.observes = observes
        if new:
            ledger.recipe = recipe  # before the layout: a warm-up is the whole model's
        _install(ledger, {fqn: new[fqn] for fqn in (*plans, *observed)}, plans, observed)
        fit_all(model)
        keep_off(model)
        leave_out(model)
        find_ledgers(model)  # layers that were there may have other names in this model
    _remember(ledger, report, recipe, skip, kept)
    return report


def _planner(recipe: Recipe) -> Callable[[str, torch.device], LayerPlan]:
    """Return what says a product's plan by its name and device; one object for each rule."""
    made: dict[tuple[int, torch.device], LayerPlan] = {}

    def planned(fqn: str, device: torch.device) -> LayerPlan:
        key = (id(recipe.rule_for(fqn)), device)
        if key not in made:
            made[key] = native_plan(recipe.plan(fqn), device)
        return made[key]

    return planned


def _remember(
    ledger: Ledger,
    report: ConvertReport,
    recipe: Recipe,
    skip: Sequence[str],
    kept: Mapping[str, LayerPlan],
) -> None:
    """Have the ledger remember what must stand beside the figures of its runs."""
    said_anew = {*skip, *(rule.match for rule in recipe.rules)}
    earlier = {glob: why for glob, why in ledger.unmatched.items() if glob not in said_anew}
    ledger.unmatched = earlier | report.unmatched
    ledger.coverage = report.coverage  # what was found before is of another conversion
    if report.converted:
        ledger.kept = list(dict.fromkeys([*ledger.kept, *kept]))


def _install(
    ledger: Ledger,
    products: Mapping[str, Candidate],
    computed: Mapping[str, LayerPlan],
    observed: Mapping[str, LayerPlan] = MappingProxyType({}),
) -> None:
    """Give products their sites in a ledger, and their modules an adaptor in front of the class."""
    plans = {**computed, **observed}
    sites = [
        Site.of(
            fqn,
            role,
            plans[fqn].operands[role],
            shape=product.matrix.shape if role == "weight" else (),
        )
        for fqn, product in products.items()
        for role in ROLES
    ]
    # Every class before any module changes: making one runs code of the class it is made of.
    modules = dict.fromkeys(product.module for product in products.values())
    classes = {module: adapted(_adaptor_of(module), type(module)) for module in modules}
    indices = iter(ledger.add(sites))
    for module, made in classes.items():
        module.__class__ = made
    for fqn, (module, name, matrix) in products.items():
        own = Operands(ledger, {role: next(indices) for role in ROLES}, plans[fqn])
        own.weight_name = matrix.parameter
        if fqn in observed:
            own.only_observed, own.is_saved = True, False
            own.bind()
        if name:
            module.__dict__.setdefault(SITES, Several())[name] = own
        else:
            module.__dict__[SITES] = own
        own.belong_to(module)
        ledger.move_to(device_of(module, matrix.parameter))


def _adaptor_of(module: nn.Module) -> type[Adapted]:
    kind = kind_of(module)
    assert kind is not None
    return kind.adaptor


def _install_alone(layer: nn.Linear, plan: LayerPlan) -> None:
    """Convert a layer that is made to be measured."""
    weight = Matrix("weight", (layer.out_features, layer.in_features))
    _install(Ledger(layer), {"": Candidate(layer, "", weight)}, {"": plan})


def revert(model: nn.Module) -> RevertReport:
    """Turn every converted layer back into what it was.

    Parameters keep their identity, the scaling state is dropped. Of a class that something else
    extended since (FSDP, a parametrization) only the adaptor goes. Other models stay as they are.
    """
    leave_in(model)
    products = products_of(model)
    for _, own, _ in products:
        own.ledger.clock.release(own)
        own.end()
    for module in dict.fromkeys(module for _, _, module in products):
        del module.__dict__[SITES]
        forget(module)
        take_away(module)
    return RevertReport(reverted=tuple(fqn for fqn, _, _ in products))


def find_ledgers(model: nn.Module) -> list[Ledger]:
    """Return the ledgers of a model's converted layers: none, or one unless parts of it were
    converted apart. Their sites are named as the modules are now: within the model of their ledger,
    so that a wrapper changes no name, and within `model` where two would have the same name.
    """  # noqa: D205
    with uncollected():
        ledgers = list(dict.fromkeys(own.ledger for _, own, _ in products_of(model)))
        for ledger in ledgers:
            ledger.clock.adopt(model, ledger)
        roots = {ledger: ledger.clock.root_in(model) for ledger in ledgers}
        names = {ledger: _names(ledger, root) for ledger, root in roots.items() if root is not None}
        every = [name for each in names.values() for name in each.values()]
        if len(set(every)) < len(every):  # copies of one block, or parts that were converted apart
            names = {ledger: _names(ledger, model) for ledger in names}
        for ledger, each in names.items():
            ledger.rename(each)
        return ledgers


def _names(ledger: Ledger, root: nn.Module) -> dict[int, SiteName]:
    """Return the names of a ledger's sites within a model, by index."""
    return {
        index: SiteName(str(fqn), role)
        for fqn, own, _ in products_of(root)
        if own.ledger is ledger
        for role, index in own.indices.items()
    }


def _check_not_both(model: nn.Module, *, observes: bool) -> None:
    ledgers, how = find_ledgers(model), "call stop() of its observation, or unclamp.revert"
    if any(ledger.observes for ledger in ledgers):
        raise ConvertError(f"the model is observed already: {how}")
    if observes and ledgers:
        raise ConvertError(
            "expected a model that is not converted: the counts of one that is, a Recorder takes"
        )


def _warn(
    model: nn.Module, report: ConvertReport, kept: Mapping[str, LayerPlan], *, observes: bool
) -> None:
    """Warn, where the user called `convert` or `observe`, of what was not done."""
    said = []
    if report.unmatched:
        said.append(unmatched_text(report.unmatched, product_names(model)))
    if kept:
        said.append(kept_text(list(kept), describe_plan(next(iter(kept.values())))))
    plans = [*report.converted.values(), *(report.observed.values() if observes else ())]
    is_new = any(plan.casts for plan in plans)
    codes = are_quantised(report.skipped)
    if len(codes) > len(report.converted):
        said.append(quantised(codes, [f for f, plan in report.converted.items() if plan.casts]))
    elif not (is_new or any_in_fp8(find_ledgers(model))):
        said.append(
            nothing_in_fp8(
                report.skipped, plain=list(report.converted), observed=list(report.observed)
            )
        )
    for message in said:
        # The caller of `attach`, and `naming_arguments` before that.
        warnings.warn(message, UnclampWarning, stacklevel=5)


def _kept(
    products: Mapping[str, tuple[nn.Module, Operands]],
    devices: Mapping[str, torch.device],
    recipe: Recipe,
    skip: Sequence[str],
    *,
    warms_anew: bool,
) -> dict[str, LayerPlan]:
    """Return what converted products have that another recipe would not have given them."""
    kept, planned = {}, _planner(recipe)
    for fqn, (_, own) in products.items():
        before = own.ledger.recipe
        if before == recipe or own.only_observed or any(matches(fqn, glob) for glob in skip):
            continue
        plan = own.plan()
        wanted = planned(fqn, devices[fqn])
        steps = recipe.warmup_steps if before is None or warms_anew else before.warmup_steps
        if plan != wanted or steps != recipe.warmup_steps:
            kept[fqn] = plan
    return kept
