"""The scales that a policy makes of amaxes, by the code that trains (`unclamp.policy`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from unclamp.analysis.whatif.amaxes import Chunk
from unclamp.formats import Format
from unclamp.policy import Settings, history_len_of, overflows, scale_for
from unclamp.rule import Operand
from unclamp.scaling import Scaling


@dataclass(frozen=True, kw_only=True)
class Casts:
    """What a policy does to a chunk's casts, `[sites, longest]` each.

    Attributes:
        scale: The scale that each cast is tried with, float32; 0: the tensor's own, as nothing
            was known.
        clamps: Whether that scale clamps the largest element.
    """

    scale: np.ndarray
    clamps: np.ndarray


@dataclass
class Windows:
    """Largest amax of the newest ones of each site, for several lengths, over chunks.

    `ahead` holds each site's newest amaxes of the chunks before, newest last: one less than the
    longest window has.
    """

    windows: tuple[int, ...]
    ahead: np.ndarray

    @classmethod
    def of(cls, windows: Iterable[int], sites: int) -> "Windows":
        """Return it before any amax was seen: zeros, as in a new history."""
        windows = tuple(sorted(set(windows)))
        return cls(windows, np.zeros((sites, max(windows, default=1) - 1), np.float32))

    def take(self, chunk: Chunk) -> dict[int, np.ndarray]:
        """Return for each window and cast the largest of it and the `window - 1` before it.

        Those of 2n are the larger ones of two of n side by side, and those of a length in between
        of two of n that overlap. So all windows cost little more than the longest.
        """
        width, before = chunk.amax.shape[1], self.ahead.shape[1]
        known = np.concatenate([self.ahead, chunk.amax], 1)
        if (chunk.counts == width).all():
            self.ahead = known[:, known.shape[1] - before :].copy()
        else:
            ends = chunk.counts[:, None] + np.arange(before)
            self.ahead = np.take_along_axis(known, ends, 1)
        largest, length, found = known, 1, {}
        for window in self.windows:
            while 2 * length <= window:
                largest = np.maximum(largest[:, length:], largest[:, :-length])
                length *= 2
            end = largest.shape[1]
            newest, older = largest[:, end - width :], end - (window - length)
            found[window] = (
                newest
                if window == length
                else np.maximum(newest, largest[:, older - width : older])
            )
        return found


@dataclass
class Maxima:
    """The same of one window."""

    windows: Windows

    @classmethod
    def of(cls, window: int, sites: int) -> "Maxima":
        """Return it before any amax was seen."""
        return cls(Windows.of([window], sites))

    def take(self, chunk: Chunk) -> np.ndarray:
        """Return for each cast the largest of it and the `window - 1` before it."""
        (largest,) = self.windows.take(chunk).values()
        return largest


@dataclass
class Player:
    """One policy applied to some sites, chunk after chunk.

    Attributes:
        policy: The scaling.
        settings: What it comes to at each site.
        formats: Of each site.
        scale: What each site's next cast is scaled with; 0: its own, as nothing is known yet.
    """

    policy: Scaling
    settings: Settings
    formats: Sequence[Format]
    scale: np.ndarray
    past: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @classmethod
    def of(cls, policy: Scaling, formats: Sequence[Format]) -> "Player":
        """Return the policy before any cast."""
        settings = Settings.of([Operand(format=fmt, scaling=policy) for fmt in formats])
        return cls(policy, settings, formats, settings.static.copy())

    @property
    def window(self) -> int | None:
        """Newest amaxes whose maximum it takes; None: it takes a function of them, or none."""
        if self.policy.fixed_scale is not None or self.settings.reductions:
            return None
        if not self.policy.casts or self.policy.takes_own:
            return None
        return int(self.settings.window[0])

    def play(self, chunk: Chunk, largest: np.ndarray | None) -> Casts:
        """Return what it does to the next casts; `largest` is `Maxima.take` of its window."""
        if not self.policy.casts or self.policy.takes_own:
            return Casts(scale=np.zeros_like(chunk.amax), clamps=np.zeros(chunk.amax.shape, bool))
        used = self._scales(chunk, largest)
        kinds = list(dict.fromkeys(self.formats))
        with np.errstate(over="ignore"):
            # An amax beyond a site's casts is 0, which no scale clamps.
            if len(kinds) == 1:
                return Casts(scale=used, clamps=overflows(chunk.amax, used, kinds[0]))
            clamps = np.zeros(chunk.amax.shape, bool)
            for fmt in kinds:
                part = [i for i, each in enumerate(self.formats) if each == fmt]
                clamps[part] = overflows(chunk.amax[part], used[part], fmt)
        return Casts(scale=used, clamps=clamps)

    def _scales(self, chunk: Chunk, largest: np.ndarray | None) -> np.ndarray:
        """Return the scale of each cast: what followed from the one before."""
        if self.policy.fixed_scale is not None:
            return np.broadcast_to(self.settings.static[:, None], chunk.amax.shape)
        amax = self._of_function(chunk) if largest is None else largest
        powers = self.settings.power_of_two
        with np.errstate(all="ignore"):
            made = scale_for(
                amax,
                np.broadcast_to(self.settings.largest[:, None], amax.shape),
                power_of_two=powers if isinstance(powers, bool) else powers[:, None],
                previous=np.float32(np.nan),
                xp=np,
            )
        scales = _kept(np.concatenate([self.scale[:, None], made], 1))
        self.scale = np.take_along_axis(scales, chunk.counts[:, None], 1)[:, 0]
        return scales[:, :-1]

    def _of_function(self, chunk: Chunk) -> np.ndarray:
        """Return the amax that a function of a user's own makes of each history."""
        length, (sites, longest) = history_len_of(self.policy), chunk.amax.shape
        past = self.past if self.past.size else np.zeros((sites, length - 1), np.float32)
        known = np.concatenate([past, chunk.amax], 1)
        self.past = np.take_along_axis(known, chunk.counts[:, None] + np.arange(length - 1), 1)
        windows = np.lib.stride_tricks.sliding_window_view(known, length, axis=1)[..., ::-1]
        out = np.empty((sites, longest), np.float32)
        for column in range(longest):
            out[:, column] = self.policy.amax(np.ascontiguousarray(windows[:, column]), np)
        return out


def _kept(scales: np.ndarray) -> np.ndarray:
    """Return scales in which NaN, which stands for none, is the last one before it."""
    unknown = np.isnan(scales)
    if not unknown.any():
        return scales
    place = np.where(unknown, 0, np.arange(scales.shape[1]))
    return np.take_along_axis(scales, np.maximum.accumulate(place, 1), 1)
