"""How one operand is scaled: where the scale comes from, and which elements share one.

*Scaling* (`Dynamic`, `Delayed`, `Guarded`, `Static`, `HighPrecision`) says where a scale comes
from. *Granularity* (`PerTensor`, `PerRow`, `PerBlock`, `MX`) says which elements share it, as a
block of elements *across* by elements *along* the axis that the GEMM contracts. A tensor enters
two GEMMs that contract different axes; unless its blocks are square it is therefore cast twice.

Whoever carries a scaling out asks it for facts (`casts`, `takes_own`, `guards`, `history_len`)
and never for its class, so that a kind of a user's own works like ours. `unclamp.policy` makes
scales of the facts. All are frozen values without torch. `docs/scaling.md` says when to use which.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from types import ModuleType
from typing import Any, ClassVar

from unclamp.errors import RecipeError, naming_arguments
from unclamp.formats import unknown_name

ACCUMULATES = ("float32", "hopper", "hopper_fast")
"""How a GEMM of FP8 operands adds: in float32, or as a Hopper tensor core does, without and
with `use_fast_accum`."""
REDUCTIONS = ("max", "most_recent")
Reduce = str | Callable[[Any], Any]
"""One of `REDUCTIONS`, or a function from histories `[scales, history_len]` to amaxes."""
MAX_MARGIN = 64
MAX_SCALE_EXPONENT = 126

Block = tuple[int | None, int | None]
"""Elements across and along the contraction axis that share a scale; None: all of them."""


class Granularity:
    """Which elements share a scale: one of the classes below."""

    power_of_two: ClassVar[bool] = False
    """Whether its scales are powers of two, whatever the scaling asks for."""

    @property
    def block(self) -> Block:
        """Elements across and along the contraction axis that share a scale."""
        raise NotImplementedError

    @property
    def is_whole(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.block == (None, None)

    @property
    def is_square(self) -> bool:
        """Whether a cast along one axis is also the cast along the other."""
        across, along = self.block
        return across == along


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor; one cast serves both GEMMs."""

    @property
    def block(self) -> Block:
        """The whole tensor."""
        return None, None

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerRow(Granularity):
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
class PerBlock(Granularity):
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
class MX(Granularity):
    """Microscaling: 32 elements along the contraction axis share a power of two (e8m0).

    The exponent of `scale_inv` is rounded *up*, so that the largest element never overflows;
    the floor of the OCP text saturates elements (arXiv 2506.08027, section 3).
    """

    power_of_two: ClassVar[bool] = True

    @property
    def block(self) -> Block:
        """32 along one row."""
        return 1, 32

    def __str__(self) -> str:
        return "mx"


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


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Where the scale of an operand comes from: the base of all kinds, and of a user's own.

    A kind of your own is a frozen dataclass that names its `kind` and, if it predicts from the
    past, its `history_len` and an `amax` (`docs/scaling.md`, "A scaling of your own"). Deriving
    from this class registers it: recipes, files, switches and logs know it from then on.

    Attributes:
        kind: Its name in files and logs.
        casts: Whether the operand goes through FP8 at all.
        takes_own: Whether the scale is that of the tensor itself.
        guards: Whether a cast that would clamp is repeated with the tensor's own scale.
        history_len: Updates that it looks back on; None where it predicts nothing.
        reduce: How the amaxes of the window become one.
        margin: Powers of two of headroom below the largest representable value.
        power_of_two: Whether scales are rounded down to powers of two.
        granularity: Which elements share a scale.
        shared: Whether ranks that hold parts of a tensor agree on a scale of its own.

    Raises:
        RecipeError: A setting that makes no sense; or, where a class is derived, no kind of its
            own, or one that another class has.
    """

    kind: ClassVar[str]
    casts: ClassVar[bool] = True
    takes_own: ClassVar[bool] = False
    guards: ClassVar[bool] = False
    # Facts of every kind. Where one is a setting, the kind declares the field again.
    history_len: int | None = field(default=None, init=False, repr=False)
    reduce: Reduce = field(default="max", init=False, repr=False)
    margin: int = field(default=0, init=False, repr=False)
    power_of_two: bool = field(default=False, init=False, repr=False)
    granularity: Granularity = field(default=PER_TENSOR, init=False, repr=False)
    shared: bool = field(default=False, init=False, repr=False)

    def __init_subclass__(cls) -> None:
        _register(cls)

    def __post_init__(self) -> None:
        check_int("margin", self.margin, 0, MAX_MARGIN)
        for name in ("power_of_two", "shared"):
            if not isinstance(value := getattr(self, name), bool):
                raise RecipeError(f"expected True or False for {name}, got {value!r}")
        if not isinstance(self.granularity, Granularity):
            raise RecipeError(
                f"expected a granularity such as PerTensor() or PerRow(), got {self.granularity!r}"
            )
        if self.history_len is not None:
            check_int("history_len", self.history_len, 1, 1 << 20)
        if not callable(self.reduce) and self.reduce not in REDUCTIONS:
            raise unknown_name("reduce", self.reduce, list(REDUCTIONS))

    @property
    def fixed_scale(self) -> float | None:
        """The scale that never changes; None where it follows from amaxes."""
        return None

    @property
    def remembers(self) -> bool:
        """Whether scales come from past amaxes, of which each block then has its own."""
        return self.history_len is not None

    @property
    def clamps(self) -> bool:
        """Whether a cast can clamp a finite element."""
        return self.casts and not self.takes_own and not self.guards

    def amax(self, history: Any, xp: ModuleType) -> Any:
        """Return the amax `[scales]` that the next scales are made for.

        What a kind of your own overrides. It runs at each update, on the device, and must not
        wait for it.

        Args:
            history: Past amaxes, float32 `[scales, history_len]`, newest first, 0 where nothing
                was measured yet.
            xp: `torch` in a training; `numpy` where a log is read.

        Numerics: where the result is 0, NaN or Inf, the scale stays what it was.
        """
        if callable(self.reduce):
            return self.reduce(history)
        return history[:, 0] if self.reduce == "most_recent" else xp.amax(history, 1)


SCALINGS: dict[str, type[Scaling]] = {}
"""Every kind of scaling by its name, a user's own too."""


def _register(cls: type[Scaling]) -> None:
    kind = cls.__dict__.get("kind")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise RecipeError(
            f"expected a kind of its own for the scaling {cls.__qualname__}, such as "
            f'kind: ClassVar[str] = "percentile", got {kind!r}'
        )
    other = SCALINGS.get(kind, cls)
    # A class that is made again, by a notebook's cell or slots=True, takes its own place.
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise RecipeError(
            f"the kind {kind!r} of the scaling {cls.__qualname__} is taken by "
            f"{other.__module__}.{other.__qualname__}: give it another name"
        )
    SCALINGS[kind] = cls


@naming_arguments
@dataclass(frozen=True, kw_only=True)
class Dynamic(Scaling):
    """Scale from the tensor itself: reads it twice, never saturates a finite element.

    Transformer Engine calls this current scaling. A block of zeros gets scale 1.

    Args:
        margin: Powers of two of headroom below the largest representable value.
        power_of_two: Round the scale down to a power of two, so that scaling is exact.
        granularity: Which elements share a scale.
        shared: Agree on it with the ranks that hold other parts (`docs/distributed.md`).
    """

    kind: ClassVar[str] = "dynamic"
    takes_own: ClassVar[bool] = True
    margin: int = 0
    power_of_two: bool = False
    granularity: Granularity = field(default=PER_TENSOR, kw_only=False)
    shared: bool = False


@naming_arguments
@dataclass(frozen=True, kw_only=True)
class Delayed(Scaling):
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
    history_len: int = field(default=16, kw_only=False)
    reduce: Reduce = "max"
    margin: int = 0
    power_of_two: bool = False
    granularity: Granularity = PER_TENSOR


@naming_arguments
@dataclass(frozen=True, kw_only=True)
class Guarded(Scaling):
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
    guards: ClassVar[bool] = True
    history_len: int = field(default=2, kw_only=False)
    reduce: Reduce = "max"
    margin: int = 1
    power_of_two: bool = False
    granularity: Granularity = PER_TENSOR


@naming_arguments
@dataclass(frozen=True, kw_only=True)
class Static(Scaling):
    """A scale that never changes: reads once, clamps beyond `format.max / scale`.

    Args:
        scale: What the tensor is multiplied by, in [2**-126, 2**126].
    """

    kind: ClassVar[str] = "static"
    scale: float = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = 2.0**MAX_SCALE_EXPONENT
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not 1 / limit <= self.scale <= limit:
            raise RecipeError(f"expected a scale in [2**-126, 2**126], got {self.scale!r}")

    @property
    def fixed_scale(self) -> float | None:
        """As given."""
        return self.scale


@dataclass(frozen=True, kw_only=True)
class HighPrecision(Scaling):
    """No cast: the operand enters its GEMMs as it is."""

    kind: ClassVar[str] = "high_precision"
    casts: ClassVar[bool] = False


def describe(scaling: Scaling) -> str:
    """Return a scaling in a word or two: its kind, whether it is shared, and its blocks."""
    blocks = "" if scaling.granularity.is_whole else f" {scaling.granularity}"
    return f"{scaling.kind}{' shared' if scaling.shared else ''}{blocks}"


def scaling_to_dict(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as plain data: its kind under "scaling", then its settings.

    Raises:
        RecipeError: A reduce function, which plain data cannot hold.
    """
    settings = {f.name: getattr(scaling, f.name) for f in fields(scaling) if f.init}
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
    known = {f.name: f for f in fields(SCALINGS[kind]) if f.init}
    for key in settings:
        if key not in known:
            raise unknown_name(f"key of the {kind} scaling", key, list(known))
    for name, each in known.items():
        if name not in settings and each.default is each.default_factory is MISSING:
            raise RecipeError(f"{kind} scaling needs its {name}: write {name} = ...")
    if "granularity" in settings:
        settings["granularity"] = parse_granularity(settings["granularity"])
    return SCALINGS[kind](**settings)


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise a RecipeError unless `value` is an integer in low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"expected an integer {name} in {low}..{high}, got {value!r}")
