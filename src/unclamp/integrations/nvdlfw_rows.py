"""What nvdlfw-inspect's statistics say of casts: rows of a run log. Neither torch nor it is loaded.

A statistic is called `<layer>_<tensor>_<stat>`; those of FP8 may begin with a recipe, as in
`fp8_delayed_scaling_scale_inv_max`. Of a cast they tell the amax and the scale. `overflows%` counts
elements at the largest value, which need not have been clamped, and shares need a number of
elements that no statistic tells: these go into the steps' scalars under their own names.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unclamp.formats import E4M3FN, E5M2, Format
from unclamp.names import Role, SiteName
from unclamp.runlog import Columns
from unclamp.totals import headroom_bits

TENSORS: Mapping[str, Role] = {
    "activation": "input",
    "weight": "weight",
    "gradient": "grad_output",
}
"""The operands among the tensors of Transformer Engine's layers, which has others too."""
SCALINGS = {
    "delayed_scaling": "delayed",
    "current_scaling": "dynamic",
    "block_scaling": "dynamic",
    "mxfp8": "dynamic",
    "nvfp4": "dynamic",
}
"""What the recipe in a statistic's name says of the scaling."""
_NAME = re.compile(
    r"(?P<layer>.+)_(?P<tensor>activation|weight|gradient|output|wgrad|dgrad)_(?P<stat>.+)"
)
_SCALE = re.compile(r"(?:(?P<recipe>\w+)_)?scale_inv_(?P<end>min|max)")

NONFINITE_EVENT = "nonfinite"
"""The event that names tensors with Inf or NaN: no column of casts has room for such an amax."""
Formats = Literal["hybrid", "e4m3"]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """The name of a number, taken apart.

    Attributes:
        layer: Name of the layer.
        tensor: One of its tensors, as nvdlfw-inspect calls it.
        stat: What it is of it.
    """

    layer: str
    tensor: str
    stat: str

    @classmethod
    def parse(cls, name: str) -> "Statistic | None":
        """Return the statistic of this name; None for what is no tensor's."""
        found = _NAME.fullmatch(name.strip())
        return None if found is None else cls(**found.groupdict())

    @property
    def site(self) -> SiteName | None:
        """The site that it is of; None of a tensor that is no operand."""
        role = TENSORS.get(self.tensor)
        return None if role is None else SiteName(self.layer, role)


@dataclass
class _Tensor:
    """What an iteration tells of one operand."""

    amax: float | None = None
    low: float | None = None
    high: float | None = None
    inverses: dict[str, float] = field(default_factory=dict)
    recipe: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether an element was Inf or NaN."""
        ends = (self.amax, self.low, self.high)
        return not all(end is None or math.isfinite(end) for end in ends)

    def take(self, stat: str, value: float) -> bool:
        """Note a number; return whether it is one of a cast."""
        scale = _SCALE.fullmatch(stat)
        if stat == "cur_amax":
            self.amax = value
        elif stat == "min":
            self.low = value
        elif stat == "max":
            self.high = value
        elif scale is not None:
            recipe = scale["recipe"] or ""
            # Of several recipes the one that trains counts: it has no name, or is delayed.
            if not self.inverses or not recipe or "delayed" in recipe:
                if recipe != self.recipe:
                    self.inverses.clear()
                self.recipe = recipe
                self.inverses[scale["end"]] = value
        else:
            return False
        return True


class Rows:
    """Makes rows of casts from statistics.

    Args:
        ids: Free ids of sites.
        formats: "hybrid" for E5M2 gradients, "e4m3" for E4M3 throughout; no statistic tells.
        decimals: Decimals that were written; None for all there were.
        replicated: Whether a lower rank wrote the same.

    Attributes:
        zeros: How many values of each kind were written as 0 and may have been another number.
    """

    def __init__(
        self,
        ids: Iterator[int],
        *,
        formats: Formats = "hybrid",
        decimals: int | None = None,
        replicated: bool = False,
    ) -> None:
        self._ids, self._formats, self._replicated = ids, formats, replicated
        self._half = 0.0 if decimals is None else 0.5 * 10.0**-decimals
        self._sites: dict[SiteName, int] = {}
        self._new: list[tuple[int, SiteName, str]] = []
        self._broken: list[tuple[int, list[SiteName]]] = []
        self.zeros: dict[str, int] = {}

    @property
    def names(self) -> set[SiteName]:
        """The sites that came up so far."""
        return set(self._sites)

    def casts(
        self, iteration: int, values: Mapping[str, float]
    ) -> tuple[Columns, dict[str, float]]:
        """Return the rows of an iteration, and the numbers that no column holds, by name."""
        tensors: dict[SiteName, _Tensor] = {}
        others: dict[str, float] = {}
        for name, value in values.items():
            statistic = Statistic.parse(name)
            site = None if statistic is None else statistic.site
            if statistic is None or site is None:
                others[name] = value
            elif not tensors.setdefault(site, _Tensor()).take(statistic.stat, value):
                others[name] = value
                tensors[site].recipe = tensors[site].recipe or _recipe_of(statistic.stat)
        self._count_zeros(values)
        if broken := [site for site, own in sorted(tensors.items()) if own.is_broken]:
            self._broken.append((iteration, broken))
        every = (self._row(iteration, site, own) for site, own in sorted(tensors.items()))
        rows = [row for row in every if row is not None]
        return ({key: [row[key] for row in rows] for key in rows[0]} if rows else {}), others

    def events(self) -> Columns:
        """Return the events since the last call: which tensors had Inf or NaN."""
        taken, self._broken = self._broken, []
        if not taken:
            return {}
        sites = [{"sites": [site.to_dict() for site in broken]} for _, broken in taken]
        return {
            "step": [iteration for iteration, _ in taken],
            "kind": [NONFINITE_EVENT] * len(taken),
            "data": [json.dumps(each) for each in sites],
        }

    def new_sites(self) -> Columns:
        """Return the rows of sites that came up since the last call."""
        taken, self._new = self._new, []
        if not taken:
            return {}
        formats = [self._format(name) for _, name, _ in taken]
        return {
            "site": [number for number, _, _ in taken],
            "fqn": [name.fqn for _, name, _ in taken],
            "role": [name.role for _, name, _ in taken],
            "format": [fmt.name for fmt in formats],
            "scaling": [scaling for _, _, scaling in taken],
            "format_max": [fmt.max for fmt in formats],
            "replicated": [self._replicated] * len(taken),
            "only_counted": [False] * len(taken),
        }

    def _row(self, iteration: int, site: SiteName, tensor: _Tensor) -> dict[str, Any] | None:
        """Return a cast; None where neither its amax nor its scale is known."""
        ends = [abs(end) for end in (tensor.low, tensor.high) if end is not None]
        amax = tensor.amax if tensor.amax is not None else max(ends, default=None)
        inverse = tensor.inverses.get("max", tensor.inverses.get("min"))
        amax, inverse = _told(amax), _told(inverse)
        if amax is None and inverse is None:
            return None
        scaling = _scaling_of(tensor.recipe)
        fmt = self._format(site)
        scale = None if inverse is None else 1 / inverse
        return {
            "step": iteration,
            "site": self._number(site, scaling),
            "amax": amax,
            "scale": scale,
            "recast": 0,
            "clamped": self._clamped(amax, inverse, fmt, scaling),
            "microsteps": 1,
            "headroom_bits": None
            if amax is None or scale is None
            else headroom_bits(amax * scale, fmt.max),
        }

    def _clamped(
        self, amax: float | None, inverse: float | None, fmt: Format, scaling: str
    ) -> bool | None:
        """Return whether the cast clamped, whatever the numbers were before they were rounded."""
        if scaling == "dynamic":
            return False
        if amax is None or inverse is None:
            return None
        least = max(amax - self._half, 0) / (inverse + self._half)
        most = math.inf if inverse <= self._half else (amax + self._half) / (inverse - self._half)
        if least > fmt.overflow_limit:
            return True
        return False if most <= fmt.overflow_limit else None

    def _number(self, site: SiteName, scaling: str) -> int:
        if site not in self._sites:
            self._sites[site] = next(self._ids)
            self._new.append((self._sites[site], site, scaling))
        return self._sites[site]

    def _format(self, site: SiteName) -> Format:
        is_e5m2 = self._formats == "hybrid" and site.role == "grad_output"
        return E5M2 if is_e5m2 else E4M3FN

    def _count_zeros(self, values: Mapping[str, float]) -> None:
        if not self._half:
            return
        for name, value in values.items():
            statistic = Statistic.parse(name)
            kind = _kind_of(statistic.stat) if statistic is not None and value == 0 else None
            if kind is not None:
                self.zeros[kind] = self.zeros.get(kind, 0) + 1


def _told(value: float | None) -> float | None:
    """Return a number that is one: 0 may be anything that was rounded to it."""
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _kind_of(stat: str) -> str | None:
    """Return what a statistic that cannot be 0, but of a tensor of zeros, is called."""
    if stat == "cur_amax":
        return "amax"
    if _SCALE.fullmatch(stat):
        return "scale_inv"
    return "mse" if stat.endswith("mse") else None


def _recipe_of(stat: str) -> str:
    return next((known for known in SCALINGS if known in stat), "")


def _scaling_of(recipe: str) -> str:
    return next((scaling for known, scaling in SCALINGS.items() if known in recipe), "unknown")


def free_ids(rank: int, world_size: int, *, first: int = 0) -> Iterator[int]:
    """Return the ids that a rank may give to its sites."""
    return itertools.count(first + rank, world_size)
