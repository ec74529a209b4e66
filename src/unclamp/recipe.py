"""The plan for a whole model: which format and which scaling each operand of each layer gets.

A recipe is a value: frozen, comparable, written to and read from TOML or a dict without loss.
It knows nothing of torch; `unclamp.nn` carries it out.

    recipe = Recipe(input=Guarded(), weight=Dynamic())
    recipe = recipe.override("layers.*.mlp.down_proj", input=Dynamic(), grad_weight=HighPrecision())

A glob matches a module's dotted name, or any tail of it that starts after a dot, so that
"layers.*.mlp.down_proj" finds "model.layers.3.mlp.down_proj" and "lm_head" finds itself; `*`
crosses dots. Rules are tried in order and the first that matches decides for the module; what
it leaves open comes from the recipe's own settings.

Three things can be said of a layer: of each *role* (operand) its scaling and format, of each
*GEMM* how it accumulates or that it runs in high precision, and whether its input is smoothed.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from unclamp.errors import RecipeError
from unclamp.formats import Format, get_format, unknown_name
from unclamp.scaling import (
    Delayed,
    Guarded,
    HighPrecision,
    PerTensor,
    Scaling,
    check_int,
    scaling_from_dict,
    scaling_to_dict,
)

Role = Literal["input", "weight", "grad_output"]
ROLES: tuple[Role, ...] = get_args(Role)
Gemm = Literal["output", "grad_input", "grad_weight"]
GEMMS: tuple[Gemm, ...] = get_args(Gemm)
ACCUMULATES = ("float32", "hopper", "hopper_fast")
"""How a GEMM of FP8 operands adds: in float32, or as a Hopper tensor core does, without and
with `use_fast_accum`."""
DEFAULT_FORMATS: dict[Role, str] = {"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e5m2"}

Mode = str | HighPrecision
"""One of `ACCUMULATES`, or HighPrecision()."""


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


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An override: for modules that match, what to change for some roles and GEMMs."""

    match: str
    scalings: Mapping[Role, Scaling] = field(default_factory=dict)
    formats: Mapping[Role, str] = field(default_factory=dict)
    gemms: Mapping[Gemm, Mode] = field(default_factory=dict)
    accumulate: str | None = None
    smooth: bool | None = None

    def __post_init__(self) -> None:
        for role, scaling in self.scalings.items():
            check_scaling(role, scaling)
        for role, name in self.formats.items():
            _check_role(role)
            get_format(name)
        for gemm, mode in self.gemms.items():
            _check_mode(gemm, mode)
        if self.accumulate is not None:
            _check_mode("accumulate", self.accumulate)
        if not isinstance(self.smooth, bool | None):
            raise RecipeError(f"expected True or False for smooth, got {self.smooth!r}")

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
        return hash((self.match, *sets, self.accumulate, self.smooth))


def matches(fqn: str, glob: str) -> bool:
    """Whether a glob matches a dotted name, or a tail of it that starts after a dot."""
    return fnmatchcase(fqn, glob) or fnmatchcase(fqn, f"*.{glob}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Format and scaling per role, precision per GEMM, and overrides by module name.

    Args:
        input: Scaling of the layer's input.
        weight: Scaling of its weight.
        grad_output: Scaling of the gradient that comes back.
        input_format: Name of the format; `unclamp formats` lists them.
        weight_format: As above.
        grad_output_format: As above; e5m2 by default, for its range.
        accumulate: How the GEMMs of FP8 operands add; one of `ACCUMULATES`.
        output: How the output GEMM adds, or HighPrecision() to compute it from operands that
            are not cast; None follows `accumulate`.
        grad_input: As `output`.
        grad_weight: As `output`.
        smooth: Scale each channel of the layer's input by a power of two, and the weight by its
            inverse, before the casts: exact in high precision. On the down projection of a
            gated MLP this is Smooth-SwiGLU (arXiv 2409.12517, section 4.4).
        warmup_steps: Optimizer steps at the start that compute in high precision. Casts are
            made and counted all the same, so that histories and statistics are there at once.
        rules: Overrides, first match wins; `override` adds to them.

    Raises:
        RecipeError: A scaling, format or mode that does not exist, naming the nearest that does,
            or a combination that makes no sense, saying why.
    """

    input: Scaling = field(default_factory=Delayed)
    weight: Scaling = field(default_factory=Delayed)
    grad_output: Scaling = field(default_factory=Delayed)
    input_format: str = DEFAULT_FORMATS["input"]
    weight_format: str = DEFAULT_FORMATS["weight"]
    grad_output_format: str = DEFAULT_FORMATS["grad_output"]
    accumulate: str = "float32"
    output: Mode | None = None
    grad_input: Mode | None = None
    grad_weight: Mode | None = None
    smooth: bool = False
    warmup_steps: int = 0
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        _ = self._base  # a rule checks itself
        check_int("warmup_steps", self.warmup_steps, 0, 1 << 40)

    @classmethod
    def uniform(cls, scaling: Scaling) -> "Recipe":
        """Return the recipe with one scaling for all three roles and the default formats."""
        return cls(input=scaling, weight=scaling, grad_output=scaling)

    @property
    def _base(self) -> Rule:
        """The recipe's own settings, as the rule that every module matches."""
        modes: dict[Gemm, Mode] = {}
        for gemm in GEMMS:
            mode = getattr(self, gemm)
            if mode is not None:
                modes[gemm] = mode
        return Rule(
            match="*",
            scalings={role: getattr(self, role) for role in ROLES},
            formats={role: getattr(self, f"{role}_format") for role in ROLES},
            gemms=modes,
            accumulate=self.accumulate,
            smooth=self.smooth,
        )

    def override(
        self,
        match: str,
        *,
        scaling: Scaling | None = None,
        input: Scaling | None = None,
        weight: Scaling | None = None,
        grad_output: Scaling | None = None,
        input_format: str | None = None,
        weight_format: str | None = None,
        grad_output_format: str | None = None,
        accumulate: str | None = None,
        output: Mode | None = None,
        grad_input: Mode | None = None,
        grad_weight: Mode | None = None,
        smooth: bool | None = None,
    ) -> "Recipe":
        """Return a recipe with one more rule, tried after those it has.

        `scaling` is for all three roles but those that are named too: HighPrecision() leaves
        the layers that match out of FP8. Where a rule sets `accumulate`, it does so for every
        GEMM whose mode the rule does not name.

        Raises:
            RecipeError: The rule changes nothing, or names something unknown.
        """
        given: dict[str, Any] = {
            "input": input or scaling,
            "weight": weight or scaling,
            "grad_output": grad_output or scaling,
            "input_format": input_format,
            "weight_format": weight_format,
            "grad_output_format": grad_output_format,
            "output": output,
            "grad_input": grad_input,
            "grad_weight": grad_weight,
        }
        rule = Rule(
            match=match,
            scalings={r: given[r] for r in ROLES if given[r] is not None},
            formats={r: given[f"{r}_format"] for r in ROLES if given[f"{r}_format"] is not None},
            gemms={g: given[g] for g in GEMMS if given[g] is not None},
            accumulate=accumulate,
            smooth=smooth,
        )
        if rule.changes_nothing:
            raise RecipeError(
                f"the override for {match!r} changes nothing: "
                "name a role, such as input=Dynamic(), a format or a GEMM"
            )
        return replace(self, rules=(*self.rules, rule))

    def rule_for(self, fqn: str) -> Rule | None:
        """Return the rule that decides for a module: the first that matches."""
        return next((rule for rule in self.rules if rule.matches(fqn)), None)

    def plan(self, fqn: str) -> LayerPlan:
        """Return what this module gets."""
        base, rule = self._base, self.rule_for(fqn) or Rule(match=fqn)
        scalings, formats = {**base.scalings, **rule.scalings}, {**base.formats, **rule.formats}
        named = rule.gemms if rule.accumulate else {**base.gemms, **rule.gemms}
        accumulate = rule.accumulate or self.accumulate
        return LayerPlan(
            operands={
                role: Operand(format=get_format(formats[role]), scaling=scalings[role])
                for role in ROLES
            },
            gemms={gemm: named.get(gemm, accumulate) for gemm in GEMMS},
            smooth=self.smooth if rule.smooth is None else rule.smooth,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives an equal recipe back.

        Raises:
            RecipeError: A reduce function, which plain data cannot hold.
        """
        data = _rule_to_dict(self._base)
        del data["match"]
        if self.warmup_steps:
            data["warmup_steps"] = self.warmup_steps
        if self.rules:
            data["override"] = [_rule_to_dict(rule) for rule in self.rules]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that plain data describes; what is left out keeps its default.

        Raises:
            RecipeError: An unknown key or name, or a value that makes no sense.
        """
        _check_keys("recipe", data, [*ROLES, *GEMMS, *_SETTINGS, "warmup_steps", "override"])
        base = _rule_from_dict({**data, "match": "*"})
        rules = []
        overrides = data.get("override", ())
        if not isinstance(overrides, Sequence):
            raise RecipeError(f"expected a list of overrides, [[override]], got {overrides!r}")
        for entry in overrides:
            if not isinstance(entry, Mapping):
                raise RecipeError(f"expected a table for an override, got {entry!r}")
            _check_keys("override", entry, ["match", *ROLES, *GEMMS, *_SETTINGS])
            if not isinstance(entry.get("match"), str):
                raise RecipeError(f'an override needs match = "GLOB", got {dict(entry)!r}')
            rules.append(_rule_from_dict(entry))
        settings: dict[str, Any] = {**base.scalings, **base.gemms}
        settings.update({f"{role}_format": name for role, name in base.formats.items()})
        settings.update({key: data[key] for key in (*_SETTINGS, "warmup_steps") if key in data})
        return cls(**settings, rules=tuple(rules))

    def to_toml(self) -> str:
        """Return the recipe as TOML; the same limits as `to_dict`."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Return the recipe that a TOML text describes.

        Raises:
            RecipeError: Text that is not TOML, or as `from_dict`.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not valid TOML: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe from a TOML file.

        Raises:
            RecipeError: The file cannot be read, or as `from_toml`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {str(path)!r}: {error}") from error
        return cls.from_toml(text)


_SETTINGS = ("accumulate", "smooth")


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {"match": rule.match}
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
    for key in _SETTINGS:
        if getattr(rule, key) is not None:
            data[key] = getattr(rule, key)
    return data


def _rule_from_dict(data: Mapping[str, Any]) -> Rule:
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
    high = HighPrecision()
    gemms: dict[Gemm, Mode] = {
        gemm: high if data[gemm] == high.kind else data[gemm] for gemm in GEMMS if gemm in data
    }
    return Rule(
        match=data["match"],
        scalings=scalings,
        formats=formats,
        gemms=gemms,
        accumulate=data.get("accumulate"),
        smooth=data.get("smooth"),
    )


def _check_keys(what: str, data: Mapping[str, Any], known: list[str]) -> None:
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
        hint = "" if what == "accumulate" else ", or HighPrecision() for operands that are not cast"
        raise RecipeError(f"{error}{hint}")


def check_scaling(role: str, scaling: object) -> None:
    """Raise a RecipeError unless this is a scaling that makes sense for this role."""
    _check_role(role)
    if not isinstance(scaling, Scaling):
        raise RecipeError(
            f"expected a scaling such as Delayed() or Dynamic() for {role}, got {scaling!r}"
        )
    remembers = isinstance(scaling, Delayed | Guarded)
    if remembers and role != "weight" and not isinstance(scaling.granularity, PerTensor):
        raise RecipeError(
            f"{scaling.kind} scaling of {role} per {scaling.granularity}: rows and blocks of "
            f"{role} are other tokens at every step, so their past amaxes say nothing; use "
            f"{scaling.kind} per tensor, or Dynamic with this granularity"
        )
