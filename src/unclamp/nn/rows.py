"""The recipe's settings of every scale as columns, so that an update needs no loop over sites."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclamp.nn.site import Site
from unclamp.numerics import empty_stats, scale_from_amax
from unclamp.scaling import Delayed, Dynamic, Guarded, HighPrecision, Scaling, Static

Reduction = tuple[Callable[[Tensor], Tensor], Tensor, int]
"""A function from histories to amaxes, the rows it is for, and their history length."""


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """One value a row of the ledger, in columns.

    Attributes:
        format_max: Largest value of the format.
        margin: Powers of two of headroom.
        power_of_two: Which scales are powers of two; None where none is.
        window: Which entries of its history a row looks at, `[rows, longest]`.
        is_static: Which scales never change, and `static` what they are.
        site: The site of each row.
        is_block: Which rows have an amax of their own; None where none does.
        empty: The pending statistics after an update, `[sites, len(Stat)]`.
        reductions: Rows whose amax is not the maximum of their window.
        takes_own: Which scales are the tensor's own.
        is_ageless: Which scales come from no amax in particular.
    """

    format_max: Tensor
    margin: Tensor
    power_of_two: Tensor | None
    window: Tensor
    is_static: Tensor
    static: Tensor
    site: Tensor
    is_block: Tensor | None
    empty: Tensor
    reductions: tuple[Reduction, ...]
    takes_own: Tensor
    is_ageless: Tensor

    @classmethod
    def of(cls, sites: list[Site], longest: int, device: torch.device) -> "RowSettings":
        """Return the columns of these sites, for histories of `longest` entries."""
        counts = torch.tensor([site.scales for site in sites], dtype=torch.int64)
        of_row = torch.repeat_interleave(counts).to(device)

        def column(values: Iterable[float | bool], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)[of_row]

        scalings = [site.operand.scaling for site in sites]
        powers = [site.power_of_two for site in sites]
        static = [s.scale if isinstance(s, Static) else 0.0 for s in scalings]
        has_blocks = any(site.scales > 1 for site in sites)
        return cls(
            format_max=column(site.operand.format.max for site in sites),
            margin=column(site.margin for site in sites),
            power_of_two=column(powers, torch.bool) if any(powers) else None,
            window=torch.arange(longest, device=device)
            < column(map(_window, sites), torch.int64).unsqueeze(1),
            is_static=column((isinstance(s, Static) for s in scalings), torch.bool),
            static=column(static),
            site=of_row,
            is_block=column((s.scales > 1 for s in sites), torch.bool) if has_blocks else None,
            empty=empty_stats(len(sites), device),
            reductions=_reductions(sites, device),
            takes_own=column(
                (isinstance(s, Dynamic | HighPrecision) for s in scalings), torch.bool
            ),
            is_ageless=column(map(_is_ageless, scalings), torch.bool),
        )

    def newest(self, site_amax: Tensor, block_amax: Tensor) -> Tensor:
        """Return each row's amax since the last update, float32; -1 where nothing was seen."""
        amax = site_amax.to(torch.float32)[self.site]
        return amax if self.is_block is None else torch.where(self.is_block, block_amax, amax)

    def scale_age(self, history: Tensor, scale: Tensor, *, sites: int) -> Tensor:
        """Return each site's updates since the amax that its scale comes from, int64 `[sites]`.

        The newest of equals counts, and of a site's blocks the oldest. 0 where the scale is the
        tensor's own; -1 where it comes from no single amax, or from none in the history.
        """
        largest = torch.where(self.window, history, -1)
        value, newest = largest.max(dim=1)
        age = torch.where(value > 0, newest + 1, -1)
        age = torch.where(self.is_ageless, -1, age)
        age = torch.where(self.takes_own | (scale == 0), 0, age)
        oldest = torch.full((sites,), -1, dtype=age.dtype, device=age.device)
        return oldest.scatter_reduce_(0, self.site, age, "amax")

    def scale(self, history: Tensor, *, previous: Tensor) -> Tensor:
        """Return the scales that follow from the histories; `previous` where they say nothing."""
        amax = torch.where(self.window, history, 0).amax(dim=1)
        for reduce, rows, length in self.reductions:
            amax[rows] = reduce(history[rows, :length])
        scale = scale_from_amax(
            amax,
            self.format_max,
            margin=self.margin,
            power_of_two=False if self.power_of_two is None else self.power_of_two,
            previous=previous,
        )
        return torch.where(self.is_static, self.static, scale)


def _reductions(sites: list[Site], device: torch.device) -> tuple[Reduction, ...]:
    groups: dict[tuple[Callable[[Any], Any], int], list[int]] = {}
    row = 0
    for site in sites:
        scaling, last = site.operand.scaling, row + site.scales
        if isinstance(scaling, Delayed | Guarded) and not isinstance(scaling.reduce, str):
            groups.setdefault((scaling.reduce, scaling.history_len), []).extend(range(row, last))
        row = last
    return tuple(
        (reduce, torch.tensor(found, device=device), length)
        for (reduce, length), found in groups.items()
    )


def _is_ageless(scaling: Scaling) -> bool:
    return isinstance(scaling, Static) or callable(getattr(scaling, "reduce", None))


def _window(site: Site) -> int:
    """Newest entries whose maximum is the amax; "most_recent" looks at one."""
    return 1 if getattr(site.operand.scaling, "reduce", None) == "most_recent" else site.history_len
