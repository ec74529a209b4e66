"""What must be alike for steps to come back bit for bit: code, recipe and machine, as plain data.

Written with a snapshot, compared before a replay. A fact that differs is a reason to refuse or,
where it may be harmless, the first suspect if losses do not come back.
"""

import ast
import hashlib
import inspect
import platform
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from unclamp.errors import RecipeError, ReplayError
from unclamp.explain.script import load_from_script, script_facts, script_of
from unclamp.explain.training import Build, Step
from unclamp.names import SiteName
from unclamp.nn import Ledger, find_ledgers
from unclamp.recipe import Recipe
from unclamp.rule import Operand
from unclamp.scaling import Scaling, scaling_from_dict, scaling_to_dict
from unclamp.version import __version__

MACHINE = ("torch", "device", "threads", "cpu", "deterministic", "matmul_precision")
"""Facts that may change bits without anything being wrong."""


def code_facts(
    *, build: Build | None, step: Step | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the facts that stay through a run, as JSON data."""
    facts: dict[str, Any] = {
        "unclamp_version": __version__,
        "build": _name_of(build),
        "step_function": _name_of(step),
        "arguments": dict(arguments),
        # Whoever names a build function only afterwards has nothing to compare it with.
        "code": None if build is None else fingerprint(build, step),
        "argv": list(sys.argv[1:]),
    }
    scripts = [path for f in (build, step) if f is not None and (path := script_of(f)) is not None]
    return facts | ({"script": script_facts(scripts[0])} if scripts else {})


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return the facts of a model as it stands, as JSON data."""
    return {
        "sites": site_facts(model),
        "recipe": recipe_facts(model),
        **machine_facts(model),
    }


def machine_facts(model: nn.Module) -> dict[str, Any]:
    """Return what of the machine and its settings decides bits."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    is_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


class Place(NamedTuple):
    """Where a site has its state: a row of a ledger."""

    ledger: Ledger
    row: int

    @property
    def operand(self) -> Operand:
        """What the site's recipe says: format, and the scaling that is in force."""
        return self.ledger.sites[self.row].operand


def sites_of(model: nn.Module) -> dict[SiteName, Place]:
    """Return where each site of a model's converted layers has its state.

    Sites of modules that were taken out of the model are none of it.
    """
    return {
        SiteName(site.fqn, site.role): Place(ledger, index)
        for ledger in find_ledgers(model)
        for index, site in enumerate(ledger.sites)
        if index not in ledger.gone
    }


def site_facts(model: nn.Module) -> list[dict[str, Any]]:
    """Return each site's format and the scaling in force; no scaling where it is a function."""
    facts = []
    for site, place in sites_of(model).items():
        try:
            scaling = scaling_to_dict(place.operand.scaling)
        except RecipeError:
            scaling = None
        format_name = place.operand.format.name
        facts.append({**site.to_dict(), "format": format_name, "scaling": scaling})
    return facts


def scalings_of(facts: Mapping[str, Any]) -> dict[SiteName, Scaling]:
    """Return the scalings that were in force; sites scaled by a function are left out."""
    return {
        SiteName.from_dict(site): scaling_from_dict(site["scaling"])
        for site in facts["sites"]
        if site["scaling"] is not None
    }


def recipe_facts(model: nn.Module) -> dict[str, Any] | str | None:
    """Return the recipe as plain data, or as text where it holds a function."""
    recipe = next((ledger.recipe for ledger in find_ledgers(model)), None)
    if recipe is None:
        return None
    try:
        return recipe.to_dict()
    except RecipeError:
        return repr(recipe)


def recipe_of(facts: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe of a snapshot; None where it has none or cannot be written down."""
    recipe = facts.get("recipe")
    return Recipe.from_dict(recipe) if isinstance(recipe, dict) else None


def check_belongs(
    facts: Mapping[str, Any],
    model: nn.Module,
    *,
    build: Build | None,
    step: Step,
    anyway: bool = False,
) -> None:
    """Raise unless a snapshot is of this code and this recipe.

    Raises:
        ReplayError: Another layer, format or recipe, or a build or step function whose code has
            changed since; the latter two not where `anyway`.
    """
    here = {site: place.operand.format.name for site, place in sites_of(model).items()}
    there = {SiteName.from_dict(site): site["format"] for site in facts["sites"]}
    if here != there:
        different = sorted(set(here.items()) ^ set(there.items()))[0][0]
        raise ReplayError(
            "the snapshot is of another model or recipe: it differs in the FP8 operand "
            f"{different} (snapshot {there.get(different)}, here "
            f"{here.get(different)}); build the model as the run did"
        )
    if anyway:
        return
    if recipe_facts(model) != facts["recipe"]:
        raise ReplayError(
            "the snapshot was taken under another recipe than the build function uses: build the "
            "model with the run's recipe (it is in the run's header), or record the run anew"
        )
    code = fingerprint(build, step)
    if None not in (code, facts["code"]) and code != facts["code"]:
        raise ReplayError(
            "the build or step function has changed since the snapshot was taken: check out the "
            "run's commit, or say --anyway to replay with the code as it is"
        )


def differing(
    facts: Mapping[str, Any], model: nn.Module, *, but: tuple[str, ...] = ()
) -> list[str]:
    """Return in words what of the machine differs from that of a snapshot, `but` for some."""
    here = machine_facts(model)
    return [
        f"{name} {facts.get(name)} then, {here[name]} now"
        for name in MACHINE
        if name not in but and facts.get(name) != here[name]
    ]


def fingerprint(*functions: Callable[..., Any] | None) -> str | None:
    """Return a digest of functions' code, blind to comments and layout.

    None where there is no source to read, such as in a shell. What the functions call is not
    looked at: the plain replay is the judge of that.
    """
    digest = hashlib.sha256()
    for function in functions:
        if function is None:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return None
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def load_functions(
    names: Mapping[str, str],
    *,
    script: Mapping[str, Any] | None = None,
    argv: Sequence[str] = (),
) -> dict[str, Callable[..., Any]]:
    """Return the functions that are named "module:function", or "FILE.py:function".

    Args:
        names: By what each is: "build", "step".
        script: The facts of the run's script, if it was one.
        argv: The run's command line, which a module may read while it is imported.

    Raises:
        ReplayError: There is no such function, or it cannot be had without training again.
    """
    for what, name in names.items():
        module, colon, path = name.rpartition(":")
        if not (module and colon and path):
            raise ReplayError(
                f"expected MODULE:FUNCTION for the {what} function, or FILE.py:FUNCTION, got "
                f"{name!r}"
            )
    # Of one script in one go, so that both functions see the same classes and values.
    files: dict[str, list[str]] = {}
    for name in names.values():
        module, _, path = name.rpartition(":")
        if module.endswith(".py"):
            files.setdefault(module, []).append(path.partition(".")[0])
    modules = {
        file: load_from_script(
            Path(file).resolve(),
            tuple(sorted(set(wanted))),
            facts=script,
        )
        for file, wanted in files.items()
    }
    return {what: _function(name, what, modules, argv) for what, name in names.items()}


def _function(
    name: str, what: str, scripts: Mapping[str, Any], argv: Sequence[str]
) -> Callable[..., Any]:
    module, _, path = name.rpartition(":")
    try:
        found: Any = scripts[module] if module in scripts else _imported(module, argv)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        if module == "__main__":
            raise ReplayError(
                f"the {what} function of the run, {path!r}, was defined in a notebook, a shell or "
                "on standard input, where no other process finds it: call "
                "unclamp.explain_spike(RUN, build=..., step=...) there, or put the functions into "
                "a file and name them with --build FILE.py:FUNCTION and --step FILE.py:FUNCTION"
            ) from error
        raise ReplayError(
            f"cannot find the {what} function {name!r} ({error}): run from where the training "
            "runs, or name it with --build and --step"
        ) from error
    return found


def _imported(module: str, argv: Sequence[str]) -> ModuleType:
    """Import a module as the run did: with its command line, which is not that of `unclamp`."""
    own, sys.argv = sys.argv, [module, *argv]
    try:
        return import_module(module)
    except SystemExit as error:
        raise ReplayError(
            f"importing {module} ends the program (exit code {error.code}), as a command line that "
            'is parsed at its top level does: parse it under `if __name__ == "__main__":`, or name '
            "the functions as FILE.py:FUNCTION, which is read and not run"
        ) from error
    finally:
        sys.argv = own


def _name_of(function: Callable[..., Any] | None) -> str | None:
    """Return "module:function", or "FILE.py:function" for the program's own file.

    None where nobody could find it by that.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    if isinstance(function, MethodType) and not isinstance(function.__self__, type):
        return None  # its object has no name
    script = None if function is None else script_of(function)
    if script is not None:
        module = str(script)
    return None if "<" in name or module is None else f"{module}:{name}"
