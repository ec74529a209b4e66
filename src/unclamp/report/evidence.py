"""What others found out about a run's spikes: association with clamping, and replays. Torch-free.

Association is made by `unclamp.analysis`. Replays lie in the run's folder as `explain-*.json`, each
an `Explanation.to_dict()` of `unclamp.explain`, which needs torch and is not imported here. This
brings both into the shape that a page shows, and tolerates files that lack keys or hold others.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from unclamp.analysis import associate
from unclamp.errors import AnalysisError
from unclamp.runlog import RunLog

_T = TypeVar("_T")
MOST_REPLAYS, LEADING_SITES = 12, 4
"""Replays that are drawn, and sites of which the replay that un-clamps only them is."""
_WHOLE = {
    "actual": (0, "nothing changed"),
    "blocks": (3, "a scale for every 32 elements"),
    "high_precision": (4, "no FP8 at all"),
}
"""Replays that change no sites, or all: their place in the legend, and what they are called."""
PAPER = "arXiv 2605.26189"
CAUTION = (
    f"Clamping can also do harm that the training loss does not show ({PAPER}): no spike, "
    "and no association, does not clear a site. Look at the columns clamp error and SQNR of the "
    "table of sites for that."
)


def read_association(log: RunLog) -> dict[str, Any]:
    """Return `Association.to_dict()` of a run.

    A run that cannot be judged has the verdict "cannot tell", with the reason.
    """
    try:
        return associate(log).to_dict()
    except AnalysisError as error:
        return {"verdict": "cannot tell", "sentences": [str(error)], "sites": []}


def named_sites(association: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return fqn and role of the sites that an association names."""
    rows = (association or {}).get("sites") or []
    return [(row["fqn"], row["role"]) for row in rows if row.get("by")]


def read_explanations(path: Path) -> list[dict[str, Any]]:
    """Return what `explain-*.json` in a run's folder say, in the order of their names.

    Each has `name`, `sentences`, `reproduced`, `verdict`, `clamping_share`, `sites`, `override`
    and `losses`, None or empty where the file has none or something of another type. A file that
    cannot be read has one sentence that says so.
    """
    return [_explanation(file) for file in sorted(path.glob("explain-*.json"))]


def _explanation(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        found = {"words": f"{file.name} cannot be read: {error}"}
    words, override = _as(str, found.get("words")), _as(dict, found.get("override")) or {}
    sites = _objects(found.get("sites"))
    return {
        "name": file.stem,
        "sentences": [words] if words else [],
        "reproduced": _as(bool, found.get("reproduced")),
        "verdict": _as(str, found.get("verdict")),
        "clamping_share": _number(found.get("clamping_share")),
        "sites": sites,
        "override": _as(str, override.get("toml")),
        "losses": replay_losses(_objects(found.get("counterfactuals")), sites),
    }


def replay_losses(
    replays: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, list[Any]]]:
    """Return the losses to draw, by what was changed: `step` and `loss`, None where not finite.

    Of up to a hundred replays: the plain one, nothing clamped, the recommended sets, other
    questions, and only one of the leading `sites` un-clamped; 12 at most.
    """
    clean = [r for r in replays if isinstance(r.get("name"), str) and _losses(r.get("losses"))]
    changed = {str(r["name"]): _changed(str(r["name"])) for r in clean}
    freed = [name for name, (kind, _) in changed.items() if kind == "unclamped"]
    free = max(freed, key=lambda name: len(changed[name][1]), default=None)
    leading = [_site_names(site) for site in sites[:LEADING_SITES]]
    labels: dict[str, tuple[int, str]] = {}
    for name, (kind, names) in changed.items():
        count = f"{len(names)} sites"
        if kind in _WHOLE:
            labels[name] = _WHOLE[kind]
        elif name == free:
            labels[name] = (1, "nothing clamped")
        elif kind in ("dynamic", "guarded"):
            labels[name] = (2, f"{kind}: {names[0] if len(names) == 1 else count}")
        elif kind == "unclamped" and set(names) in leading:
            place = leading.index(set(names))
            row = sites[place]
            who = names[0] if len(names) == 1 else str(row.get("fqn"))
            labels[name] = (5 + place, f"un-clamped only: {who}")
    order = sorted((name for name in changed if name in labels), key=lambda name: labels[name][0])
    losses = {str(r["name"]): _losses(r["losses"]) for r in clean}
    return {labels[name][1]: losses[name] for name in order[:MOST_REPLAYS]}


def _changed(name: str) -> tuple[str, list[str]]:
    """Return the kind of a replay and the sites that it changed: "unclamped: a input, b weight"."""
    kind, _, names = name.partition(": ")
    return kind, names.split(", ") if names else []


def _site_names(site: Mapping[str, Any]) -> set[str]:
    """Return the sites of a row as replays name them; those of a group are in its `sites`."""
    pairs = [p for p in _as(list, site.get("sites")) or [] if isinstance(p, list) and len(p) == 2]
    return {f"{fqn} {role}" for fqn, role in pairs or [(site.get("fqn"), site.get("role"))]}


def _losses(given: object) -> dict[str, list[Any]]:
    """Return the losses of a replay by step, rising; steps that are no numbers go."""
    pairs = {
        int(step): _number(loss)
        for step, loss in (_as(dict, given) or {}).items()
        if str(step).isdecimal()
    }
    return {"step": sorted(pairs), "loss": [pairs[s] for s in sorted(pairs)]} if pairs else {}


def _objects(given: object) -> list[dict[str, Any]]:
    return [item for item in _as(list, given) or [] if isinstance(item, dict)]


def _as(kind: type[_T], value: object) -> _T | None:
    """Return a value of a JSON file if it is of the type that is expected."""
    return value if isinstance(value, kind) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
