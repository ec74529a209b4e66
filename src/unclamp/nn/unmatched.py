"""What a user must be told of a conversion: what it did not do, and what matched nothing.

The sentences alone: `convert` decides when to warn, the ledger keeps what belongs beside a run's
figures, and a recorder writes it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from unclamp.covered import pattern
from unclamp.names import GEMMS, is_attention_name, shown
from unclamp.nn.ledger import Ledger
from unclamp.recipe import Recipe
from unclamp.rule import LayerPlan, matches
from unclamp.scaling import describe
from unclamp.written import counted

MOST_NAMES = 3
MOST_LISTED = 20
MOST_REASONS = 6

NO_LAYER = "override matches no linear layer"
NEVER_DECIDES = "override never decides: earlier rules match first"
REPEATED = "the second override for this glob never decides: the first one does"
ONLY_SKIPPED = "override matches only layers that were skipped"
NO_SKIP = "skip glob matches no linear layer"


def find_unmatched(
    linear: Sequence[str], recipe: Recipe, skip: Sequence[str], converted: Collection[str]
) -> dict[str, str]:
    """Return the rules and skip globs that decided nothing, and why.

    Args:
        linear: Names of all layers that are matrix products.
        recipe: Whose rules.
        skip: Globs of layers to leave alone.
        converted: Names of those that are converted, now or before.
    """
    unmatched = {glob: NO_SKIP for glob in skip if not any(matches(fqn, glob) for fqn in linear)}
    deciding = {id(recipe.rule_for(fqn)) for fqn in converted}
    for place, rule in enumerate(recipe.rules):
        if id(rule) in deciding:
            continue
        first = next(r for r in recipe.rules[: place + 1] if r.match == rule.match)
        if first is not rule and id(first) in deciding:
            unmatched[rule.match] = REPEATED
            continue
        found = [fqn for fqn in linear if rule.matches(fqn)]
        if not found:
            unmatched[rule.match] = NO_LAYER
        elif any(fqn in converted for fqn in found):
            unmatched[rule.match] = NEVER_DECIDES
        else:
            unmatched[rule.match] = ONLY_SKIPPED
    return unmatched


def notes_on(unmatched: Mapping[str, str], recipe: Recipe) -> list[str]:
    """Return a sentence for each rule and skip glob that decided nothing, for beside figures."""
    effect = "as it would be without it"
    if all(rule.match in unmatched for rule in recipe.rules):
        effect = _plain_scaling(recipe) or effect
    notes = []
    for glob, why in unmatched.items():
        if why == NO_SKIP:
            notes.append(f"The skip glob {glob!r} matched no layer: nothing was left out for it.")
        elif why == REPEATED:
            notes.append(f"The second override {glob!r} decided nothing: the first one does.")
        elif why == NEVER_DECIDES:
            notes.append(f"The override {glob!r} decided nothing: earlier rules match its layers.")
        elif why == ONLY_SKIPPED:
            notes.append(f"The override {glob!r} matched only layers that are not in FP8.")
        else:
            notes.append(f"The override {glob!r} matched no layer: this run is {effect}.")
    return notes


def _plain_scaling(recipe: Recipe) -> str | None:
    """Say what a recipe is without its rules; None where that takes more than a word."""
    plan = replace(recipe, rules=()).plan("")
    kinds = {describe(operand.scaling) for operand in plan.operands.values()}
    return f"plain {kinds.pop()}" if len(kinds) == 1 and not plan.smooth else None


def unmatched_text(unmatched: Mapping[str, str], linear: Sequence[str]) -> str:
    """Return a warning of rules and skip globs that decided nothing, with what there is."""
    names = [shown(fqn) for fqn in linear]
    if len(names) > MOST_LISTED:  # the layers of a block once, however many blocks
        alike = Counter(map(pattern, linear))
        first = {pattern(fqn): fqn for fqn in reversed(linear)}
        names = [first[name] + (f" x{n}" if n > 1 else "") for name, n in alike.items()]
    listed = ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")
    rules = "; ".join(f"{glob!r}: {why}" for glob, why in unmatched.items())
    if not any(map(is_attention_name, linear)):
        missed = (glob for glob, why in unmatched.items() if why == NO_LAYER)
        if any(map(is_attention_name, missed)):
            rules += (
                " (unclamp knows no attention of the model: unclamp.attention(self, q, k, v, ...) "
                "in place of scaled_dot_product_attention makes one known)"
            )
    return f"{rules}. The model's linear layers: {listed or 'none'}"


def kept_text(names: Sequence[str], has: str) -> str:
    """Return a warning of layers that were converted before, the first of which `has` this."""
    return (
        f"{_count(names)} converted already, with another recipe, and kept what they had, such as "
        f"{shown(names[0])}: {has}. unclamp.switch changes the scaling of converted layers; after "
        "unclamp.revert(model) a recipe is taken up anew"
    )


def kept_note(names: Sequence[str]) -> str:
    """Say beside a run's figures that not all layers have the recipe of its header."""
    return f"{_count(names)} converted with an earlier recipe, and kept it: {few(names)}."


def _count(names: Sequence[str]) -> str:
    return counted(len(names), "layer was", "layers were")


def nothing_in_fp8(
    skipped: Mapping[str, str], *, plain: Sequence[str], observed: Sequence[str] = ()
) -> str:
    """Say that no layer is in FP8, and why.

    Args:
        skipped: Layers that were left alone, and why.
        plain: Those that the recipe does not cast.
        observed: Products of attentions that are only counted.
    """
    if observed and not (plain or skipped):
        return (
            f"no layer is in FP8: {few(observed)} are only counted; a rule for '*.qk' or '*.pv' "
            "computes the products of attentions in FP8"
        )
    ours = " by unclamp" if any(why.startswith("torchao") for why in skipped.values()) else ""
    if not plain:
        return f"no layer is in FP8{ours}: {reasons(skipped)}"
    left = f"the recipe leaves {few(plain)} in high precision"
    return (
        f"no layer is in FP8{ours}: {'; '.join([left, *([reasons(skipped)] if skipped else [])])}"
    )


def quantised(layers: Mapping[str, str], taken: Sequence[str]) -> str:
    """Say that most of a model is quantised, and what is left of it for FP8.

    Args:
        layers: Those whose weights are codes, and why each is left alone.
        taken: Those that FP8 takes all the same.
    """
    first, why = next(iter(layers.items()))
    said = (
        f"the model is quantised ({counted(len(layers), 'layer')}, such as {shown(first)}: {why}), "
        "and FP8 needs weights in high precision"
    )
    if taken:
        return f"{said}: little worth it is left, {few(taken)}"
    return f"no layer is in FP8: {said}: nothing worth it is left"


def reasons(skipped: Mapping[str, str]) -> str:
    """Return why layers were left alone: each reason with the layers it holds for."""
    if not skipped:
        return "the model has no linear layer"
    by_reason: dict[str, list[str]] = {}
    for fqn, why in skipped.items():
        by_reason.setdefault(why, []).append(fqn)
    said = [f"{few(names)}: {why}" for why, names in by_reason.items()]
    more = len(said) - MOST_REASONS
    said = said[:MOST_REASONS] + ([f"and {counted(more, 'more reason')}"] if more > 0 else [])
    return "; ".join(said)


def any_in_fp8(ledgers: Iterable[Ledger]) -> bool:
    """Whether any layer of these ledgers casts anything, if only to count."""
    return any(
        not layer.is_plain and (ledger.observes or not layer.only_observed)
        for ledger in ledgers
        for layer in ledger.layers
    )


def few(names: Iterable[str]) -> str:
    """Return names for people, the first few of many."""
    every = [shown(name) for name in names]
    more = len(every) - MOST_NAMES
    listed = ", ".join(every[:MOST_NAMES])
    return f"{listed} and {more} more" if more > 0 else listed


def describe_plan(plan: LayerPlan) -> str:
    """Say what a layer gets: scalings, formats, GEMMs that are special, smoothing."""
    parts = [
        f"{role} {describe(operand.scaling)}"
        + (f" {operand.format.name}" if operand.scaling.casts else "")
        for role, operand in plan.operands.items()
    ]
    for gemm in GEMMS:
        mode = plan.gemms[gemm]
        if mode != "float32":
            parts.append(f"{gemm} {mode if isinstance(mode, str) else 'GEMM in high precision'}")
    return ", ".join([*parts, "smoothed"] if plan.smooth else parts)
