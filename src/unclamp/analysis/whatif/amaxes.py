"""The amaxes of a log, site by site in the order of its updates, a chunk of steps at a time.

A history takes one amax a site and update, and takes none of an update in which the site cast
nothing or saw no finite element. So each site's amaxes are packed: what stands one behind the other
here is what stands one behind the other in a history.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from unclamp.errors import AnalysisError
from unclamp.names import SiteName
from unclamp.runlog import RunLog
from unclamp.runlog.sites import PLACES_SQL, SiteInfo

CHUNK_ROWS = 2_000_000
"""Rows of `casts` that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive casts of all sites, each site's packed to the left.

    Shapes: `[sites, longest]`; beyond `counts[i]` nothing of site `i` is meant.

    Attributes:
        amax: Float32; 0 beyond.
        step: Of each, int64.
        elements: Of each, int64.
        counts: Casts of each site, `[sites]`.
    """

    amax: np.ndarray
    step: np.ndarray
    elements: np.ndarray
    counts: np.ndarray

    def of_sites(self, sites: slice) -> "Chunk":
        """Return the casts of some sites, without copies."""
        return Chunk(
            amax=self.amax[sites],
            step=self.step[sites],
            elements=self.elements[sites],
            counts=self.counts[sites],
        )

    @property
    def is_there(self) -> np.ndarray:
        """Which places hold a cast, bool `[sites, longest]`."""
        return np.arange(self.amax.shape[1]) < self.counts[:, None]


def chosen_sites(log: RunLog, glob: str | None) -> list[SiteInfo]:
    """Return the sites whose names match: a glob of products, roles, or of "product role".

    Without one all from whose casts something is computed; one may name the others too.
    """
    if glob is None:
        return log.computed_sites()
    sites = log.named_sites()
    found = [site for site in sites if _matches(site.name, glob)]
    if not found:
        raise AnalysisError(
            f"no site of the run matches {glob!r}; sites are named like "
            f"{', '.join(repr(f'{s.fqn} {s.role}') for s in sites[:3]) or '(there are none)'}"
        )
    return found


def _matches(name: SiteName, glob: str) -> bool:
    texts = (name.fqn, f"{name.fqn} {name.role}", name.role)
    return any(fnmatchcase(text, g) for text in texts for g in (glob, f"*.{glob}"))


def read_chunks(log: RunLog, sites: Sequence[SiteInfo]) -> Iterator[Chunk]:
    """Yield the casts of sites in the order of steps.

    On several ranks the amax is the largest of all, as ranks share it; elements add up, of what
    several hold alike once.
    """
    places = places_of(log, sites)
    steps = steps_of(log)
    width = max(CHUNK_ROWS // (max(len(sites), 1) * max(log.header.world_size, 1)), 1)
    with ThreadPoolExecutor(1) as reader:

        def read(first: int) -> Future[Chunk | None]:
            return reader.submit(_read, log, places, len(sites), first, first + width)

        # The next chunk is read while this one is worked on.
        ahead = read(steps.start)
        for first in steps[::width]:
            chunk, ahead = ahead.result(), read(first + width)
            if chunk is not None:
                yield chunk


def steps_of(log: RunLog) -> range:
    """Return the steps from the first one with casts to the last."""
    (bounds,) = log.sql("SELECT min(step) AS low, max(step) AS high FROM casts").to_pylist()
    return range(0) if bounds["low"] is None else range(bounds["low"], bounds["high"] + 1)


def places_of(log: RunLog, sites: Sequence[SiteInfo]) -> np.ndarray:
    """Return which of the sites an id stands for, -1 for none: `[largest id + 1]`."""
    wanted = {(s.fqn, s.role, s.only_counted): i for i, s in enumerate(sites)}
    rows = log.sql(f"SELECT site, fqn, role, only_counted FROM ({PLACES_SQL})").to_pylist()
    places = np.full(max((row["site"] for row in rows), default=-1) + 1, -1, np.int64)
    for row in rows:
        key = (row["fqn"], row["role"], row["only_counted"])
        places[row["site"]] = wanted.get(key, -1)
    return places


SEEN_SQL = "coalesce(nonfinite < elements, true)"
"""Whether a row of `casts` saw a finite element. One that did not enters no history."""
ELEMENTS_SQL = "coalesce(elements, 1)"
"""Elements of a row; where nobody counted them, casts are as good as each other."""
ONE_RANK_SQL = f"""
    SELECT step, site, amax, {ELEMENTS_SQL} AS elements FROM casts
    WHERE step >= $first AND step < $last AND {SEEN_SQL}"""
RANKS_SQL = f"""
    SELECT step, first AS site, max(amax) FILTER (isfinite(amax)) AS amax,
        sum({ELEMENTS_SQL}) FILTER (NOT replicated)::BIGINT AS elements
    FROM casts JOIN ({PLACES_SQL}) USING (rank, site)
    WHERE step >= $first AND step < $last AND {SEEN_SQL}
    GROUP BY step, first"""


def _read(log: RunLog, places: np.ndarray, sites: int, first: int, last: int) -> Chunk | None:
    query = ONE_RANK_SQL if log.header.world_size == 1 else RANKS_SQL
    table = log.sql(query, first=first, last=last)
    step, site, amax, elements = (
        table.column(name).to_numpy() for name in ("step", "site", "amax", "elements")
    )
    place = places[site]
    dense = _dense(step, place, np.nan_to_num(amax), elements, sites)
    if dense is not None:
        return dense
    wanted = place >= 0
    if not wanted.all():
        step, place, amax, elements = (v[wanted] for v in (step, place, amax, elements))
    if not len(step):
        return None
    if (np.diff(step) < 0).any():
        order = np.lexsort((step, place))
    else:
        order = np.argsort(place, kind="stable")
    place = place[order]
    counts = np.bincount(place, minlength=sites)
    column = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (sites, int(counts.max()))

    def packed(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        out = np.zeros(shape, dtype)
        out[place, column] = values[order]
        return out

    return Chunk(
        amax=packed(np.nan_to_num(amax), np.float32),
        step=packed(step, np.int64),
        elements=packed(elements, np.int64),
        counts=counts,
    )


def _dense(
    step: np.ndarray, place: np.ndarray, amax: np.ndarray, elements: np.ndarray, sites: int
) -> Chunk | None:
    """Return the chunk of rows in which each step has every site in the same order.

    Nothing is sorted then; None where rows are otherwise.
    """
    if not len(step) or len(step) % sites or (place < 0).any():
        return None
    order, steps = place.reshape(-1, sites), step.reshape(-1, sites)
    first = np.sort(order[0])
    if not (first == np.arange(sites)).all() or not (order == order[0]).all():
        return None
    if not (steps == steps[:, :1]).all() or not (np.diff(steps[:, 0]) > 0).all():
        return None
    back = np.argsort(order[0])
    shape = (sites, len(steps))
    return Chunk(
        amax=np.ascontiguousarray(amax.reshape(-1, sites).T[back], np.float32),
        step=np.broadcast_to(steps[:, 0], shape),
        elements=np.ascontiguousarray(elements.reshape(-1, sites).T[back], np.int64),
        counts=np.full(sites, len(steps)),
    )
