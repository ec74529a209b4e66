"""Layers of adapters (LoRA and its like): left in high precision on purpose.

An adapter's matrices are thin: of rank 16, say, beside a base of some thousand inputs and outputs.
Their products cost next to nothing, and all that the training learns goes through them. PEFT's
layers say which of their modules are an adapter's; elsewhere a name that starts with `lora_` does.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from unclamp.nn.kinds import kind_of
from unclamp.nn.named import ADAPTED, COPIES, is_of, named_modules
from unclamp.rule import Rule

REASON = (
    "a layer of an adapter ({part}), which is thin and learns all: left in high precision on "
    "purpose; a rule that names it, such as {glob!r}, takes it in"
)
PART = "a part of an adapter ({part})"
SUM = (
    "an adapter puts a sum in its place in every forward (target_parameters of PEFT), which goes "
    "past the casts of experts: left in high precision"
)
READS_BASE = (
    "DoRA's magnitude: with dropout it multiplies by the base's weight by itself, past the casts "
    "of the base, in high precision"
)
LORA = "lora_"
"""How the names of an adapter's layers begin, whatever library or user they are of."""
PROMPTS = "prompt_encoder"
"""What PEFT calls the module that makes a trained prompt."""


def find_adapters(model: nn.Module, rules: Iterable[Rule]) -> dict[str, str]:
    """Return the layers of adapters that no rule names, and what to say of each, by name."""
    rules = list(rules)
    found: dict[str, str] = {}
    inside: dict[str, str] = {}
    paths = (path for path, _ in model.named_modules())
    modules = dict(model.named_modules())
    for path, (fqn, module) in zip(paths, named_modules(model), strict=True):
        above, _, last = path.rpartition(".")
        part = inside.get(above) or (last if _is_adapters(modules.get(above), last) else "")
        if not path or not part:
            continue
        inside[path] = part
        if any(rule.matches(fqn) and names(rule.match, part) for rule in rules):
            continue
        if type(module).__name__.startswith("Dora"):
            found[fqn] = READS_BASE
        elif any(p.ndim >= 2 for p in module.parameters(recurse=False)):
            said = REASON if kind_of(module) is not None else PART
            found[fqn] = said.format(part=part, glob=f"{part}.*")
    return found


def adapted_parameters(model: nn.Module) -> dict[nn.Module, set[str]]:
    """Return the parameters that PEFT puts a sum in place of while a module runs, by the module.

    That is what it does for `target_parameters`.
    """
    found: dict[nn.Module, set[str]] = {}
    for module in model.modules():
        name, base = getattr(module, "parameter_name", None), module
        if not isinstance(name, str) or ADAPTED not in module._modules:
            continue
        while (inner := base._modules.get(ADAPTED)) is not None:
            base = inner
        found.setdefault(base, set()).add(name)
    return found


def names(glob: str, part: str) -> bool:
    """Whether a glob that matches a layer names the part of an adapter in which it lies.

    Example:
        >>> [names(glob, "lora_A") for glob in ("*.lora_A.*", "*lora*", "*.default", "layers.*")]
        [True, True, False, False]
    """
    parts = glob.removeprefix("^").split(".")
    return any(own.strip("*?") != "" and fnmatchcase(part, own) for own in parts)


def _is_adapters(parent: nn.Module | None, name: str) -> bool:
    if parent is None or name == COPIES:
        return False
    said = getattr(parent, "adapter_layer_names", ())
    is_said = isinstance(said, tuple | list) and name in said
    is_prompts = name == PROMPTS and is_of(parent, ("peft",))
    return is_said or is_prompts or name.startswith(LORA)
