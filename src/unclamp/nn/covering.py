"""How much of a model's work a conversion covers, asked with it: `convert(..., example=batch)`.

The step is run before the model is touched, on a copy that is converted as the model is about to
be. The ledger remembers what came out.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from unclamp.covered import CoverageReport
from unclamp.errors import ConvertError, first_line
from unclamp.nn.attach import ConvertReport, Cover, find_ledgers
from unclamp.nn.coverage import Plan, covered
from unclamp.recipe import Recipe

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""A batch: one input, positional ones, or named ones."""


def covering(
    model: nn.Module,
    recipe: Recipe,
    example: Example | None,
    *,
    skip: Sequence[str],
    observes: bool,
) -> Cover | None:
    """Return what asks for the coverage of a conversion before it is made; None: no example.

    Raises:
        ConvertError: The example is no batch; later, the step with it cannot be run.
    """
    if example is None:
        return None
    inputs, named = _batch(example)

    def cover(report: ConvertReport, left: Collection[str]) -> CoverageReport:
        # Each layer by its own name: "^" says that it is a whole one.
        skips = (*skip, *(f"^{fqn}" for fqn in left))
        plan = Plan(recipe=recipe, skip=skips, observes=observes, skipped=report.skipped)
        try:
            return covered(model, inputs, named, plan)
        except Exception as error:  # whatever the model raises of a batch
            done = "observed" if observes else "converted"
            raise ConvertError(
                f"the step with `example` cannot be run, so the model is not {done} "
                f"({type(error).__name__}: {first_line(error)}). Give a batch that the model can "
                "be called with: a tensor, a tuple of positional inputs or a mapping of named "
                "ones; or leave example out"
            ) from error

    return cover


def cover(model: nn.Module, example: Example) -> CoverageReport:
    """Return the coverage of a model that is converted or observed already, and remember it.

    What `convert(..., example=...)` does in one go: a `Recorder` that is made later records it.

    Args:
        model: Converted or observed.
        example: A batch, as `convert` takes it.

    Raises:
        ConvertError: The model is neither, or the example is no batch.
        UnsupportedError: As `coverage`.

    Example:
        >>> import torch, unclamp
        >>> from unclamp.nn import cover
        >>> model = torch.nn.Linear(32, 64)
        >>> report = unclamp.convert(model, unclamp.Recipe())
        >>> cover(model, torch.randn(8, 32)).sentence()
        'converted 100 % of the FLOPs'
    """
    inputs, named = _batch(example)
    ledgers = find_ledgers(model)
    if not ledgers:
        raise ConvertError(
            "expected a model that is converted or observed; of a plain one ask unclamp.coverage, "
            "or give convert or observe an example"
        )
    found = covered(model, inputs, named)
    for ledger in ledgers:
        ledger.coverage = found
    return found


def _batch(example: Example) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return a batch's positional and named inputs."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), example
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise ConvertError(
        "expected a batch for example: a tensor, a tuple of positional inputs or a mapping of "
        f"named ones, got {type(example).__name__}"
    )
