"""What differs in what runs say of themselves: recipe, metadata, environment, cadence. Torch-free.

Leaf by leaf, and only what differs: a reader looks for the one setting that was changed.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.files import to_json
from unclamp.names import ROLES
from unclamp.report.side_by_side.groups import SEED, Arm
from unclamp.report.side_by_side.reading import Side
from unclamp.runlog import Cadence

Leaves = dict[str, str]
NO_RECIPE = "none in the log"
LONGEST = 80
"""Characters of a value that are shown; in full it is compared, and stands in the JSON."""
_NOT_OF_TRAINING = {
    ("metadata", "arm"), ("metadata", "name"), ("metadata", SEED), ("run", "recorded steps"),
    ("run", "inspected steps"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting that is not the same everywhere.

    Attributes:
        where: "recipe", "metadata", "environment", or "run" for the rest of a header.
        name: Of the setting, dotted; several that differ alike are joined by commas.
        values: By arm, as text in full; several where its runs differ, None where it has none.
    """

    where: str
    name: str
    values: dict[str, str | None]

    @property
    def shown(self) -> dict[str, str]:
        """The values as people read them, by arm: long ones cut around where they differ."""
        return dict(zip(self.values, shown_values(list(self.values.values())), strict=True))

    @property
    def is_of_training(self) -> bool:
        """Whether it may change the loss: names of arms and how a run was recorded do not."""
        return (self.where, self.name) not in _NOT_OF_TRAINING

    def change(self, arm: str, baseline: str) -> str:
        """Return the setting of an arm beside that of the baseline, as one line."""
        before, after = shown_values([self.values[baseline], self.values[arm]])
        return f"{self.where} {self.name}".rstrip() + f": {before} → {after}"


def differing_settings(arms: Sequence[Arm]) -> list[Setting]:
    """Return the settings in which the arms differ."""
    found = _all_settings(arms)
    return _joined([s for s in found if len(set(s.values.values())) > 1])


def changed_settings(settings: Sequence[Setting], arm: str, baseline: str) -> list[Setting]:
    """Return the settings in which these two differ; between a recipe and none only that."""
    changed = []
    for setting in settings:
        values = setting.values.get(arm), setting.values.get(baseline)
        is_whole = (setting.where, setting.name) == ("recipe", "")
        is_about_having_one = setting.where == "recipe" and NO_RECIPE in values
        if values[0] != values[1] and (
            setting.where != "recipe" or is_whole == is_about_having_one
        ):
            changed.append(setting)
    return changed


def varied_settings(arm: Arm) -> list[Setting]:
    """Return the settings, but the seed, in which the runs of one arm differ from each other."""
    alone = [Arm(name=run.name, runs=(run,)) for run in arm.runs]
    ignored = ("metadata", SEED)
    return [s for s in differing_settings(alone) if (s.where, s.name) != ignored]


def _all_settings(arms: Sequence[Arm]) -> list[Setting]:
    runs = [run for arm in arms for run in arm.runs]
    found = _recipe_settings(arms)
    for where, leaves_of in (("metadata", _metadata), ("environment", _environment), ("run", _run)):
        leaves = {run.name: leaves_of(run) for run in runs}
        found += [_setting(where, name, arms, leaves) for name in _names(leaves.values())]
    return found


def _setting(where: str, name: str, arms: Sequence[Arm], leaves: Mapping[str, Leaves]) -> Setting:
    values = {}
    for arm in arms:
        known = dict.fromkeys(leaves[run.name].get(name) for run in arm.runs)
        texts = sorted("none" if value is None else value for value in known)
        values[arm.name] = None if list(known) == [None] else ", ".join(texts)
    return Setting(where=where, name=name, values=values)


def _recipe_settings(arms: Sequence[Arm]) -> list[Setting]:
    """Return the leaves of the recipes; only whether there is one where some have none."""
    runs = [run for arm in arms for run in arm.runs]
    without = [run for run in runs if run.header.recipe is None]
    whole = []
    if without and len(without) < len(runs):
        texts = {run.name: {"": _summary(run.header.recipe)} for run in runs}
        whole = [_setting("recipe", "", arms, texts)]
    have = [arm for arm in arms if arm.runs[0].header.recipe is not None]
    leaves = {run.name: _recipe(run.header.recipe or {}) for arm in have for run in arm.runs}
    settings = [_setting("recipe", name, have, leaves) for name in _names(leaves.values())]
    missing: dict[str, str | None] = {arm.name: NO_RECIPE for arm in arms if arm not in have}
    folded = [s for s in _folded(settings) if len(set(s.values.values())) > 1]
    return whole + [
        Setting(
            where=s.where,
            name=s.name,
            values={arm.name: (s.values | missing)[arm.name] for arm in arms},
        )
        for s in folded
    ]


def _folded(settings: Sequence[Setting]) -> list[Setting]:
    """Put what only one kind of scaling has into the value of the kind, where kinds differ."""
    by_name = {setting.name: setting for setting in settings}
    kept = []
    for setting in settings:
        kind = by_name.get(setting.name.rpartition(" ")[0])
        is_part = kind is not None and len(set(kind.values.values())) > 1
        if not is_part or kind is None or None not in setting.values.values():
            kept.append(setting)
            continue
        leaf = setting.name.rpartition(" ")[2]
        for arm, value in setting.values.items():
            said = kind.values[arm]
            if value is not None and said is not None:
                start = f"{said[:-1]}, " if said.endswith(")") else f"{said} ("
                kind.values[arm] = f"{start}{leaf} {value})"
    return kept


def _joined(settings: Sequence[Setting]) -> list[Setting]:
    """Join the roles, or other settings of one place, that differ in the same values."""
    joined: dict[tuple[str, str, tuple[str | None, ...]], list[Setting]] = {}
    for setting in settings:
        start, leaf = _role_last(setting.name)
        key = (setting.where, start if leaf else setting.name, tuple(setting.values.values()))
        joined.setdefault(key, []).append(setting)
    return [
        Setting(where=group[0].where, name=_join_names(group), values=group[0].values)
        for group in joined.values()
    ]


def _role_last(name: str) -> tuple[str, str]:
    """Cut a name at its role: `override GLOB`, role, and what follows; no role gives "" for it."""
    words = name.split(" ")
    for i, word in enumerate(words):
        if word in ROLES and (i == 0 or words[0] == "override"):
            return " ".join([*words[:i], "*", *words[i + 1 :]]), word
    return name, ""


def _join_names(group: Sequence[Setting]) -> str:
    if len(group) == 1:
        return group[0].name
    start, _ = _role_last(group[0].name)
    return start.replace("*", ", ".join(_role_last(s.name)[1] for s in group), 1)


def _names(leaves: Iterable[Leaves]) -> list[str]:
    return list(dict.fromkeys(name for each in leaves for name in each))


def _summary(recipe: Mapping[str, Any] | None) -> str:
    """Return a recipe in a few words."""
    if recipe is None:
        return NO_RECIPE
    operands = [recipe[role] for role in ROLES if isinstance(recipe.get(role), Mapping)]
    kinds = dict.fromkeys(str(each.get("scaling")) for each in operands)
    return f"FP8, {' and '.join(kinds) or 'unknown'} scaling"


def _recipe(recipe: Mapping[str, Any]) -> Leaves:
    overrides = recipe.get("override")
    leaves = _rule({key: value for key, value in recipe.items() if key != "override"}, "")
    seen: dict[str, int] = {}
    for rule in overrides if isinstance(overrides, list) else []:
        if isinstance(rule, Mapping):
            glob = str(rule.get("match"))
            seen[glob] = seen.get(glob, 0) + 1
            start = f"override {glob}" + (f" ({seen[glob]})" if seen[glob] > 1 else "")
            said = {key: value for key, value in rule.items() if key != "match"}
            leaves |= _rule(said, f"{start} ")
    if len(seen) > 1:
        leaves["order of overrides"] = ", ".join(seen)
    return leaves


def _rule(rule: Mapping[str, Any], start: str) -> Leaves:
    """Return a rule's leaves: an operand's kind of scaling has the operand's own name."""
    leaves: Leaves = {}
    for key, value in rule.items():
        if key in ROLES and isinstance(value, Mapping):
            if "scaling" in value:
                leaves[f"{start}{key}"] = _text(value["scaling"])
            leaves |= {
                f"{start}{key} {leaf}": text
                for leaf, text in _flat(value).items()
                if leaf != "scaling"
            }
        else:
            leaves |= {f"{start}{leaf}": text for leaf, text in _flat({key: value}).items()}
    return leaves


def _metadata(run: Side) -> Leaves:
    metadata = run.header.metadata
    copied = {"recipe"} if metadata.get("recipe") == run.header.recipe else set()
    return _flat({key: value for key, value in metadata.items() if key not in copied})


def _environment(run: Side) -> Leaves:
    return _flat(run.header.environment)


def _run(run: Side) -> Leaves:
    header = run.header
    leaves = {
        "unclamp": header.unclamp_version,
        "commit": (header.git_commit or "")[:12],
        "ranks": str(header.world_size),
        "only observed": "yes" if header.observed else "no",
        **_cadence(header.cadence),
    }
    return {name: text for name, text in leaves.items() if text}


def _cadence(cadence: Cadence | None) -> Leaves:
    if cadence is None:
        return {}
    steps = {"recorded steps": cadence.casts, "inspected steps": cadence.inspect}
    return {
        name: "none"
        if every is None
        else ("each" if every.steps == 1 else f"every {every.steps}")
        + (" and clamped ones" if every.or_clamped else "")
        for name, every in steps.items()
    }


def _flat(data: Mapping[str, Any], start: str = "") -> Leaves:
    """Return plain data's leaves by dotted name; lists are leaves."""
    leaves: Leaves = {}
    for key, value in data.items():
        name = f"{start}{key}"
        if isinstance(value, Mapping) and value:
            leaves |= _flat(value, f"{name}.")
        else:
            leaves[name] = _text(value)
    return leaves


def _text(value: object) -> str:
    return value if isinstance(value, str) else to_json(value, indent=None)


def shown_values(values: Sequence[str | None]) -> list[str]:
    """Return values side by side: long ones cut, so that the first place where they differ stays.

    Example:
        >>> shown_values(["adam", None])
        ['adam', 'none']
        >>> first, second = shown_values(["/data" * 40 + "/a.bin", "/data" * 40 + "/b.bin"])
        >>> first[-16:], second[-16:]
        ('/data/data/a.bin', '/data/data/b.bin')
    """
    texts = ["none" if value is None else value for value in values]
    known = [value for value in values if value is not None]
    # Character by character is what is wanted: values need not be paths.
    same = len(os.path.commonprefix(known)) if len(set(known)) > 1 else 0  # noqa: RUF071
    return [_cut(text, same) for text in texts]


def _cut(text: str, place: int) -> str:
    """Return at most `LONGEST` characters of a text, those around a place among them."""
    if len(text) <= LONGEST:
        return text
    room = LONGEST - 2
    start = min(max(0, place - room // 2), len(text) - room)
    before, after = "…" if start else "", "…" if start + room < len(text) else ""
    return f"{before}{text[start : start + room]}{after}"
