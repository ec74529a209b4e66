"""The plan for a whole model: which format and which scaling each operand of each layer gets.

A recipe is a value: frozen, comparable, written to and read from TOML or a dict without loss.
It knows nothing of torch; `unclamp.nn` carries it out.

    recipe = Recipe(input=Guarded(), weight=Dynamic())
    recipe = recipe.override("layers.*.mlp.down_proj", input=Dynamic(), grad_weight=HighPrecision())

A glob matches a module's dotted name, or any tail of it that starts after a dot, so that
"layers.*.mlp.down_proj" finds "model.layers.3.mlp.down_proj" and "lm_head" finds itself; `*`
crosses dots, and a "^" at the start asks for the whole name. Rules (`unclamp.rule`) are tried in
order and the first that matches decides for the module; what it leaves open comes from the
recipe's own settings.
"""

import glob
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unclamp.errors import RecipeError, naming_arguments
from unclamp.formats import get_format
from unclamp.names import SiteName
from unclamp.rule import (
    DEFAULT_FORMATS,
    GEMMS,
    ROLES,
    SETTINGS,
    Gemm,
    LayerPlan,
    Mode,
    ModeSetting,
    Operand,
    Role,
    Rule,
    ScalingSetting,
    as_mode,
    as_scaling,
    check_keys,
    check_plan,
    rule_from_dict,
    rule_to_dict,
)
from unclamp.scaling import Dynamic, Scaling, check_int
from unclamp.shown import Shown


@naming_arguments
@dataclass(frozen=True, kw_only=True)
class Recipe(Shown):
    """Format and scaling per role, precision per GEMM, and overrides by module name.

    Args:
        input: Scaling of the layer's input, or its name: "dynamic" stands for Dynamic().
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
            gated MLP this is Smooth-SwiGLU (arXiv 2409.12517, section 4.4). The weight takes
            over the channels' outliers and needs guarded or dynamic scaling.
        warmup_steps: Optimizer steps at the start that compute in high precision. Casts are
            made and counted all the same, so that histories and statistics are there at once.
        rules: Overrides, first match wins; `override` adds to them.

    Raises:
        RecipeError: A scaling, format or mode that does not exist, naming the nearest that does,
            or a combination that makes no sense, saying why.
    """

    # Descriptors: what is given may be a name, what is read is a scaling or a mode.
    input: ScalingSetting = ScalingSetting()  # noqa: RUF009
    weight: ScalingSetting = ScalingSetting()  # noqa: RUF009
    grad_output: ScalingSetting = ScalingSetting()  # noqa: RUF009
    input_format: str = DEFAULT_FORMATS["input"]
    weight_format: str = DEFAULT_FORMATS["weight"]
    grad_output_format: str = DEFAULT_FORMATS["grad_output"]
    accumulate: str = "float32"
    output: ModeSetting = ModeSetting()  # noqa: RUF009
    grad_input: ModeSetting = ModeSetting()  # noqa: RUF009
    grad_weight: ModeSetting = ModeSetting()  # noqa: RUF009
    smooth: bool = False
    warmup_steps: int = 0
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        check_int("warmup_steps", self.warmup_steps, 0, 1 << 40)
        if self.accumulate is None or self.smooth is None:
            raise RecipeError("only a rule can leave accumulate and smooth open, with None")
        for rule in (Rule(match="*"), *self.rules):
            check_plan(self._plan(rule))

    @classmethod
    def uniform(cls, scaling: Scaling | str) -> "Recipe":
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

    @naming_arguments
    def override(
        self,
        match: str,
        *,
        scaling: Scaling | str | None = None,
        input: Scaling | str | None = None,
        weight: Scaling | str | None = None,
        grad_output: Scaling | str | None = None,
        input_format: str | None = None,
        weight_format: str | None = None,
        grad_output_format: str | None = None,
        accumulate: str | None = None,
        output: Mode | None = None,
        grad_input: Mode | None = None,
        grad_weight: Mode | None = None,
        smooth: bool | None = None,
        note: str = "",
    ) -> "Recipe":
        """Return a recipe with one more rule, tried after those it has.

        `scaling` is for all three roles but those that are named too: HighPrecision() leaves
        the layers that match out of FP8. Where a rule sets `accumulate`, it does so for every
        GEMM whose mode the rule does not name. `note` says why the rule is there.

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
            scalings={r: as_scaling(given[r]) for r in ROLES if given[r] is not None},
            formats={r: given[f"{r}_format"] for r in ROLES if given[f"{r}_format"] is not None},
            gemms={g: as_mode(given[g]) for g in GEMMS if given[g] is not None},
            accumulate=accumulate,
            smooth=smooth,
            note=note,
        )
        if rule.changes_nothing:
            raise RecipeError(
                f"the override for {match!r} changes nothing: "
                "name a role, such as input=Dynamic(), a format or a GEMM"
            )
        return replace(self, rules=(*self.rules, rule))

    def at_sites(
        self,
        sites: Iterable[SiteName],
        scaling: Scaling | str = Dynamic(),
        *,
        notes: Mapping[str, str] | None = None,
    ) -> "Recipe":
        """Return a recipe that scales these sites so; all else about their layers stays.

        Each layer gets a rule for its name alone, tried before those that the recipe has. It
        takes over what the rule that decided before says.

        Args:
            sites: Operands of layers, by name.
            scaling: What they get; `Dynamic()` by default.
            notes: Why, by name of the layer.

        Raises:
            RecipeError: The scaling is none, or makes no sense for a site.
        """
        added = rules_at(self, sites, scaling, notes=notes)
        return replace(self, rules=(*added, *self.rules))

    def rule_for(self, fqn: str) -> Rule | None:
        """Return the rule that decides for a module: the first that matches."""
        return next((rule for rule in self.rules if rule.matches(fqn)), None)

    def plan(self, fqn: str) -> LayerPlan:
        """Return what this module gets."""
        return self._plan(self.rule_for(fqn) or Rule(match=fqn))

    def _plan(self, rule: Rule) -> LayerPlan:
        base = self._base  # which checks itself, as the rule did
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
        data = rule_to_dict(self._base)
        del data["match"]
        if self.warmup_steps:
            data["warmup_steps"] = self.warmup_steps
        if self.rules:
            data["override"] = [rule_to_dict(rule) for rule in self.rules]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that plain data describes; what is left out keeps its default.

        Raises:
            RecipeError: An unknown key or name, or a value that makes no sense.
        """
        check_keys("recipe", data, [*ROLES, *GEMMS, *SETTINGS, "warmup_steps", "override"])
        base = rule_from_dict({**data, "match": "*"})
        rules = []
        overrides = data.get("override", ())
        if not isinstance(overrides, Sequence):
            raise RecipeError(f"expected a list of overrides, [[override]], got {overrides!r}")
        for entry in overrides:
            if not isinstance(entry, Mapping):
                raise RecipeError(f"expected a table for an override, got {entry!r}")
            check_keys("override", entry, ["match", "note", *ROLES, *GEMMS, *SETTINGS])
            if not isinstance(entry.get("match"), str):
                raise RecipeError(f'an override needs match = "GLOB", got {dict(entry)!r}')
            rules.append(rule_from_dict(entry))
        settings: dict[str, Any] = {**base.scalings, **base.gemms}
        settings.update({f"{role}_format": name for role, name in base.formats.items()})
        settings.update({key: data[key] for key in (*SETTINGS, "warmup_steps") if key in data})
        return cls(**settings, rules=tuple(rules))

    def __str__(self) -> str:
        try:
            return self.to_toml()
        except RecipeError:  # a function, which only Python can hold
            return repr(self)

    def to_toml(self) -> str:
        """Return the recipe as TOML; the same limits as `to_dict`.

        Each rule is a table `[[override]]`, in the order in which they are tried, so that another
        one can be pasted before or after them.
        """
        data = self.to_dict()
        rules = data.pop("override", ())
        import tomli_w  # noqa: PLC0415  # a bench's machine may have torch and numba alone

        return "\n".join([tomli_w.dumps(data), *map(_override_toml, rules)])

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Return the recipe that a TOML text describes.

        Raises:
            RecipeError: Text that is not TOML, or as `from_dict`.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            is_name = "\n" not in text and text.endswith(".toml")
            hint = "; to read a file, use Recipe.load" if is_name else ""
            raise RecipeError(f"the recipe is not valid TOML: {error}{hint}") from error
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


def _override_toml(rule: Mapping[str, Any]) -> str:
    """Return a rule as one entry of the overrides, never inline.

    tomli-w writes a list of short tables as an inline array, which TOML lets nobody extend. So it
    writes one table, which begins with its own header because of `match`, and the header is made
    that of an entry.
    """
    import tomli_w  # noqa: PLC0415

    table = tomli_w.dumps({"override": rule})
    return "[[override]]" + table.removeprefix("[override]")


def rules_at(
    recipe: Recipe,
    sites: Iterable[SiteName],
    scaling: Scaling | str = Dynamic(),
    *,
    notes: Mapping[str, str] | None = None,
) -> tuple[Rule, ...]:
    """Return the rules of `Recipe.at_sites`, one a layer, in the order of their names."""
    notes = {} if notes is None else notes
    rules = []
    named = sorted(set(sites))
    for fqn in dict.fromkeys(site.fqn for site in named):
        changed: dict[Role, Scaling] = {s.role: as_scaling(scaling) for s in named if s.fqn == fqn}
        match = f"^{glob.escape(fqn)}"
        before = recipe.rule_for(fqn) or Rule(match=match)
        scalings = {**before.scalings, **changed}
        note = notes.get(fqn, before.note)
        rules.append(replace(before, match=match, scalings=scalings, note=note))
    return tuple(rules)
