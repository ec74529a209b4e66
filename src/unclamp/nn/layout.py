"""Which row of a ledger is whose: sites, the scales of each, and what their scalings come to.

A site has one scale with a history, that of its tensor's amax; only a weight whose rows or blocks
have delayed or guarded scales has one a block. A site keeps its history whatever its scaling, as
long as its blocks stay the same, so that switching to another and back loses nothing.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unclamp.formats import Format
from unclamp.names import Gemm, Role, SiteName
from unclamp.nn.ring import Ring
from unclamp.numerics import CastPlan, block_grid
from unclamp.policy import Settings, history_len_of
from unclamp.rule import Operand
from unclamp.scaling import PER_TENSOR, Granularity, Scaling

Axis = Literal[0, 1]
"""The axis of an operand, as the layer holds it, that a GEMM contracts."""
AXES: dict[tuple[Role, Gemm], Axis] = {
    ("input", "output"): 1,
    ("weight", "output"): 1,
    ("grad_output", "grad_input"): 1,
    ("weight", "grad_input"): 0,
    ("grad_output", "grad_weight"): 0,
    ("input", "grad_weight"): 0,
}
"""The axis of each operand, as the product holds it, that each GEMM contracts."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One operand of one layer, and what the recipe gives it.

    `shape` is that of a weight, whose blocks can have histories; empty for other roles. Such
    histories are of the blocks of `remembers`: those of its scaling, or of the one before it.
    """

    name: SiteName
    operand: Operand
    shape: tuple[int, ...] = ()
    remembers: Granularity = PER_TENSOR

    @classmethod
    def of(cls, fqn: str, role: Role, operand: Operand, *, shape: tuple[int, ...] = ()) -> "Site":
        """Return the site whose histories are those that its scaling wants."""
        scaling = operand.scaling
        remembers = scaling.granularity if scaling.remembers else PER_TENSOR
        return cls(name=SiteName(str(fqn), role), operand=operand, shape=shape, remembers=remembers)

    def switched(self, scaling: Scaling) -> "Site":
        """Return the site under another scaling; it goes on remembering what can go on."""
        operand = replace(self.operand, scaling=scaling)
        same = scaling.granularity == self.remembers or not scaling.casts
        if same and not scaling.remembers:
            return replace(self, operand=operand)
        return Site.of(self.fqn, self.role, operand, shape=self.shape)

    @property
    def fqn(self) -> str:
        """Dotted name of its layer."""
        return self.name.fqn

    @property
    def role(self) -> Role:
        """Which operand of the layer it is."""
        return self.name.role

    @property
    def history_len(self) -> int:
        """Updates that its scaling looks back on."""
        return history_len_of(self.operand.scaling)

    @property
    def is_delayed(self) -> bool:
        """Whether its scale follows from its history."""
        scaling = self.operand.scaling
        return scaling.casts and not scaling.takes_own and scaling.fixed_scale is None

    @property
    def grids(self) -> dict[Axis, tuple[int, int]]:
        """Shape of the scales with a history, for a cast along each axis; empty per tensor."""
        if self.remembers.is_whole:
            return {}
        block, (rows, columns) = self.remembers.block, self.shape
        grids: dict[Axis, tuple[int, int]] = {1: block_grid(rows, columns, block)}
        if not self.remembers.is_square:
            grids[0] = block_grid(columns, rows, block)
        return grids

    @property
    def scales(self) -> int:
        """Scales with a history of their own: one, or one a block of each cast."""
        return sum(rows * columns for rows, columns in self.grids.values()) or 1

    @property
    def cast_plan(self) -> CastPlan | None:
        """How it is cast; None in high precision."""
        scaling = self.operand.scaling
        if not scaling.casts:
            return None
        return _plan(
            self.operand.format,
            scaling.granularity,
            scaling.margin,
            scaling.power_of_two,
            scaling.guards,
        )

    @property
    def guarded_plan(self) -> CastPlan | None:
        """How it is cast so that nothing clamps; None where its scale has no history."""
        plan = self.cast_plan
        return guarded(plan) if plan is not None and self.is_delayed else None


@functools.cache  # one object for equal plans, by which a compiled graph knows them
def _plan(
    fmt: Format, granularity: Granularity, margin: int, power_of_two: bool, guard: bool
) -> CastPlan:
    return CastPlan(
        format=fmt, granularity=granularity, margin=margin, power_of_two=power_of_two, guard=guard
    )


@functools.cache
def guarded(plan: CastPlan) -> CastPlan:
    """Return the plan of a cast that clamps nothing: it casts again where it would."""
    return plan if plan.guard else replace(plan, guard=True)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of some sites.

    Attributes:
        rows: Their numbers, int64.
        longest: Updates that one of their scalings looks back on, the longest.
        settings: What their scalings and formats come to, in the order of `rows`.
    """

    rows: Tensor
    longest: int
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sites in the order they were added, and the rows of each.

    Attributes:
        sites: One after the other; a site's number is its place here.
        first_row: The first row of each site.
        remembered: Updates that each site remembers: what it looks back on now, or once did.
        settings: What each row's scaling and format come to, on the ledger's device.
        site_of_row: The site of each row, int64.
        is_block: Which rows have an amax of their own; None where none does.
    """

    sites: list[Site]
    first_row: list[int]
    remembered: list[int]
    settings: Settings
    site_of_row: Tensor
    is_block: Tensor | None

    @classmethod
    @torch.inference_mode(False)  # its tensors have no version, and could not train
    def of(
        cls, sites: list[Site], *, device: torch.device, remembered: Sequence[int] = ()
    ) -> "Layout":
        """Give these sites rows; the first ones remember at least as many updates as told."""
        counts = [site.scales for site in sites]
        lengths = itertools.zip_longest(
            (site.history_len for site in sites), remembered, fillvalue=0
        )
        has_blocks = max(counts, default=1) > 1

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device)

        return cls(
            sites=sites,
            first_row=[0, *itertools.accumulate(counts[:-1])] if counts else [],
            remembered=[max(pair) for pair in lengths],
            settings=Settings.of([site.operand for site in sites], counts).mapped(column),
            site_of_row=column(np.repeat(np.arange(len(sites)), counts)),
            is_block=column(np.repeat(np.array(counts) > 1, counts)) if has_blocks else None,
        )

    @property
    def rows(self) -> int:
        """Rows of all sites."""
        return len(self.site_of_row)

    @property
    def longest(self) -> int:
        """Updates that some site remembers."""
        return max(self.remembered, default=1)

    def rows_of(self, index: int) -> slice:
        """Return the rows of a site."""
        first = self.first_row[index]
        return slice(first, first + self.sites[index].scales)

    def numbers_of(self, indices: Sequence[int]) -> Tensor:
        """Return the numbers of the rows of some sites, int64."""
        rows = [range(*self.rows_of(index).indices(self.rows)) for index in indices]
        return torch.tensor(list(itertools.chain(*rows)), dtype=torch.int64, device="cpu").to(
            self.site_of_row.device
        )

    def part(self, indices: Iterable[int]) -> "Part":
        """Return the rows of some sites, and what decides their scales."""
        numbers = list(indices)
        sites, rows = [self.sites[index] for index in numbers], self.numbers_of(numbers)
        settings = Settings.of([site.operand for site in sites], [site.scales for site in sites])
        return Part(
            rows=rows,
            longest=max((site.history_len for site in sites), default=1),
            settings=settings.mapped(lambda column: torch.from_numpy(column).to(rows.device)),
        )

    def newest(self, site_amax: Tensor, block_amax: Tensor) -> Tensor:
        """Return each row's amax since the last update, float32; -1 where nothing was seen."""
        amax = site_amax.to(torch.float32)[self.site_of_row]
        return amax if self.is_block is None else torch.where(self.is_block, block_amax, amax)

    def scale_age(self, ring: Ring, scale: Tensor) -> Tensor:
        """Return each site's updates since the amax that its scale comes from, int64 `[sites]`.

        The newest of equals counts, and of a site's blocks the oldest. 0 where the scale is the
        tensor's own; -1 where it comes from no single amax, or from none in the history.
        """
        amax = ring.amax(self.settings.window)
        age = ring.age_of(amax, self.settings.window).to(torch.int64)
        age = torch.where((amax > 0) & ~self.settings.is_ageless, age, -1)
        age = torch.where(self.settings.takes_own | (scale == 0), 0, age)
        oldest = torch.full((len(self.sites),), -1, dtype=age.dtype, device=age.device)
        return oldest.scatter_reduce_(0, self.site_of_row, age, "amax")
