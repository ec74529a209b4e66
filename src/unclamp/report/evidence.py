"""What others found out about a run's spikes: association with clamping, and replays. Torch-free.

Association is made by `unclamp.analysis`. Replays lie in the run's folder as `explain-*.json`, each
an `Explanation` as plain data, written by this version or an earlier one. This brings both into the
shape that a page shows. A file that is none costs itself only.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unclamp.analysis import Spike, associate
from unclamp.analysis.counterfactual import SiteShare
from unclamp.analysis.explanation import Explanation, Verdict
from unclamp.analysis.labels import named_counterfactuals
from unclamp.errors import AnalysisError
from unclamp.names import SiteName
from unclamp.runlog import RunLog

MOST_REPLAYS = 12
"""Counterfactuals that are drawn."""
MOST_CLAMPED = 250_000
"""Clamped casts of which a page asks whether spikes followed them; so many take four seconds."""
PAPER = "arXiv 2605.26189"
CAUTION = (
    f"Clamping can also do harm that the training loss does not show ({PAPER}): no spike, "
    "and no association, does not clear a site. Look at the columns clamp error and SQNR of the "
    "table of sites for that."
)

"""Said only where something was clamped."""
NOTHING_TO_ASK: dict[str, Any] = {
    "verdict": "cannot tell",
    "sentences": ["No cast was recorded, so there is no clamping that spikes could have followed."],
    "sites": [],
}
"""What stands in place of an association in a run without casts."""


def read_association(
    log: RunLog, *, spikes: Sequence[Spike] | None = None, clamped: int = 0
) -> dict[str, Any]:
    """Return `Association.to_dict()` of a run, asked about its `spikes` of the loss.

    A run that cannot be judged has the verdict "cannot tell", with the reason; so has one in which
    so many casts `clamped` that the answer would take minutes.
    """
    if clamped > MOST_CLAMPED:
        said = (
            f"{clamped:,} casts clamped: which of them spikes followed takes minutes to find out, "
            f"and a page does not ask it. `unclamp associate {log.path}` does."
        )
        return {"verdict": "cannot tell", "sentences": [said], "sites": []}
    try:
        return associate(log, spikes=spikes).to_dict()
    except AnalysisError as error:
        return {"verdict": "cannot tell", "sentences": [str(error)], "sites": []}


def caution_of(association: Mapping[str, Any] | None, *, clamped: bool) -> str | None:
    """Return the caution about harm that no spike shows; None where there can be no such harm.

    Args:
        association: Whose own caution is taken, since it names sites.
        clamped: Whether the run clamped anything.
    """
    found = association or {}
    if not clamped or found.get("is_observed"):
        return None
    return next((said for said in found.get("sentences", []) if PAPER in said), CAUTION)


def named_sites(association: Mapping[str, Any] | None) -> list[SiteName]:
    """Return the sites that an association names."""
    rows = (association or {}).get("sites") or []
    return [SiteName(row["fqn"], row["role"]) for row in rows if row.get("by")]


@dataclass(frozen=True, kw_only=True)
class ExplanationView:
    """What a file says of a spike, as a page shows it.

    Attributes:
        name: The file's, without its ending.
        sentences: What was found, or why the file cannot be read.
        reproduced: Whether the plain replay gave the run's losses.
        verdict: None where the file cannot be read.
        stated: The verdict for people, with the step from which a negative one holds.
        clamping_share: Share of the spike that is gone with nothing clamped.
        sites: What each leading site caused.
        override: The recommended change of the recipe, to paste.
        losses: Those to draw, by what was changed: `step` and `loss`, None where not finite.
    """

    name: str
    sentences: list[str]
    reproduced: bool | None = None
    verdict: Verdict | None = None
    stated: str | None = None
    clamping_share: float | None = None
    sites: list[SiteShare] = field(default_factory=list)
    override: str | None = None
    losses: dict[str, dict[str, list[Any]]] = field(default_factory=dict)


def read_explanations(path: Path) -> list[ExplanationView]:
    """Return what `explain-*.json` in a run's folder say, in the order of their names.

    A file that cannot be read has one sentence that says so. Of one that lacks a value, or holds
    one of another type, the rest is shown with its own words.
    """
    return [_explanation(file) for file in sorted(path.glob("explain-*.json"))]


def _explanation(file: Path) -> ExplanationView:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        return ExplanationView(name=file.stem, sentences=[f"{file.name} cannot be read: {error}."])
    try:
        found = Explanation.from_dict(data)
    except AnalysisError as error:
        words = data.get("words")
        said = [words] if isinstance(words, str) and words else []
        said.append(f"{file.name} cannot be read whole: {error}.")
        return _shown(file.stem, said, _readable_part(data))
    return _shown(file.stem, [found.words()], found)


def _readable_part(data: Mapping[str, object]) -> Explanation:
    """Return the explanation with what can be read of it, and entries of lists one by one."""
    kept: dict[str, object] = {}
    for key, value in data.items():
        if isinstance(value, list):
            value = [entry for entry in value if _is_readable({key: [entry]})]
        if _is_readable({key: value}):
            kept[key] = value
    return Explanation.from_dict({**_BLANK, **kept})


_BLANK = {"run": "", "onset": 0, "last": 0, "height": None, "level": None, "snapshot_step": 0}
"""What an explanation has at least."""


def _is_readable(part: Mapping[str, object]) -> bool:
    try:
        Explanation.from_dict({**_BLANK, **part})
    except AnalysisError:
        return False
    return True


def _shown(name: str, sentences: list[str], found: Explanation) -> ExplanationView:
    return ExplanationView(
        name=name,
        sentences=sentences,
        reproduced=found.reproduced,
        verdict=found.verdict,
        stated=None if found.verdict is None else found.stated,
        clamping_share=found.clamping_share,
        sites=list(found.sites),
        override=None if found.override is None else found.override.toml,
        losses={
            label: _drawn(each.losses)
            for label, each in named_counterfactuals(found)[:MOST_REPLAYS]
            if each.losses
        },
    )


def _drawn(losses: Mapping[int, float]) -> dict[str, list[Any]]:
    steps = sorted(losses)
    return {
        "step": steps,
        "loss": [losses[step] if math.isfinite(losses[step]) else None for step in steps],
    }
