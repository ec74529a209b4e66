"""From the sites that caused a spike to a recipe under which they do not."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from unclamp.analysis.counterfactual import Override, ScalingName
from unclamp.explain.facts import sites_of
from unclamp.names import ROLES, Role, SiteName
from unclamp.nn import Ledger
from unclamp.recipe import Recipe, rules_at
from unclamp.rule import Rule, rule_to_dict
from unclamp.scaling import Delayed, Dynamic, Guarded, PerBlock, Scaling

SCALINGS: Mapping[ScalingName, Scaling] = {
    "dynamic": Dynamic(),
    "guarded": Guarded(),
    "short history": Delayed(history_len=1),
    "blocks": Dynamic(granularity=PerBlock(1, 32)),
}
_AS_CODE: Mapping[ScalingName, str] = {
    "dynamic": "unclamp.Dynamic()",
    "guarded": "unclamp.Guarded()",
    "short history": "unclamp.Delayed(history_len=1)",
    "blocks": "unclamp.Dynamic(granularity=unclamp.PerBlock(1, 32))",
}


def make_override(
    sites: Iterable[SiteName],
    scaling: ScalingName,
    *,
    recipe: Recipe | None,
    removed: float | None,
    added: float = 0.0,
    instead: Iterable[SiteName] = (),
) -> Override:
    """Return the overrides that scale sites otherwise.

    The first rule that matches decides for a whole layer, so a layer that a rule of the recipe
    decides already gets that rule's other settings too.
    """
    ordered = tuple(sorted(sites))
    base = Recipe() if recipe is None else recipe
    fqns = dict.fromkeys(site.fqn for site in ordered)
    rules = []
    lines = ["recipe = recipe"]
    for fqn, rule in zip(fqns, rules_at(base, ordered, SCALINGS[scaling]), strict=True):
        changed: list[Role] = [role for role in ROLES if SiteName(fqn, role) in ordered]
        rules.append(_short(rule, changed))
        named = ", ".join(f"{role}={_AS_CODE[scaling]}" for role in changed)
        lines.append(f".override({json.dumps(rule.match)}, {named})")
    is_first = all(base.rule_for(fqn) is None for fqn in fqns)
    return Override(
        sites=ordered,
        scaling=scaling,
        removed=removed,
        added=added,
        toml="\n".join(map(_as_toml, rules)),
        python="".join(lines) if is_first else None,
        instead=tuple(sorted(instead)),
    )


def _as_toml(rule: Mapping[str, Any]) -> str:
    """Return a rule as an entry that can be pasted before others: `[[override]]`, a line a key."""
    return "[[override]]\n" + "".join(f"{key} = {_inline(rule[key])}\n" for key in rule)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_inline(value[key])}" for key in value) + " }"
    # Text, numbers and booleans are written alike in JSON and TOML, but for pairs of surrogates,
    # which TOML does not know, and for DEL, which it wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def switch_sites(model: nn.Module, sites: Iterable[SiteName], scaling: ScalingName) -> None:
    """Switch sites of a model that trains; a recorder writes the event."""
    where = sites_of(model)
    changes: dict[Ledger, dict[int, Scaling]] = {}
    for site in sites:
        place = where[site]
        changes.setdefault(place.ledger, {})[place.row] = SCALINGS[scaling]
    for ledger, scalings in changes.items():
        ledger.switch(scalings)


def _short(rule: Rule, changed: Iterable[Role]) -> dict[str, Any]:
    """Return a rule as plain data, without the defaults of the scalings that are new."""
    data = rule_to_dict(rule)
    for role in changed:
        usual = rule_to_dict(replace(rule, scalings={role: type(rule.scalings[role])()}))[role]
        data[role] = {
            key: value
            for key, value in data[role].items()
            if key in ("scaling", "format") or value != usual.get(key)
        }
    return data
