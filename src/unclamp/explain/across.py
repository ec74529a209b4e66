"""What an explanation says of several ranks: whose casts clamped, and scales of each rank its own.

Ranks that hold a product agree on its amaxes, so a rank's tensor is cast with a scale that those
of others made too. What the spike would have been without that is one more replay, in which each
rank goes on from the shared histories of the snapshot with its own amaxes alone. It is asked where
amaxes differed at all between ranks.
"""

from collections.abc import Iterable

from unclamp.analysis.counterfactual import ACTUAL, OWN_SCALES
from unclamp.analysis.shares import gone
from unclamp.explain.findings import Findings
from unclamp.explain.game import Game
from unclamp.explain.replay import Trace
from unclamp.names import SiteName
from unclamp.written import counted

SHOWN_SITES = 3


def tell_of_ranks(game: Game, findings: Findings) -> None:
    """Ask and tell what only several ranks have; nothing of one alone.

    Raises:
        BudgetSpent: No replay is left for it.
    """
    ranks, plain = game.replay.ranks, game.answers[ACTUAL]
    if not ranks.are_several:
        return
    findings.note(f"Replayed on {ranks.count} ranks; losses are the means over them.")
    if told := _clamped_on(plain, ranks.count):
        findings.note(told)
    ledgers = {place.ledger for place in game.replay.sites.values()}
    if not plain.unequal or not any(ledger.shared.parts for ledger in ledgers):
        findings.publish()
        return
    trace = game.own_scales()
    share = game.share_gone(trace)
    findings.note(
        f"With scales of each rank its own from step {game.replay.snapshot.step} on, which begin "
        f"with the shared histories, {gone(share)}{_of(trace, plain)}."
    )
    findings.publish(others={**findings.found.others, OWN_SCALES.kind: share})


def _clamped_on(plain: Trace, count: int) -> str:
    """Say which sites clamped on some ranks only."""
    some = {site: ranks for site, ranks in plain.clamped_on.items() if len(ranks) < count}
    if not some:
        return ""
    # Gradients last: where a loss jumps they clamp too.
    hardest = sorted(some, key=lambda s: (s.role == "grad_output", -plain.sites[s].overshoot, s))
    shown = "; ".join(f"{site} on {_ranks(some[site])}" for site in hardest[:SHOWN_SITES])
    more = len(hardest) - SHOWN_SITES
    rest = f"; and {counted(more, 'site')} more" if more > 0 else ""
    return f"Clamped on some ranks only: {shown}{rest}."


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def _of(trace: Trace, plain: Trace) -> str:
    """Say how many elements would have been clamped."""
    would, did = _saturated(trace, plain.unequal), _saturated(plain, plain.unequal)
    return "" if would == did else f", with {would:,} clamped elements in place of {did:,}"


def _saturated(trace: Trace, sites: Iterable[SiteName]) -> int:
    return sum(trace.sites[site].saturated for site in sites if site in trace.sites)
