"""What others found out about a run's spikes: association with clamping, and replays. Torch-free.

Association is made by `unclamp.analysis`; replays lie in the run's folder as `explain-*.json`.
This brings both into the shape that a page shows, and tolerates files that lack keys.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclamp.analysis import associate
from unclamp.errors import AnalysisError
from unclamp.runlog import RunLog

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
    and `losses`, None or empty where the file has none. A file that cannot be read has one
    sentence that says so.
    """
    return [_explanation(file) for file in sorted(path.glob("explain-*.json"))]


def _explanation(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        found = {"sentences": [f"{file.name} cannot be read: {error}"]}
    text = found.get("sentences") or found.get("text") or []
    override = found.get("override")
    return {
        "name": file.stem,
        "sentences": [text] if isinstance(text, str) else [str(line) for line in text],
        "reproduced": found.get("reproduced"),
        "verdict": found.get("verdict"),
        "clamping_share": found.get("clamping_share"),
        "sites": [site for site in found.get("sites") or [] if isinstance(site, dict)],
        "override": override
        if isinstance(override, str | None)
        else json.dumps(override, indent=1),
        "losses": _losses(found.get("losses")),
    }


def _losses(given: object) -> dict[str, dict[str, list[Any]]]:
    """Return the loss under each counterfactual as steps and values; pairs of another shape go."""
    if not isinstance(given, dict):
        return {}
    curves = {}
    for name, pairs in given.items():
        kept = [p for p in pairs or [] if isinstance(p, list | tuple) and len(p) == 2]
        if kept:
            curves[str(name)] = {"step": [p[0] for p in kept], "loss": [p[1] for p in kept]}
    return curves
