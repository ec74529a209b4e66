"""How one operand is scaled: where the scale comes from, and which elements share one.

*Scaling* (`Dynamic`, `Delayed`, `Guarded`, `Static`, `HighPrecision`) says where a scale comes
from. *Granularity* (`PerTensor`, `PerRow`, `PerBlock`, `MX`) says which elements share it, as a
block of elements *across* by elements *along* the axis that the GEMM contracts. A tensor enters
two GEMMs that contract different axes; unless its blocks are square it is therefore cast twice.

All are frozen values without torch. `docs/scaling.md` says when to use which.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from unclamp.errors import RecipeError
from unclamp.formats import unknown_name

ACCUMULATES = ("float32", "hopper", "hopper_fast")
"""How a GEMM of FP8 operands adds: in float32, or as a Hopper tensor core does, without and
with `use_fast_accum`."""
REDUCTIONS = ("max", "most_recent")
MAX_MARGIN = 64
MAX_SCALE_EXPONENT = 126

Block = tuple[int | None, int | None]
"""Elements across and along the contraction axis that share a scale; None: all of them."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor; one cast serves both GEMMs."""

    @property
    def block(self) -> Block:
        """The whole tensor."""
        return None, None

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerRow:
    """One scale for each vector along the contraction axis.

    For the output GEMM: one a token of the input, one an output feature of the weight. An
    outlier costs precision in its own row only. torchao and cuBLAS call this rowwise.
    """

    @property
    def block(self) -> Block:
        """One row, all along it."""
        return 1, None

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class PerBlock:
    """One scale a block of elements, such as 1x128 for activations and 128x128 for weights.

    Args:
        across: Elements across the contraction axis.
        along: Elements along it; 128 is where Hopper kernels promote to float32.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.
    """

    across: int
    along: int

    def __post_init__(self) -> None:
        for name in ("across", "along"):
            check_int(name, getattr(self, name), 1, 1 << 20)

    @property
    def block(self) -> Block:
        """As given."""
        return self.across, self.along

    def __str__(self) -> str:
        return f"{self.across}x{self.along}"


@dataclass(frozen=True)
class MX:
    """Microscaling: 32 elements along the contraction axis share a power of two (e8m0).

    The exponent of `scale_inv` is rounded *up*, so that the largest element never overflows;
    the floor of the OCP text saturates elements (arXiv 2506.08027, section 3).
    """

    @property
    def block(self) -> Block:
        """32 along one row."""
        return 1, 32

    def __str__(self) -> str:
        return "mx"


Granularity = PerTensor | PerRow | PerBlock | MX
PER_TENSOR = PerTensor()
_NAMED: dict[str, Granularity] = {str(g): g for g in (PER_TENSOR, PerRow(), MX())}


def parse_granularity(name: object) -> Granularity:
    """Return the granularity of a name: "tensor", "row", "mx", or "1x128" for blocks.

    Raises:
        RecipeError: No such granularity.
    """
    if isinstance(name, str):
        if name in _NAMED:
            return _NAMED[name]
        across, x, along = name.partition("x")
        if x and across.isdecimal() and along.isdecimal():
            return PerBlock(int(across), int(along))
    raise unknown_name("granularity", name, [*_NAMED, "1x128", "128x128"])


def is_square(granularity: Granularity) -> bool:
    """Whether a cast along one axis is also the cast along the other."""
    across, along = granularity.block
    return across == along


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Scale from the tensor itself: reads it twice, never saturates a finite element.

    Transformer Engine calls this current scaling. A block of zeros gets scale 1.

    Args:
        margin: Powers of two of headroom below the largest representable value.
        power_of_two: Round the scale down to a power of two, so that scaling is exact.
        granularity: Which elements share a scale.
    """

    kind: ClassVar[str] = "dynamic"
    margin: int = 0
    power_of_two: bool = False
    granularity: Granularity = PER_TENSOR

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True, kw_only=True)
class Delayed:
    """Scale from the amaxes of past optimizer steps: reads once, clamps what is new.

    Until a first amax is known the scale is taken from the tensor itself.

    Args:
        history_len: Updates remembered, 1 or more.
        reduce: "max" over the window, "most_recent", or a function from a history
            `[scales, history_len]` (newest first, 0 where nothing was measured yet) to amaxes
            `[scales]`. A recipe with a function cannot be written to TOML.
        margin: Powers of two of headroom below the largest representable value.
        power_of_two: Round the scale down to a power of two.
        granularity: Which elements share a scale; anything but the whole tensor only for
            weights, whose rows are the same ones at every step.
    """

    kind: ClassVar[str] = "delayed"
    history_len: int = 16
    reduce: str | Callable[[Any], Any] = "max"
    margin: int = 0
    power_of_two: bool = False
    granularity: Granularity = PER_TENSOR

    def __post_init__(self) -> None:
        _check_history(self)


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """Delayed scaling that never clamps: where the predicted scale would, the true one is used.

    The tensor is cast with the scale that its history predicts while its true amax is measured.
    Only if something passed the overflow limit is it cast again, with the scale of its own amax
    and no margin; the cast is counted as re-cast, and the history learns the true amax. One read
    in the common case, two in the worst; saturated finite elements: none.

    A missed prediction costs time and not information, so the history can be short: less
    underflow after an outlier than under delayed scaling. The defaults are measured
    (`lab/LOG.md`): with two updates and one power of two, 1 to 2 % of casts are repeated.

    Args:
        history_len: Updates remembered, 1 or more.
        reduce: As in `Delayed`.
        margin: Powers of two of headroom of the predicted scale; the own one has none.
        power_of_two: Round the scale down to a power of two.
        granularity: As in `Delayed`.
    """

    kind: ClassVar[str] = "guarded"
    history_len: int = 2
    reduce: str | Callable[[Any], Any] = "max"
    margin: int = 1
    power_of_two: bool = False
    granularity: Granularity = PER_TENSOR

    def __post_init__(self) -> None:
        _check_history(self)


@dataclass(frozen=True, kw_only=True)
class Static:
    """A scale that never changes: reads once, clamps beyond `format.max / scale`.

    Args:
        scale: What the tensor is multiplied by, in [2**-126, 2**126].
    """

    kind: ClassVar[str] = "static"
    scale: float

    def __post_init__(self) -> None:
        limit = 2.0**MAX_SCALE_EXPONENT
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not 1 / limit <= self.scale <= limit:
            raise RecipeError(f"expected a scale in [2**-126, 2**126], got {self.scale!r}")

    @property
    def granularity(self) -> Granularity:
        """One number scales the whole tensor."""
        return PerTensor()


@dataclass(frozen=True, kw_only=True)
class HighPrecision:
    """No cast: the operand enters its GEMMs as it is."""

    kind: ClassVar[str] = "high_precision"

    @property
    def granularity(self) -> Granularity:
        """Nothing is scaled."""
        return PerTensor()


Scaling = Dynamic | Delayed | Guarded | Static | HighPrecision
WithHistory = Delayed | Guarded
SCALINGS: dict[str, type[Scaling]] = {
    c.kind: c for c in (Dynamic, Delayed, Guarded, Static, HighPrecision)
}


def describe(scaling: Scaling) -> str:
    """Return a scaling in a word or two: its kind, and its granularity where it has blocks."""
    if isinstance(scaling.granularity, PerTensor):
        return scaling.kind
    return f"{scaling.kind} {scaling.granularity}"


def scaling_to_dict(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as plain data: its kind under "scaling", then its settings.

    Raises:
        RecipeError: A reduce function, which plain data cannot hold.
    """
    settings = {f.name: getattr(scaling, f.name) for f in fields(scaling)}
    if callable(settings.get("reduce")):
        raise RecipeError(
            "a recipe with a reduce function cannot be written down: "
            f"use one of {', '.join(REDUCTIONS)}, or keep the recipe in Python"
        )
    if "granularity" in settings:
        settings["granularity"] = str(settings["granularity"])
    return {"scaling": scaling.kind, **settings}


def scaling_from_dict(data: dict[str, Any]) -> Scaling:
    """Return the scaling that plain data describes.

    Raises:
        RecipeError: An unknown kind or setting, or one that makes no sense.
    """
    kind = data.get("scaling")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise unknown_name("scaling", kind, list(SCALINGS))
    settings = {key: value for key, value in data.items() if key != "scaling"}
    known = [f.name for f in fields(SCALINGS[kind])]
    for key in settings:
        if key not in known:
            raise unknown_name(f"key of the {kind} scaling", key, known)
    if kind == Static.kind and "scale" not in settings:
        raise RecipeError("static scaling needs its scale, such as scale = 1.0")
    if "granularity" in settings:
        settings["granularity"] = parse_granularity(settings["granularity"])
    return SCALINGS[kind](**settings)


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise a RecipeError unless `value` is an integer in low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"expected an integer {name} in {low}..{high}, got {value!r}")


def _check_common(scaling: Dynamic | WithHistory) -> None:
    check_int("margin", scaling.margin, 0, MAX_MARGIN)
    if not isinstance(scaling.power_of_two, bool):
        raise RecipeError(f"expected True or False for power_of_two, got {scaling.power_of_two!r}")
    if not isinstance(scaling.granularity, Granularity):
        raise RecipeError(
            f"expected a granularity such as PerTensor() or PerRow(), got {scaling.granularity!r}"
        )


def _check_history(scaling: WithHistory) -> None:
    _check_common(scaling)
    check_int("history_len", scaling.history_len, 1, 1 << 20)
    if not callable(scaling.reduce) and scaling.reduce not in REDUCTIONS:
        raise unknown_name("reduce", scaling.reduce, list(REDUCTIONS))
