"""The plan for a whole model: which format and which scaling each operand of each layer gets.

A recipe is a value: frozen, comparable, written to and read from TOML or a dict without loss.
It knows nothing of torch; `unclamp.nn` carries it out.

    recipe = Recipe(input=Delayed(history_len=16), weight=Dynamic())
    recipe = recipe.override("layers.*.mlp.down_proj", input=Dynamic())

A glob matches a module's dotted name, or any tail of it that starts after a dot, so that
"layers.*.mlp.down_proj" finds "model.layers.3.mlp.down_proj" and "lm_head" finds itself; `*`
crosses dots. Rules are tried in order and the first that matches decides for the module; what
it leaves open comes from the recipe's own settings.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from unclamp.errors import RecipeError
from unclamp.formats import Format, get_format, unknown_name

Role = Literal["input", "weight", "grad_output"]
ROLES: tuple[Role, ...] = get_args(Role)
REDUCTIONS = ("max", "most_recent")
MAX_MARGIN = 64


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Scale from the tensor itself: reads it twice, never saturates a finite element.

    Transformer Engine calls this current scaling. A tensor of zeros gets scale 1.

    Args:
        margin: Powers of two of headroom below the largest representable value.
    """

    kind = "dynamic"
    margin: int = 0

    def __post_init__(self) -> None:
        _check_int("margin", self.margin, 0, MAX_MARGIN)


@dataclass(frozen=True, kw_only=True)
class Delayed:
    """Scale from the amaxes of past optimizer steps: reads once, clamps what is new.

    Until a first amax is known the scale is taken from the tensor itself.

    Args:
        history_len: Updates remembered, 1 or more.
        reduce: "max" over the window, "most_recent", or a function from a history
            `[sites, history_len]` (newest first, 0 where nothing was measured yet) to amaxes
            `[sites]`. A recipe with a function cannot be written to TOML.
        margin: Powers of two of headroom below the largest representable value.
    """

    kind = "delayed"
    history_len: int = 16
    reduce: str | Callable[[Any], Any] = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        _check_int("history_len", self.history_len, 1, 1 << 20)
        _check_int("margin", self.margin, 0, MAX_MARGIN)
        if not callable(self.reduce) and self.reduce not in REDUCTIONS:
            raise unknown_name("reduce", self.reduce, list(REDUCTIONS))


@dataclass(frozen=True, kw_only=True)
class HighPrecision:
    """No cast: the operand enters its GEMMs as it is."""

    kind = "high_precision"


Scaling = Dynamic | Delayed | HighPrecision
SCALINGS: dict[str, type[Scaling]] = {c.kind: c for c in (Dynamic, Delayed, HighPrecision)}
DEFAULT_FORMATS: dict[Role, str] = {"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e5m2"}


@dataclass(frozen=True, kw_only=True)
class Operand:
    """What one operand of one layer gets."""

    format: Format
    scaling: Scaling


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An override: for modules that match, what to change for some roles."""

    match: str
    scalings: Mapping[Role, Scaling] = field(default_factory=dict)
    formats: Mapping[Role, str] = field(default_factory=dict)

    def matches(self, fqn: str) -> bool:
        """Whether the rule applies to a module of this dotted name."""
        return matches(fqn, self.match)

    def __hash__(self) -> int:
        return hash((self.match, frozenset(self.scalings.items()), frozenset(self.formats.items())))


def matches(fqn: str, glob: str) -> bool:
    """Whether a glob matches a dotted name, or a tail of it that starts after a dot."""
    return fnmatchcase(fqn, glob) or fnmatchcase(fqn, f"*.{glob}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Format and scaling per role, and overrides by module name.

    Args:
        input: Scaling of the layer's input.
        weight: Scaling of its weight.
        grad_output: Scaling of the gradient that comes back.
        input_format: Name of the format; `unclamp formats` lists them.
        weight_format: As above.
        grad_output_format: As above; e5m2 by default, for its range.
        rules: Overrides, first match wins; `override` adds to them.

    Raises:
        RecipeError: A scaling or format that does not exist, naming the nearest that does.
    """

    input: Scaling = field(default_factory=Delayed)
    weight: Scaling = field(default_factory=Delayed)
    grad_output: Scaling = field(default_factory=Delayed)
    input_format: str = DEFAULT_FORMATS["input"]
    weight_format: str = DEFAULT_FORMATS["weight"]
    grad_output_format: str = DEFAULT_FORMATS["grad_output"]
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for role in ROLES:
            _check_scaling(role, getattr(self, role))
            get_format(getattr(self, f"{role}_format"))
        for rule in self.rules:
            for role, scaling in rule.scalings.items():
                _check_scaling(role, scaling)
            for role, name in rule.formats.items():
                _check_role(role)
                get_format(name)

    @classmethod
    def uniform(cls, scaling: Scaling) -> "Recipe":
        """Return the recipe with one scaling for all three roles and the default formats."""
        return cls(input=scaling, weight=scaling, grad_output=scaling)

    def override(
        self,
        match: str,
        *,
        input: Scaling | None = None,
        weight: Scaling | None = None,
        grad_output: Scaling | None = None,
        input_format: str | None = None,
        weight_format: str | None = None,
        grad_output_format: str | None = None,
    ) -> "Recipe":
        """Return a recipe with one more rule, tried after those it has.

        Raises:
            RecipeError: The rule changes nothing, or names something unknown.
        """
        given: dict[str, Any] = {
            "input": input,
            "weight": weight,
            "grad_output": grad_output,
            "input_format": input_format,
            "weight_format": weight_format,
            "grad_output_format": grad_output_format,
        }
        rule = Rule(
            match=match,
            scalings={r: given[r] for r in ROLES if given[r] is not None},
            formats={r: given[f"{r}_format"] for r in ROLES if given[f"{r}_format"] is not None},
        )
        if not rule.scalings and not rule.formats:
            raise RecipeError(
                f"the override for {match!r} changes nothing: "
                "name a role, such as input=Dynamic(), or a format"
            )
        return replace(self, rules=(*self.rules, rule))

    def rule_for(self, fqn: str) -> Rule | None:
        """Return the rule that decides for a module: the first that matches."""
        return next((rule for rule in self.rules if rule.matches(fqn)), None)

    def operands(self, fqn: str) -> dict[Role, Operand]:
        """Return what each role of this module gets."""
        rule = self.rule_for(fqn) or Rule(match=fqn)
        return {
            role: Operand(
                format=get_format(rule.formats.get(role, getattr(self, f"{role}_format"))),
                scaling=rule.scalings.get(role, getattr(self, role)),
            )
            for role in ROLES
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives an equal recipe back.

        Raises:
            RecipeError: A reduce function, which plain data cannot hold.
        """
        data: dict[str, Any] = {
            role: _operand_to_dict(getattr(self, role), getattr(self, f"{role}_format"))
            for role in ROLES
        }
        if self.rules:
            data["override"] = [_rule_to_dict(rule) for rule in self.rules]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that plain data describes; roles left out keep their defaults.

        Raises:
            RecipeError: An unknown key or name, or a value that makes no sense.
        """
        _check_keys("recipe", data, [*ROLES, "override"])
        scalings, formats = _roles_from_dict(data)
        rules = []
        overrides = data.get("override", ())
        if not isinstance(overrides, Sequence):
            raise RecipeError(f"expected a list of overrides, [[override]], got {overrides!r}")
        for entry in overrides:
            if not isinstance(entry, Mapping):
                raise RecipeError(f"expected a table for an override, got {entry!r}")
            _check_keys("override", entry, ["match", *ROLES])
            if not isinstance(entry.get("match"), str):
                raise RecipeError(f'an override needs match = "GLOB", got {dict(entry)!r}')
            rule_scalings, rule_formats = _roles_from_dict(entry)
            rules.append(Rule(match=entry["match"], scalings=rule_scalings, formats=rule_formats))
        settings: dict[str, Any] = {**scalings}
        settings.update({f"{role}_format": name for role, name in formats.items()})
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


def scaling_to_dict(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as plain data: its kind under "scaling", then its settings."""
    settings = {f.name: getattr(scaling, f.name) for f in fields(scaling)}
    if callable(settings.get("reduce")):
        raise RecipeError(
            "a recipe with a reduce function cannot be written down: "
            f"use one of {', '.join(REDUCTIONS)}, or keep the recipe in Python"
        )
    return {"scaling": scaling.kind, **settings}


def scaling_from_dict(data: Mapping[str, Any]) -> Scaling:
    """Return the scaling that plain data describes.

    Raises:
        RecipeError: An unknown kind or setting.
    """
    kind = data.get("scaling")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise unknown_name("scaling", kind, list(SCALINGS))
    settings = {key: value for key, value in data.items() if key != "scaling"}
    _check_keys(f"{kind} scaling", settings, [f.name for f in fields(SCALINGS[kind])])
    return SCALINGS[kind](**settings)


def _operand_to_dict(scaling: Scaling | None, fmt: str | None) -> dict[str, Any]:
    data: dict[str, Any] = {} if fmt is None else {"format": fmt}
    return data if scaling is None else {**data, **scaling_to_dict(scaling)}


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    named: list[Role] = [r for r in ROLES if r in rule.scalings or r in rule.formats]
    return {
        "match": rule.match,
        **{r: _operand_to_dict(rule.scalings.get(r), rule.formats.get(r)) for r in named},
    }


def _roles_from_dict(data: Mapping[str, Any]) -> tuple[dict[Role, Scaling], dict[Role, str]]:
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
    return scalings, formats


def _check_keys(what: str, data: Mapping[str, Any], known: list[str]) -> None:
    for key in data:
        if key not in known:
            raise unknown_name(f"key of the {what}", key, known)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"expected an integer {name} in {low}..{high}, got {value!r}")


def _check_role(role: object) -> None:
    if role not in ROLES:
        raise unknown_name("role", role, list(ROLES))


def _check_scaling(role: str, scaling: object) -> None:
    _check_role(role)
    if not isinstance(scaling, Scaling):
        raise RecipeError(
            f"expected a scaling such as Delayed() or Dynamic() for {role}, got {scaling!r}"
        )
