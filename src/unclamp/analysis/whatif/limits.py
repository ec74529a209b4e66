"""What a log cannot know of other policies, in sentences."""

from collections.abc import Sequence

from unclamp.runlog import RunLog, thinned_words
from unclamp.runlog.sites import COMPUTED_SQL
from unclamp.scaling import Scaling
from unclamp.totals import CLAMPED_SQL
from unclamp.written import counted

FACTS_SQL = f"""
    WITH sums AS (
        SELECT rank, site, count(*) AS casts, count(*) FILTER ({CLAMPED_SQL}) AS clamped,
            count(*) FILTER (microsteps > 1) AS merged
        FROM casts GROUP BY rank, site)
    SELECT sum(casts)::BIGINT AS casts, sum(clamped)::BIGINT AS clamped,
        sum(merged)::BIGINT AS merged
    FROM sums SEMI JOIN ({COMPUTED_SQL}) USING (rank, site)"""
STEPS_SQL = """
    SELECT count(*) AS steps, max(step) - min(step) + 1 AS span
    FROM (SELECT DISTINCT step FROM casts)"""


def find_limits(
    log: RunLog, policies: Sequence[Scaling], *, looked_at: int, known: int
) -> tuple[str, ...]:
    """Return sentences on how far the log's amaxes are those of another policy.

    `looked_at` of the `known` inspected casts were looked at for what they lose.
    """
    header = log.header
    (facts,), (steps,) = (log.sql(query).to_pylist() for query in (FACTS_SQL, STEPS_SQL))
    facts |= steps
    said = [_bias(facts, observed=header.observed)]
    remembers = any(policy.remembers for policy in policies)
    if remembers and facts["steps"] < facts["span"]:
        said.append(
            f"The log has casts of {facts['steps']:,} of {facts['span']:,} steps: histories are "
            "made of what was recorded, so they look further back than a training's, and a jump "
            "between two recorded steps is not seen."
        )
    if header.cadence is not None and header.cadence.casts.or_clamped and remembers:
        said.append(
            "Between the steps of the cadence only clamped casts were recorded: the others' "
            "amaxes are missing, so clamping is overstated there."
        )
    if (thinned := thinned_words(header.thinned)) is not None:
        said.append(
            f"{thinned} What is counted here is of the rows that are left, so there are fewer "
            "casts. Between kept steps these are clamped ones alone, so that the share of casts "
            "that a policy with a history would clamp is overstated."
        )
    if facts["merged"]:
        said.append(
            f"{counted(facts['merged'], 'row')} of {facts['casts']:,} stand for several "
            "microsteps, of which the log keeps the largest amax: scales are exact, a clamped row "
            "counts once, and so does a repeated one, however many of its casts were."
        )
    if header.counts == "casts":
        said.append(
            "Nobody counted this run's elements: what casts lose is unknown, and reads are those "
            "of a cast, large tensors and small ones alike."
        )
    elif not looked_at:
        said.append(
            "No cast was inspected: what casts lose (elements, clamp error, underflow) is unknown. "
            "Recorder(inspect=) counts exponents."
        )
    elif looked_at < known:
        said.append(
            f"What casts lose is of {looked_at:,} of {known:,} inspected casts, spread over steps."
        )
    return tuple(said)


def _bias(facts: dict[str, int], *, observed: bool) -> str:
    if observed:
        return (
            "The run was observed, and nothing was computed in FP8: its amaxes are those of a "
            "training without clamping (unbiased), and without FP8's rounding."
        )
    if not facts["clamped"]:
        return (
            "Nothing was clamped in this run: its amaxes are those of a training without "
            "clamping (unbiased)."
        )
    return (
        f"{counted(facts['clamped'], 'cast')} of {facts['casts']:,} were clamped in this run, so "
        "its later tensors are not those of another policy. What lies behind a clamp in the same "
        "step is too small, so that clamping there is understated; where clamping made the loss "
        "spike, gradients are too large, so that theirs is overstated. A log of a dynamic, guarded "
        "or observed run tells it without bias."
    )
