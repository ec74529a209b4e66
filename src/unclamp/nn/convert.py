"""`convert`: every linear layer of a model computes in FP8, as a recipe says.

How that is done, and undone, is in `nn.attach`; what share of the work it is, in `nn.coverage`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import nn

from unclamp.errors import ConvertError, naming_arguments
from unclamp.names import ModuleName
from unclamp.nn.adapters import find_adapters
from unclamp.nn.attach import ConvertReport, Profit, RevertReport, attach, find_ledgers, revert
from unclamp.nn.candidates import product_names
from unclamp.nn.covering import Example, covering
from unclamp.nn.groups import Given, check_given, give
from unclamp.nn.named import named_modules
from unclamp.nn.payoff import Timer, check_tokens
from unclamp.nn.products import products_of
from unclamp.recipe import Recipe

__all__ = [
    "ConvertReport",
    "RevertReport",
    "convert",
    "find_ledgers",
    "first_and_last",
    "revert",
]

State = Literal["model", "apart"]
"""Where scaling state is saved."""


@naming_arguments
def convert(
    model: nn.Module,
    recipe: Recipe,
    *,
    skip: Sequence[str] = (),
    strict: bool = False,
    where_it_pays: bool = False,
    tokens: int | None = None,
    timer: Timer | None = None,
    group: Given | Mapping[str, Given] | None = None,
    example: Example | None = None,
    state: State | None = None,
) -> ConvertReport:
    """Make every linear layer of a model compute in FP8, as the recipe says.

    It warns where no layer is in FP8 in the end, and of layers that keep another, earlier recipe.

    Args:
        model: Changed in place; it may itself be an `nn.Linear`.
        recipe: What each operand gets.
        skip: Globs of modules to leave alone, such as "lm_head".
        strict: Raise where a rule or a skip glob matches no linear layer; otherwise warn.
        where_it_pays: Leave alone the layers that FP8 does not make faster. Each shape is
            measured on the layers' device, forward and backward, once in a process; the report
            says the ratios. On a CPU FP8 is emulated, and pays nowhere.
        tokens: Tokens of a step (batch times sequence length), at which to measure.
        timer: What measures, milliseconds of a layer's step; `nn.payoff.step_ms` by default.
        group: Process groups whose ranks hold the same layers and share their scales, where torch
            does not know them: one, several (each dimension of a mesh), none (`()`: this process
            alone), or by globs of layers. It decides for layers that are converted already, too.
            DTensors, DDP and FSDP need none (docs/distributed.md).
        example: A batch of the training: a tensor, a tuple of positional inputs, or a mapping of
            named ones. One step of a copy of the model is run with it, on shapes alone where that
            is enough (`coverage`): the report then says what share of the step's FLOPs goes
            through FP8, and what is left out, and a `Recorder` that is made later records it.
        state: Where the scaling state is saved: with the weights, in the model's state_dict
            ("model", as at first), or in no state_dict ("apart"), which then has the keys of the
            plain model; save `ScalingState(model)` beside it. Either is loaded where a state_dict
            holds it. It is the whole model's; None leaves it as it is.

    Raises:
        RecipeError: `recipe` is none.
        ConvertError: `strict` and something matched nothing, `skip` is a string, `where_it_pays`
            without `tokens`, the layers lie on several devices, `group` is no group of this
            process, `state` is none of these, or the step with `example` cannot be run. The model
            is unchanged.

    Example:
        >>> import torch, unclamp
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8))
        >>> print(unclamp.convert(model, unclamp.Recipe(), skip=["1"]))
        converted 1 layer, skipped 1
          0: input delayed e4m3fn, weight delayed e4m3fn, grad_output delayed e5m2
          skipped 1: matches skip '1'

        >>> model = torch.nn.Linear(32, 32)
        >>> print(unclamp.convert(model, unclamp.Recipe(), example=torch.randn(4, 32)))
        converted 1 layer, skipped 0: converted 100 % of the FLOPs
          (the model itself): input delayed e4m3fn, weight delayed e4m3fn, grad_output delayed e5m2
    """
    profit = Profit(check_tokens(tokens), timer) if where_it_pays else None
    check_given(group, (fqn for fqn, _ in named_modules(model)))
    if state not in (None, *get_args(State)):
        raise ConvertError(f'expected "model" or "apart" for state, got {state!r}')
    cover = covering(model, recipe, example, skip=skip, observes=False)
    report = attach(
        model, recipe, skip=skip, strict=strict, observes=False, profit=profit, cover=cover
    )
    for ledger in find_ledgers(model) if state is not None else []:
        ledger.is_apart = state == "apart"
    if group is not None:
        give({fqn: module for fqn, _, module in products_of(model)}, group)
    return report


def first_and_last(model: nn.Module) -> list[str]:
    """Return the names of a model's first and last linear layer, in the order of registration.

    They are often left in high precision: `convert(model, recipe, skip=first_and_last(model))`.
    The report of `convert` says what that left alone. The names start with "^", so that as globs
    they match these layers and no other. Layers of adapters are none of them.
    """
    adapters = find_adapters(model, ())
    names = [fqn for fqn in product_names(model, of_weights=True) if fqn not in adapters]
    # A copy that an adapter trains is left out with what it is a copy of.
    linear = [f"^{(isinstance(fqn, ModuleName) and fqn.stands_for) or fqn}" for fqn in names]
    return list(dict.fromkeys([*linear[:1], *linear[-1:]]))
