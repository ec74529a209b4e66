"""From the sites that caused a spike to a recipe that does not clamp them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from unclamp.explain.facts import SiteKey, sites_of
from unclamp.names import ROLES, Role
from unclamp.recipe import Recipe
from unclamp.rule import Rule, rule_to_dict
from unclamp.scaling import Dynamic, Guarded, Scaling

ScalingName = Literal["dynamic", "guarded"]
SCALINGS: Mapping[ScalingName, Scaling] = {"dynamic": Dynamic(), "guarded": Guarded()}


@dataclass(frozen=True, kw_only=True)
class Override:
    """A recommended change of the recipe.

    Attributes:
        sites: The sites to change.
        scaling: What to make them: "dynamic", or "guarded" where dynamic did not do.
        removed: Share of the spike that is gone with it, by a replay; None if not replayed.
        toml: Overrides for a recipe file, to go before those it has.
        python: The same as code; None where rules of the recipe would come before it.
    """

    sites: tuple[SiteKey, ...]
    scaling: ScalingName
    removed: float | None
    toml: str
    python: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        sites = [{"fqn": fqn, "role": role} for fqn, role in self.sites]
        return {
            "sites": sites,
            "scaling": self.scaling,
            "removed": self.removed,
            "toml": self.toml,
            "python": self.python,
        }


def make_override(
    sites: Iterable[SiteKey], scaling: ScalingName, *, recipe: Recipe | None, removed: float | None
) -> Override:
    """Return the overrides that make sites dynamic or guarded.

    The first rule that matches decides for a whole layer, so a layer that a rule of the recipe
    decides already gets that rule's other settings too.
    """
    ordered = tuple(sorted(sites))
    rules = []
    lines = ["recipe = recipe"]
    is_first = True
    for fqn in dict.fromkeys(fqn for fqn, _ in ordered):
        changed: dict[Role, Scaling] = {
            role: SCALINGS[scaling] for role in ROLES if (fqn, role) in ordered
        }
        before = None if recipe is None else recipe.rule_for(fqn)
        base = Rule(match=f"^{fqn}") if before is None else replace(before, match=f"^{fqn}")
        rules.append(_short(replace(base, scalings={**base.scalings, **changed}), changed))
        is_first = is_first and before is None
        named = ", ".join(f"{role}=unclamp.{scaling.title()}()" for role in changed)
        lines.append(f'.override("^{fqn}", {named})')
    return Override(
        sites=ordered,
        scaling=scaling,
        removed=removed,
        toml="\n".join(map(_as_toml, rules)),
        python="".join(lines) if is_first else None,
    )


def _as_toml(rule: Mapping[str, Any]) -> str:
    """Return a rule as an entry that can be pasted before others: `[[override]]`, a line a key."""
    return "[[override]]\n" + "".join(f"{key} = {_inline(rule[key])}\n" for key in rule)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_inline(value[key])}" for key in value) + " }"
    # Text, numbers and booleans are written alike in JSON and TOML.
    return json.dumps(value)


def switch_sites(
    model: nn.Module, sites: Iterable[Mapping[str, Any]], scaling: ScalingName
) -> None:
    """Switch sites of a model that trains; a recorder writes the event."""
    where = sites_of(model)
    changes: dict[int, tuple[Any, dict[int, Scaling]]] = {}
    for site in sites:
        ledger, index = where[site["fqn"], site["role"]]
        changes.setdefault(id(ledger), (ledger, {}))[1][index] = SCALINGS[scaling]
    for ledger, scalings in changes.values():
        ledger.switch(scalings)


def _short(rule: Rule, changed: Mapping[Role, Scaling]) -> dict[str, Any]:
    """Return a rule as plain data, without the defaults of the scalings that are new."""
    data = rule_to_dict(rule)
    for role, scaling in changed.items():
        settings = data[role]
        data[role] = {k: v for k, v in settings.items() if k in ("scaling", "format")}
        assert data[role]["scaling"] == scaling.kind
    return data
