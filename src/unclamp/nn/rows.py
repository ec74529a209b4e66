"""The tensors of a ledger, by site: what a site's history and scales are, and how they are set."""

from collections.abc import Iterable

import torch
from torch import Tensor

from unclamp.nn.layout import Layout, Site
from unclamp.nn.ring import Ring
from unclamp.policy import Table, next_scales


class Rows:
    """Histories and scales, a row a scale; `nn.layout` says which rows are a site's.

    Attributes:
        layout: Sites and their rows.
        ring: Amax histories.
        scale: Scales, float32 `[scales]`; 0 until a first non-zero amax is known.
        block_amax: Amax of each block since the last update, float32 `[scales]`; -1 for none.
    """

    layout: Layout
    ring: Ring
    scale: Tensor
    block_amax: Tensor

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order in which they were added."""
        return self.layout.sites

    @property
    def first_row(self) -> list[int]:
        """The first row of each site."""
        return self.layout.first_row

    @property
    def amax_history(self) -> Tensor:
        """A copy of all histories, `[scales, longest history]`, newest first."""
        every = torch.arange(self.layout.rows, device=self.scale.device)
        return self.ring.newest(every, self.layout.longest)

    def history_of(self, index: int) -> Tensor:
        """Return a copy of a site's history, newest first: `[history_len]`.

        A site with a scale a block has `[scales, history_len]`.
        """
        rows = self.layout.numbers_of([index])
        history = self.ring.newest(rows, self.layout.remembered[index])
        return history[0] if self.sites[index].scales == 1 else history

    def scale_of(self, index: int) -> Tensor:
        """Return a copy of a site's scale: 0-d, or `[scales]` where it has one a block."""
        scale = self.scale[self.layout.rows_of(index)].clone()
        return scale[0] if self.sites[index].scales == 1 else scale

    def rescale(self, indices: Iterable[int]) -> None:
        """Take the scales of sites from their histories; where those say nothing they stay."""
        part = self.layout.part(indices)  # not all rows: a state_dict is loaded site by site
        past = Table(self.ring.newest(part.rows, part.longest), torch)
        scale = next_scales(past, part.settings, self.scale[part.rows], xp=torch)
        self.scale[part.rows] = scale

    def set_state(self, index: int, history: Tensor | None, scale: Tensor | None) -> None:
        """Set a site's history and scale as `Ledger.restore` says."""
        rows, count = self.layout.rows_of(index), self.sites[index].scales
        is_scale_alone = history is None and scale is not None
        self.block_amax[rows] = -1
        self.scale[rows] = 0
        if scale is not None and scale.numel() == count:
            saved = scale.reshape(count).to(self.scale)
            self.scale[rows] = torch.where(saved > 0, saved, 0)  # NaN means nothing measured
        if history is None or history.numel() // max(history.shape[-1], 1) != count:
            history = torch.zeros(count, 0)
        if not is_scale_alone:
            newest = history.reshape(count, -1)[:, : self.layout.remembered[index]]
            self.ring.write(self.layout.numbers_of([index]), newest)
            self.rescale([index])
