"""What a recipe can say of a layer: a rule by name, and the layer's plan that comes of it.

Three things: of each *role* (operand) its scaling and format, of each *GEMM* how it accumulates
or that it runs in high precision, and whether the layer's input is smoothed. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, overload

from unclamp.errors import RecipeError
from unclamp.formats import Format, get_format, unknown_name
from unclamp.names import GEMMS, ROLES, Gemm, Role, spellings
from unclamp.scaling import (
    ACCUMULATES,
    Delayed,
    HighPrecision,
    Scaling,
    scaling_from_dict,
    scaling_to_dict,
)

DEFAULT_FORMATS: dict[Role, str] = {"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e5m2"}

Mode = str | HighPrecision
"""One of `ACCUMULATES`, or HighPrecision()."""


def as_scaling(given: Any) -> Any:
    """Return the scaling that a name stands for, with its defaults; what is no text as it is.

    Raises:
        RecipeError: There is no such kind, or it has a setting without a default.
    """
    return scaling_from_dict({"scaling": given}) if isinstance(given, str) else given


def as_mode(given: Any) -> Any:
    """Return HighPrecision() for its name, and what else was given as it is."""
    return HighPrecision() if given == HighPrecision.kind else given


class ScalingSetting:
    """A field of a dataclass that takes a scaling or its name, and holds a scaling."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Scaling: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Scaling: ...
    def __get__(self, instance: object | None, owner: type) -> Scaling:
        return Delayed() if instance is None else vars(instance)[self._name]

    def __set__(self, instance: object, value: Scaling | str) -> None:
        vars(instance)[self._name] = as_scaling(value)


class ModeSetting:
    """A field of a dataclass that takes the mode of a GEMM, or None, and holds it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> None: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Mode | None: ...
    def __get__(self, instance: object | None, owner: type) -> Mode | None:
        return None if instance is None else vars(instance)[self._name]

    def __set__(self, instance: object, value: Mode | None) -> None:
        vars(instance)[self._name] = as_mode(value)


@dataclass(frozen=True, kw_only=True)
class Operand:
    """What one operand of one layer gets."""

    format: Format
    scaling: Scaling


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer gets: its operands, its GEMMs, and whether its input is smoothed."""

    operands: Mapping[Role, Operand]
    gemms: Mapping[Gemm, Mode]
    smooth: bool = False

    @property
    def casts(self) -> bool:
        """Whether any operand of any GEMM goes through FP8."""
        return any(
            self.operands[role].scaling.casts
            for gemm in GEMMS
            if not isinstance(self.gemms[gemm], HighPrecision)
            for role in OPERANDS[gemm]
        )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An override: for modules that match, what to change for some roles and GEMMs.

    `note` says why it is there; it changes nothing.
    """

    match: str
    scalings: Mapping[Role, Scaling] = field(default_factory=dict)
    formats: Mapping[Role, str] = field(default_factory=dict)
    gemms: Mapping[Gemm, Mode] = field(default_factory=dict)
    accumulate: str | None = None
    smooth: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for role, scaling in self.scalings.items():
            check_scaling(role, as_scaling(scaling))
            if isinstance(scaling, str):
                raise RecipeError(
                    f"a Rule takes scalings, not their names: write {as_scaling(scaling)!r} for "
                    f"{scaling!r}; Recipe and override take names"
                )
        for role, name in self.formats.items():
            _check_role(role)
            get_format(name)
        for gemm, mode in self.gemms.items():
            _check_mode(gemm, mode)
        if self.accumulate is not None:
            _check_mode("accumulate", self.accumulate)
        if not isinstance(self.smooth, bool | None):
            raise RecipeError(f"expected True or False for smooth, got {self.smooth!r}")
        if not isinstance(self.note, str):
            raise RecipeError(f"expected text for a rule's note, got {self.note!r}")

    def matches(self, fqn: str) -> bool:
        """Whether the rule applies to a module of this dotted name."""
        return matches(fqn, self.match)

    @property
    def changes_nothing(self) -> bool:
        """Whether the rule says nothing of the modules that it matches."""
        says = (self.scalings, self.formats, self.gemms, self.accumulate, self.smooth is not None)
        return not any(says)

    def __hash__(self) -> int:
        parts = (self.scalings, self.formats, self.gemms)
        sets = tuple(frozenset(part.items()) for part in parts)
        return hash((self.match, *sets, self.accumulate, self.smooth, self.note))


def matches(fqn: str, glob: str) -> bool:
    """Whether a glob matches a dotted name, or a tail of it that starts after a dot.

    A glob that starts with "^" must match the whole name. A module in wrappers has several names
    (`names.spellings`), of which one has to match.
    """
    return any(_matches(name, glob) for name in spellings(fqn, glob))


def _matches(name: str, glob: str) -> bool:
    if glob.startswith("^"):
        return fnmatchcase(name, glob[1:])
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


SETTINGS = ("accumulate", "smooth")
"""Keys of a rule that are neither a role nor a GEMM."""


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain data; raises as `scaling_to_dict`."""
    data: dict[str, Any] = {"match": rule.match}
    if rule.note:
        data["note"] = rule.note
    for role in ROLES:
        operand: dict[str, Any] = {}
        if role in rule.formats:
            operand["format"] = rule.formats[role]
        if role in rule.scalings:
            operand |= scaling_to_dict(rule.scalings[role])
        if operand:
            data[role] = operand
    for gemm, mode in rule.gemms.items():
        data[gemm] = mode if isinstance(mode, str) else mode.kind
    for key in SETTINGS:
        if getattr(rule, key) is not None:
            data[key] = getattr(rule, key)
    return data


def rule_from_dict(data: Mapping[str, Any]) -> Rule:
    """Return the rule that plain data describes; raises a RecipeError as a rule does."""
    scalings: dict[Role, Scaling] = {}
    formats: dict[Role, str] = {}
    for role in ROLES:
        operand = data.get(role)
        if operand is None:
            continue
        if not isinstance(operand, Mapping):
            raise RecipeError(f"expected a table for {role}, got {operand!r}")
        settings = dict(operand)
        if "format" in settings:
            formats[role] = settings.pop("format")
        if settings:
            scalings[role] = scaling_from_dict(settings)
    gemms: dict[Gemm, Mode] = {gemm: as_mode(data[gemm]) for gemm in GEMMS if gemm in data}
    return Rule(
        match=data["match"],
        scalings=scalings,
        formats=formats,
        gemms=gemms,
        accumulate=data.get("accumulate"),
        smooth=data.get("smooth"),
        note=data.get("note", ""),
    )


def check_keys(what: str, data: Mapping[str, Any], known: list[str]) -> None:
    """Raise a RecipeError for a key that is none of `known`, naming the nearest."""
    for key in data:
        if key not in known:
            raise unknown_name(f"key of the {what}", key, known)


def _check_role(role: object) -> None:
    if role not in ROLES:
        raise unknown_name("role", role, list(ROLES))


def _check_mode(what: str, mode: object) -> None:
    if what not in (*GEMMS, "accumulate"):
        raise unknown_name("GEMM", what, list(GEMMS))
    if isinstance(mode, HighPrecision) and what != "accumulate":
        return
    if mode not in ACCUMULATES:
        error = unknown_name(what, mode, list(ACCUMULATES))
        hint = "" if what == "accumulate" else ', or HighPrecision() ("high_precision" in a file)'
        raise RecipeError(f"{error}{hint}")


OPERANDS: dict[Gemm, tuple[Role, Role]] = {
    "output": ("input", "weight"),
    "grad_input": ("grad_output", "weight"),
    "grad_weight": ("grad_output", "input"),
}
"""The two operands of each GEMM."""


def check_plan(plan: LayerPlan) -> None:
    """Raise a RecipeError for a layer's plan that makes no sense, saying why."""
    weight = plan.operands["weight"].scaling
    if plan.smooth and weight.clamps:
        raise RecipeError(
            f"a smoothed layer with {weight.kind} scaling of its weight: smoothing moves each "
            "channel's outlier into the weight's column, so the weight's amax jumps with the "
            "input and is clamped; use weight=Guarded() or Dynamic()"
        )
    for gemm, mode in plan.gemms.items():
        operands = [plan.operands[role] for role in OPERANDS[gemm]]
        in_fp8 = all(each.scaling.casts for each in operands)
        formats = tuple(each.format.name for each in operands)
        if in_fp8 and mode in ("hopper", "hopper_fast") and formats not in HOPPER_PAIRS:
            pairs = ", ".join(" x ".join(pair) for pair in HOPPER_PAIRS)
            raise RecipeError(
                f"{gemm} of {' x '.join(formats)} with accumulate={mode!r}: a Hopper tensor core "
                f"multiplies {pairs}"
            )


HOPPER_PAIRS = (("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn"))


def check_scaling(role: str, scaling: object) -> None:
    """Raise a RecipeError unless this is a scaling that makes sense for this role."""
    _check_role(role)
    if not isinstance(scaling, Scaling):
        raise RecipeError(
            f"expected a scaling such as Delayed() or Dynamic(), or its name, for {role}, got "
            f"{scaling!r}"
        )
    if scaling.remembers and role != "weight" and not scaling.granularity.is_whole:
        raise RecipeError(
            f"{scaling.kind} scaling of {role} per {scaling.granularity}: rows and blocks of "
            f"{role} are other tokens at every step, so their past amaxes say nothing; use "
            f"{scaling.kind} per tensor, or Dynamic with this granularity"
        )
