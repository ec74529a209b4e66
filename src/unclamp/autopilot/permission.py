"""May a rule steer a model? Only if it was tried on a log of that model."""

import warnings
from collections.abc import Mapping

from unclamp.analysis.steering import Backtest, Rule
from unclamp.errors import RecipeError, UnclampWarning
from unclamp.names import SiteName
from unclamp.written import counted, listed, percent

MOST_FALSE = 0.02
"""Share of false switches above which a rule is warned of."""
ANYWAY = "Autopilot(..., untested=True) goes on without"


def check_there_is_one(tested: Backtest | None) -> Backtest:
    """Return the backtest.

    Raises:
        RecipeError: There is none.
    """
    if tested is None:
        raise RecipeError(
            "an Autopilot steers by a rule that was tried on a log of this model: hand in "
            "backtest=unclamp.backtest(run, rule), or the file of `unclamp backtest RUN --out "
            f"FILE`. {ANYWAY}"
        )
    return tested


def check_backtest(
    tested: Backtest, rule: Rule, sites: Mapping[SiteName, str], *, late: int
) -> None:
    """Raise unless the rule was tried on logs of a model with these sites and formats.

    Args:
        tested: The backtest.
        rule: The rule that is to steer.
        sites: Name and format of each site that it is to steer.
        late: Updates that pass here before a decision is in force.

    Raises:
        RecipeError: It is of another rule or of another model.
    """
    if tested.rule != rule:
        raise RecipeError(
            f"the backtest is of another rule: expected {rule}; got {tested.rule}. {ANYWAY}"
        )
    missing = [str(name) for name, fmt in sites.items() if tested.sites.get(name) != fmt]
    if missing:
        raise RecipeError(
            f"the backtest is of another model: its logs lack {counted(len(missing), 'site')} of "
            f"{len(sites):,}, or have them in another format, such as {listed(missing, most=3)}. "
            f"{ANYWAY}"
        )
    for said in _doubts(tested, late):
        warnings.warn(said, UnclampWarning, stacklevel=4)  # where the Autopilot is made


def _doubts(tested: Backtest, late: int) -> list[str]:
    said = []
    if tested.late < late:
        said.append(
            "here a decision is in force one step late, and the backtest had it at once: "
            "unclamp.backtest(..., late=1), or unclamp backtest --late 1, says what that means"
        )
    if tested.missed:
        said.append(
            f"in its backtest the rule left {counted(tested.missed, 'cast')} clamped above the "
            "tolerance"
        )
    if tested.false_share > MOST_FALSE:
        said.append(
            f"in its backtest {percent(tested.false_share)} of the switches up were false: back "
            "within 50 steps, and nothing avoided"
        )
    return said
