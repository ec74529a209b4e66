"""Which products of an attention a recipe wants computed, with how many scales, and which counted.

A rule *names* the products of an attention where the last part of its glob is `qk` or `pv`, or a
glob of those which says more than `*`: `*.qk` does, `layers.*` and `*` do not. Named products are
computed as the rule says. A rule that names heads, `*.qk.*` or `*.qk.3`, gives each head of the
keys a product of its own. What no rule names is counted under the recipe's own settings, with one
scale a tensor.
"""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from unclamp.errors import RecipeError
from unclamp.names import Role, joined
from unclamp.nn.attend import PV, QK
from unclamp.nn.attention import WithAttention
from unclamp.nn.candidates import Candidate
from unclamp.nn.kinds import kind_of
from unclamp.nn.operands import Operands
from unclamp.recipe import Recipe
from unclamp.rule import LayerPlan
from unclamp.scaling import PER_TENSOR, Scaling


class Wanted(NamedTuple):
    """What becomes of candidates.

    Attributes:
        computed: Those that are to go through FP8 by their plans.
        observed: Those of attentions that are only counted, and how.
    """

    computed: dict[str, Candidate]
    observed: dict[str, tuple[Candidate, LayerPlan]]


def wanted(candidates: Mapping[str, Candidate], recipe: Recipe) -> Wanted:
    """Tell products that a recipe computes from those that are only counted.

    Raises:
        RecipeError: A rule names products of an attention, and wants rows or blocks.
    """
    computed: dict[str, Candidate] = {}
    observed: dict[str, tuple[Candidate, LayerPlan]] = {}
    for fqn, candidate in candidates.items():
        if not is_of_attention(candidate):
            computed[fqn] = candidate
            continue
        if (rule := recipe.rule_for(fqn)) is not None and names(rule.match, candidate.name):
            _check(fqn, recipe.plan(fqn))
            computed[fqn] = candidate
            continue
        heads = _heads(fqn, candidate)
        if not any(_is_named(recipe, own, each) for own, each in heads.items()):
            heads = {fqn: candidate}
        for own, each in heads.items():
            if _is_named(recipe, own, each):
                _check(own, recipe.plan(own))
                computed[own] = each
            elif (plan := _counted(recipe.plan(fqn))).casts:
                observed[own] = (each, plan)
    return Wanted(computed, observed)


def is_of_attention(candidate: Candidate) -> bool:
    """Whether a product is one of an attention, without a parameter."""
    return candidate.matrix.parameter is None and candidate.name.split(".")[0] in (QK, PV)


def product_of_attention(own: Operands) -> str | None:
    """Return what an attention calls a product of its, such as "qk.3"; None of another module."""
    parts = own.fqn.split(".")
    name = ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
    return name if own.weight_name is None and name.split(".")[0] in (QK, PV) else None


def names(glob: str, product: str) -> bool:
    """Whether a glob that matches a product of an attention names it by its last parts."""
    parts, wanted = glob.removeprefix("^").split("."), product.split(".")
    if len(parts) < len(wanted):
        return fnmatchcase(product, parts[-1]) and parts[-1].strip("*") != ""
    own = parts[-len(wanted) :]
    return own[0].strip("*") != "" and all(map(fnmatchcase, wanted, own))


def heads_of(candidate: Candidate) -> int:
    """Return the heads of keys that a product can have a scale for; 0 where nobody knows."""
    kind = kind_of(candidate.module)
    adaptor = type(candidate.module) if kind is None else kind.adaptor
    return adaptor.heads(candidate.module) if issubclass(adaptor, WithAttention) else 0


def with_heads(candidates: Mapping[str, Candidate]) -> list[str]:
    """Return the names of candidates, and those that heads of an attention would have."""
    found = list(candidates)
    for fqn, candidate in candidates.items():
        found += _heads(fqn, candidate) if is_of_attention(candidate) else ()
    return found


def _heads(fqn: str, candidate: Candidate) -> dict[str, Candidate]:
    return {
        joined(fqn, str(head)): candidate._replace(name=f"{candidate.name}.{head}")
        for head in range(heads_of(candidate))
    }


def _is_named(recipe: Recipe, fqn: str, candidate: Candidate) -> bool:
    rule = recipe.rule_for(fqn)
    return rule is not None and names(rule.match, candidate.name)


def _check(fqn: str, plan: LayerPlan) -> None:
    check_whole(fqn, {role: operand.scaling for role, operand in plan.operands.items()})
    if plan.smooth:
        raise RecipeError(f"{fqn}: a product of an attention cannot be smoothed")


def check_whole(fqn: str, scalings: Mapping[Role, Scaling]) -> None:
    """Check that a product of an attention is given one scale a tensor.

    Raises:
        RecipeError: It is given one for each row or block.
    """
    for role, scaling in scalings.items():
        if scaling.casts and not scaling.granularity.is_whole:
            raise RecipeError(
                f"{fqn}: expected a scale a tensor for {role} of an attention's product, got "
                f"{scaling.granularity}: its rows are of other tokens in every matrix of the "
                "batch; a rule for '*.qk.*' or '*.pv.*' gives each head a scale"
            )


def as_whole(scaling: Scaling) -> Scaling:
    """Return a scaling with one scale a tensor."""
    if not scaling.casts or scaling.granularity.is_whole:
        return scaling
    return replace(scaling, granularity=PER_TENSOR)


def _counted(plan: LayerPlan) -> LayerPlan:
    """Return how a product is counted that no rule names: one scale a tensor."""
    operands = {
        role: replace(operand, scaling=as_whole(operand.scaling))
        for role, operand in plan.operands.items()
    }
    return replace(plan, operands=operands, smooth=False)
