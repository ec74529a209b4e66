"""What a backtest reads of a log: amaxes step by step, and what the log measured as harm."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from unclamp.analysis.steering.rule import Rule
from unclamp.analysis.whatif.amaxes import Chunk, places_of, read_chunks
from unclamp.runlog import RunLog
from unclamp.runlog.sites import SiteInfo


class Row(NamedTuple):
    """One step's casts: number, amaxes `[sites]` (below 0: none), elements `[sites]`."""

    step: int
    amax: np.ndarray
    elements: np.ndarray


def read_rows(log: RunLog, sites: Sequence[SiteInfo]) -> Iterator[Row]:
    """Yield the casts of sites, a step at a time."""
    for chunk in read_chunks(log, sites):
        yield from _rows_of(chunk)


def _rows_of(chunk: Chunk) -> Iterator[Row]:
    there = chunk.is_there
    steps, place = np.unique(chunk.step[there], return_inverse=True)
    shape = (len(steps), len(chunk.counts))
    amax, elements = np.full(shape, -1, np.float32), np.zeros(shape, np.int64)
    site = np.nonzero(there)[0]
    amax[place, site], elements[place, site] = chunk.amax[there], chunk.elements[there]
    for i, step in enumerate(steps.tolist()):
        yield Row(step, amax[i], elements[i])


def read_harms(log: RunLog, rule: Rule, sites: Sequence[SiteInfo]) -> set[tuple[int, int]]:
    """Return step and place of the casts that the log measured as harmful: clamp error or price.

    They are of the scaling that the log's training had; of others they say that something is in
    the tensor which a scale that is too large clamps.
    """
    is_priced = rule.price is not None and _has_prices(log)
    price = "OR price_clamp > $price" if is_priced else ""
    rows = log.sql(
        f"SELECT step, site FROM casts WHERE saturated > 0 AND (saturated_error > $most {price})",
        most=rule.tolerance,
        **({"price": rule.price} if is_priced else {}),
    )
    places = places_of(log, sites)
    pairs = zip(rows.column("step").to_pylist(), rows.column("site").to_pylist(), strict=True)
    return {(step, int(places[site])) for step, site in pairs if places[site] >= 0}


def read_prices(log: RunLog, rule: Rule, sites: Sequence[SiteInfo]) -> dict[int, np.ndarray]:
    """Return the prices of each step that the log has some of, `[sites]`, NaN where unknown.

    They are of the scaling that the log's training had; of several ranks the largest counts.
    """
    if rule.price is None or not _has_prices(log):
        return {}
    rows = log.sql(
        "SELECT step, site, coalesce(price_clamp, 0) + coalesce(price_rounding, 0) AS price "
        "FROM casts WHERE price_clamp IS NOT NULL OR price_rounding IS NOT NULL"
    )
    places = places_of(log, sites)
    found: dict[int, np.ndarray] = {}
    columns = (rows.column(name).to_pylist() for name in ("step", "site", "price"))
    for step, site, price in zip(*columns, strict=True):
        if places[site] >= 0:
            known = found.setdefault(step, np.full(len(sites), np.nan))
            known[places[site]] = np.fmax(known[places[site]], price)
    return found


def _has_prices(log: RunLog) -> bool:
    names = log.sql("SELECT * FROM casts LIMIT 0").schema.names
    return {"price_clamp", "price_rounding"} <= set(names)
