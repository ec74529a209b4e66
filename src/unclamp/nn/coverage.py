"""How much of a model's work FP8 covers: a step is run, and each matrix product in it is named.

The step runs on a copy, on shapes alone where that is enough (`FakeTensorMode`): nothing of the
model changes, and a model of any size, on the meta device too, takes seconds. A model whose way
depends on its data is copied and run with them. In the copy a converted product is computed by the
plain operation (`nn.accounts`); of a model that is not converted, the copy is.
"""

import copy
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from unclamp.covered import CoverageReport
from unclamp.errors import UnclampWarning, UnsupportedError, first_line
from unclamp.nn.accounts import Account
from unclamp.nn.attach import attach, find_ledgers, revert
from unclamp.nn.beside import compute_plainly
from unclamp.nn.described import described_products
from unclamp.nn.shared_forward import forget_shared_forwards
from unclamp.nn.uncollected import uncollected
from unclamp.nn.watched import Functions, Watch
from unclamp.recipe import Recipe


def coverage(model: nn.Module, *inputs: Any, **named_inputs: Any) -> CoverageReport:
    """Return every matrix product of a training step of a model, and what FP8 does to it.

    One forward and one backward of a copy of the model: of `.loss` if the output has one, else of
    all floating-point outputs. They run on shapes alone, without memory or arithmetic, if the
    model's way does not depend on its data; else with the data. Parameters, gradients, buffers,
    the state of random numbers, and the histories and counts of a converted model stay as they
    are.

    Args:
        model: Converted, observed or plain. Of a plain one the result says what `convert` would do
            with the default recipe. It may lie on the meta device.
        *inputs: What it is called with: a batch of the training, a small one where data matter.
        **named_inputs: Likewise, by name: `**batch` for a model of transformers.

    Returns:
        The products with their FLOPs and states: print it.

    Raises:
        UnsupportedError: The model cannot be copied; or its way depends on data, and it has none.

    Numerics: a GEMM has 2 M N K. Attention whose kernel is told that it is causal counts the pairs
    of positions that see each other. What activation checkpointing computes again is left out, and
    so is arithmetic that is no matrix product.

    Example:
        >>> import torch, unclamp
        >>> print(unclamp.coverage(torch.nn.Linear(32, 64), torch.randn(8, 32)))
        product               M x N x K      GFLOP  share  state
        (the model itself)  8 x 64 x 32  6.554e-05  100 %  would be converted
        would convert 100 % of the FLOPs
    """
    return covered(model, inputs, named_inputs)


def covered(
    model: nn.Module,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    plan: "Plan | None" = None,
    *,
    shapes_only: bool = False,
) -> CoverageReport:
    """Do what `coverage` says; with a plan of a model that is converted as that says.

    Where `shapes_only`, a model that needs data is refused: of a large one there may be no second.
    """
    has_data = not any(t.device.type == "meta" for t in _tensors(model))
    try:
        return _run(model, inputs, named, how="fake", plan=plan)
    except _NeedsDataError as needs:
        error = needs.__cause__
        assert isinstance(error, Exception)
        if shapes_only:
            raise UnsupportedError(
                f"the model ({type(model).__name__}) cannot run on shapes alone: "
                f"{first_line(error)}"
            ) from error
        if not has_data:
            raise UnsupportedError(
                f"the model ({type(model).__name__}) cannot run on shapes alone, and lies on the "
                f"meta device: {first_line(error)}. Give it weights, or choose an implementation "
                "that does not depend on data (for experts of transformers "
                "experts_implementation='grouped_mm')"
            ) from error
    return _run(model, inputs, named, how="real", plan=plan)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a copy is converted: as the model is about to be.

    Attributes:
        recipe, skip, observes: As `attach` takes them.
        skipped: What is left alone, and why.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe())
    skip: Sequence[str] = ()
    observes: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)


class _NeedsDataError(Exception):
    """A step on shapes alone failed, for the cause that stands behind it."""


def _run(
    model: nn.Module, inputs: Any, named: Any, *, how: Literal["fake", "real"], plan: Plan | None
) -> CoverageReport:
    """Run a step of a copy, converted as the plan says, and say what it was."""
    fake = FakeTensorMode(allow_non_fake_inputs=True) if how == "fake" else None
    with ExitStack() as stack:
        if fake is not None:
            stack.enter_context(uncollected())  # and what it leaves behind is small
        twin = _twin(model, fake)
        is_plain = plan is None and not find_ledgers(twin)
        try:
            if plan is not None or is_plain:
                _attach(twin, plan or Plan())
            compute_plainly(twin)
            account = Account(find_ledgers(twin))
            watch = Watch(twin, account)
            args, kwargs = tree_map(lambda leaf: _detached(leaf, fake), (inputs, named))
            with _apart(twin, fake), account.taken(), watch.modules(), Functions(watch), watch:
                _step(twin, args, kwargs, fake)
            known = {} if plan is None else plan.skipped
            return CoverageReport(
                products=tuple(described_products(watch.calls, twin, known, is_plain=is_plain)),
                how=how,
                unknown=tuple(watch.unknown),
                idle=tuple(watch.idle()),
            )
        finally:
            revert(twin)  # or its ledger would be found by optimizers until it is collected
            del twin
            if how == "real":
                gc.collect()


def _attach(twin: nn.Module, plan: Plan) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnclampWarning)
        attach(twin, plan.recipe, skip=plan.skip, strict=False, observes=plan.observes)


# ---- a copy ------------------------------------------------------------------------------------


class _Copying(TorchFunctionMode):
    """Has a deep copy have no graph behind it, and be fake where that is wanted."""

    def __init__(self, fake: FakeTensorMode | None) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch: one that copies a tensor makes the copy that is wanted."""
        if func is Tensor.clone and self._fake is not None:  # of a parameter
            return faked(args[0], self._fake)
        if func is Tensor.__deepcopy__ and (self._fake is not None or not args[0].is_leaf):
            x, memo = args
            if id(x) not in memo:
                memo[id(x)] = copied(x, self._fake)
            return memo[id(x)]
        return func(*args, **(kwargs or {}))


def copied(x: Tensor, fake: FakeTensorMode | None) -> Tensor:
    """Return a copy of a tensor without the graph behind it."""
    if fake is not None:
        return faked(x.detach(), fake).requires_grad_(x.requires_grad)
    return x.detach().clone().requires_grad_(x.requires_grad)


def faked(x: Tensor, fake: FakeTensorMode) -> Tensor:
    """Return a tensor's like without data, on the CPU if it is on the meta device."""
    if x.device.type != "meta":
        return fake.from_tensor(x.detach(), static_shapes=True).requires_grad_(x.requires_grad)
    with fake:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    return made.requires_grad_(x.requires_grad)


def _twin(model: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    model = getattr(model, "_orig_mod", model)  # what torch.compile made it of
    try:
        with _Copying(fake):
            twin = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            f"the model ({type(model).__name__}) cannot be copied: {first_line(error)}. Ask for "
            "its coverage before it is wrapped or sharded; of DDP, ask for that of model.module"
        ) from error
    forget_shared_forwards(twin, model)
    return twin


def _detached(leaf: Any, fake: FakeTensorMode | None) -> Any:
    """Return an input that the step cannot change, with no graph behind it."""
    return copied(leaf, fake) if isinstance(leaf, Tensor) else leaf


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


# ---- a step ------------------------------------------------------------------------------------


@contextmanager
def _apart(model: nn.Module, fake: FakeTensorMode | None) -> Iterator[None]:
    """Set up that a step leaves no trace, and shows its products as such."""
    devices = {t.device.index for t in _tensors(model) if t.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    onednn = torch._C._get_mkldnn_enabled()  # the public way sets more, and warns of that
    with ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng(devices=sorted(d for d in devices if d is not None))
        )
        # A recurrent layer is one operator to these libraries, and linear layers without them.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if fake is not None:
            stack.enter_context(fake)
            stack.enter_context(_silent(logging.getLogger(FakeTensorMode.__module__)))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        torch._C._set_mkldnn_enabled(False)
        torch.backends.mha.set_fastpath_enabled(False)  # no fused encoder layer
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch._C._set_mkldnn_enabled(onednn)


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Have a logger say nothing: torch writes a trace of what goes wrong with shapes alone."""
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False


def _step(model: nn.Module, args: Any, kwargs: Any, fake: FakeTensorMode | None) -> None:
    try:
        output = model(*args, **kwargs)
        targets = [t for t in _targets(output) if t.requires_grad]
        if targets:  # dense gradients: some operators refuse those of a sum, without strides
            torch.autograd.backward(targets, [torch.ones_like(t) for t in targets])
    except Exception as error:
        if fake is None:
            if any(isinstance(each, Mapping) for each in args):
                error.add_note(
                    "unclamp.coverage called model(*inputs, **named_inputs): a batch by names is "
                    "unclamp.coverage(model, **batch)"
                )
            raise
        raise _NeedsDataError from error


def _targets(output: Any) -> list[Tensor]:
    """Return what to differentiate: the loss, or every output in floating point."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return [loss]
    leaves = tree_leaves(output)
    leaves += [v for leaf in leaves if hasattr(leaf, "__dict__") for v in tree_leaves(vars(leaf))]
    found = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    return list({id(t): t for t in found}.values())
