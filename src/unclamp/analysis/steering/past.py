"""Past amaxes of sites, one update at a time, as `unclamp.policy` reads them."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Past:
    """A history a site, each with a cursor of its own: a site that cast nothing keeps what it has.

    Attributes:
        amaxes: Float32 `[sites, length]`, 0 where nothing was measured.
        cursor: Where each site's newest stands, `[sites]`.
    """

    amaxes: np.ndarray
    cursor: np.ndarray

    @classmethod
    def of(cls, sites: int, length: int) -> "Past":
        """Return new histories."""
        return cls(np.zeros((sites, length), np.float32), np.zeros(sites, np.int64))

    @property
    def length(self) -> int:
        """Updates remembered."""
        return self.amaxes.shape[1]

    def push(self, amax: np.ndarray, is_cast: np.ndarray) -> None:
        """Enter each site's amax where it cast anything."""
        rows = np.flatnonzero(is_cast)
        self.cursor[rows] = (self.cursor[rows] + 1) % self.length
        self.amaxes[rows, self.cursor[rows]] = amax[rows]

    def amax(self, window: np.ndarray) -> np.ndarray:
        """Return the largest of the newest `window[i]` amaxes of each site."""
        largest = int(window.max(initial=1))
        if (window >= self.length).all():
            return self.amaxes.max(1)
        newest = self.newest(np.arange(len(window)), min(largest, self.length))
        return np.where(np.arange(newest.shape[1]) < window[:, None], newest, 0).max(1)

    def newest(self, rows: np.ndarray, length: int) -> np.ndarray:
        """Return the newest amaxes of some sites, newest first, `[rows, length]`."""
        at = (self.cursor[rows][:, None] - np.arange(length)) % self.length
        return self.amaxes[rows[:, None], at]
