"""What the same sites lost in different arms. Torch-free.

Sites are found by name, which is the same in every run of a model. Runs need not be equally long,
or recorded equally often, so sites are ranked by clamp error a recorded cast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unclamp.names import SiteName
from unclamp.report.side_by_side.groups import Arm
from unclamp.totals import SiteTotals, share


@dataclass(frozen=True, kw_only=True)
class SiteLoss:
    """What the casts of one site lost in one arm; counts are means a run.

    Attributes:
        casts: Recorded casts of which it is known whether they clamped.
        clamped_casts: Those in which anything was clamped.
        saturated: Finite elements clamped; None where the arm's runs do not count them, and so are
            the two clamp errors and the underflow.
        clamp_error: Mean clamp error of the casts that clamped, a fraction; None without any.
        clamp_error_a_cast: Clamp error of all recorded casts, a fraction: 0 in those that did
            not clamp.
        overshoot: Largest amax over the largest representable value; None where nothing was
            clamped, where it says nothing.
        underflow_share: Non-zero elements that became zero, a fraction of all.
    """

    casts: float
    clamped_casts: float
    saturated: float | None
    clamp_error: float | None
    clamp_error_a_cast: float | None
    overshoot: float | None
    underflow_share: float | None


@dataclass(frozen=True, kw_only=True)
class SiteRowOfArms:
    """One site in all arms.

    Attributes:
        arms: By name; None where the arm did not cast there.
        difference: Largest minus smallest clamp error a recorded cast, of the arms that cast and
            count elements.
        underflow_difference: The same of the underflow.
    """

    fqn: str
    role: str
    arms: dict[str, SiteLoss | None]
    difference: float
    underflow_difference: float

    @property
    def is_clamped(self) -> bool:
        """Whether anything was clamped in any arm."""
        return any(loss is not None and loss.clamped_casts > 0 for loss in self.arms.values())


def compare_sites(arms: Sequence[Arm]) -> list[SiteRowOfArms]:
    """Return all sites, the largest difference of clamp error first, then of underflow.

    Arms that cast nothing at all are left out.
    """
    found = {arm.name: (arm.sites, len(arm.runs)) for arm in arms if arm.sites}
    names = dict.fromkeys(name for sites, _ in found.values() for name in sites)
    rows = [
        _row(site, {
            arm: _loss(sites[site], runs) if site in sites else None
            for arm, (sites, runs) in found.items()
        })
        for site in names
    ]  # fmt: skip
    rows.sort(key=lambda r: (-r.difference, -r.underflow_difference, r.fqn, r.role))
    return rows


def _row(site: SiteName, arms: dict[str, SiteLoss | None]) -> SiteRowOfArms:
    there = [loss for loss in arms.values() if loss is not None]
    errors = [loss.clamp_error_a_cast for loss in there if loss.clamp_error_a_cast is not None]
    underflows = [loss.underflow_share for loss in there if loss.underflow_share is not None]
    return SiteRowOfArms(
        fqn=site.fqn,
        role=site.role,
        arms=arms,
        difference=max(errors, default=0.0) - min(errors, default=0.0),
        underflow_difference=max(underflows, default=0.0) - min(underflows, default=0.0),
    )


def _loss(totals: SiteTotals, runs: int) -> SiteLoss:
    return SiteLoss(
        casts=totals.decided_rows / runs,
        clamped_casts=totals.clamped_rows / runs,
        saturated=totals.saturated / runs if totals.is_counted else None,
        clamp_error=totals.clamp_error if totals.clamped_rows else None,
        clamp_error_a_cast=share(totals.clamp_error_sum, float(totals.rows))
        if totals.is_counted
        else None,
        overshoot=totals.overshoot if totals.clamped_rows else None,
        underflow_share=totals.underflow_share,
    )
