"""Which sites of a model a rule can steer, and why not the others."""

from dataclasses import dataclass

from torch import nn

from unclamp.analysis.steering import Rule
from unclamp.analysis.whatif import policy_text
from unclamp.errors import ConvertError, RecipeError
from unclamp.formats import Format
from unclamp.names import ROLES, SiteName
from unclamp.nn.attach import find_ledgers
from unclamp.nn.layout import Site
from unclamp.nn.ledger import Ledger
from unclamp.nn.operands import Operands
from unclamp.nn.products import products_of
from unclamp.nn.switch import plan_after
from unclamp.rule import check_plan, check_scaling
from unclamp.written import listed


@dataclass(frozen=True, kw_only=True)
class Steered:
    """One site that is steered.

    Attributes:
        name: As logs have it.
        fqn: The product's name in the model that was given, which a wrapper changes.
        ledger: Whose site it is.
        index: Its number in the ledger.
        format: What it is cast to.
        rung: Of the ladder, where the recipe puts it.
    """

    name: SiteName
    fqn: str
    ledger: Ledger
    index: int
    format: Format
    rung: int


def find_steered(model: nn.Module, rule: Rule) -> tuple[list[Steered], dict[SiteName, str]]:
    """Return the sites to steer, ordered by ledger and number, and why each other one is left.

    Raises:
        ConvertError: No layer of the model trains in FP8.
        RecipeError: No site has a scaling of the ladder; or a rung makes no sense at a site.
    """
    ledgers = find_ledgers(model)
    if all(ledger.observes for ledger in ledgers):
        raise ConvertError(
            "an Autopilot switches layers that train in FP8, and the model has none: call "
            "unclamp.convert before"
        )
    found: list[Steered] = []
    left: dict[SiteName, str] = {}
    for fqn, own, _ in products_of(model):
        ledger = own.ledger
        for role in ROLES:
            site = ledger.sites[own.indices[role]]
            why = _why_left(site, ledger, own, rule)
            if why is not None:
                left[site.name] = why
                continue
            rung = rule.ladder.index(site.operand.scaling)
            _check(own, site, rule, rung)
            found.append(
                Steered(
                    name=site.name, fqn=fqn, ledger=ledger, index=own.indices[role],
                    format=site.operand.format, rung=rung,
                )
            )  # fmt: skip
    if not found:
        there = {policy_text(s.operand.scaling) for ledger in ledgers for s in ledger.sites}
        raise RecipeError(
            f"no site of the model has a scaling of the rule's ladder "
            f"{' > '.join(map(policy_text, rule.ladder))}; they have {listed(sorted(there))}: give "
            "Rule(ladder=...) with the recipe's scaling as a rung"
        )
    order = {ledger: place for place, ledger in enumerate(ledgers)}
    return sorted(found, key=lambda each: (order[each.ledger], each.index)), left


def _why_left(site: Site, ledger: Ledger, own: Operands, rule: Rule) -> str | None:
    if ledger.observes or own.only_observed:
        return "it is only counted"
    if site.operand.scaling not in rule.ladder:
        return f"{policy_text(site.operand.scaling)} is no rung of the ladder"
    return None


def _check(own: Operands, site: Site, rule: Rule, rung: int) -> None:
    """Raise a RecipeError where a rung above makes no sense at a site, before anything trains."""
    for scaling in rule.ladder[rung + 1 :]:
        check_scaling(site.role, scaling)
        check_plan(plan_after(own, {site.role: scaling}))
