"""Forwards and backwards whose tensors hold nothing: a pipeline asks its stages for shapes.

`torch.distributed.pipelining` learns what its stages send to each other by running them, at the
first step and wherever a schedule goes from training to evaluation or back: on `torch.empty` in
torch 2.13, on zeros in 2.11, forward and backward. What such casts see is whatever the allocator
had, and no history, count or first scale may learn of it.

Values cannot tell a rehearsal from the real thing, the stage's own methods can: they are wrapped
for as long as they run. That happens when pipelining is imported, before or after unclamp, so a
process without it pays nothing but the reading of one variable a product.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from unclamp.errors import UnclampWarning, UnsupportedError
from unclamp.nn.microbatch import know_microbatches

STAGE, FRONTEND = (f"torch.distributed.pipelining.{name}" for name in ("stage", "_IR"))
REHEARSALS = ("_prepare_forward_infra", "_prepare_backward_infra", "__init__")
"""Methods of a stage that may run its module for nothing but shapes; torch 2.11 has no forward in
the second, and 2.13 none in the third."""
NEEDED = REHEARSALS[:1]

_is_on = False


def rehearses() -> bool:
    """Whether what runs is for shapes only, in whichever thread: nothing is to be learned of it."""
    return _is_on


def watch_pipelines() -> None:
    """Have the stages of pipelines say when they rehearse; once in a process."""
    for name, prepare in _PREPARES.items():
        module = sys.modules.get(name)
        if module is not None:
            prepare(module)
        elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Prepares the modules of pipelining right after they were executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PREPARES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            # On the loader of this one import: who asks the module for its source finds it there.
            _run_after(spec.loader, _PREPARES[fullname])
        return spec


def _run_after(loader: Loader, prepare: Callable[[ModuleType], None]) -> None:
    execute = loader.exec_module

    def then_prepare(module: ModuleType) -> None:
        execute(module)
        prepare(module)

    loader.exec_module = then_prepare


def _prepare_stage(module: ModuleType) -> None:
    stage = module.PipelineStage
    for name in REHEARSALS:
        method = stage.__dict__.get(name)
        if method is not None and not hasattr(method, "__wrapped__"):
            setattr(stage, name, _rehearsing(method))
    know_microbatches(getattr(module, "_PipelineStageBase", stage))
    if any(name not in stage.__dict__ for name in NEEDED):
        warnings.warn(
            "the pipelining of this torch is not known: where a stage finds its shapes by running, "
            "scales learn from tensors that hold nothing; give PipelineStage input_args and "
            "output_args",
            UnclampWarning,
            stacklevel=2,
        )


def _rehearsing(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def rehearsal(*args: Any, **kwargs: Any) -> Any:
        global _is_on
        before, _is_on = _is_on, True
        try:
            return method(*args, **kwargs)
        finally:
            _is_on = before

    return rehearsal


def _prepare_frontend(module: ModuleType) -> None:
    pipe = module.Pipe
    trace = getattr(pipe, "from_tracing", None)
    if trace is None or hasattr(trace, "__wrapped__"):
        return

    @functools.wraps(trace)
    def checked(mod: Any, *args: Any, **kwargs: Any) -> Any:
        _check_is_plain(mod)
        return trace(mod, *args, **kwargs)

    pipe.from_tracing = staticmethod(checked)


def _check_is_plain(model: Any) -> None:
    """Raise, on every rank alike, before torch traces a model whose graph could not train."""
    if any(hasattr(module.__dict__.get("sites"), "ledger") for module in model.modules()):
        raise UnsupportedError(
            "expected a model that is neither converted nor observed: pipeline() of "
            "torch.distributed.pipelining traces it with torch.export, and a traced product has "
            "no backward. Convert the stages instead: "
            "unclamp.convert(pipe.get_stage_module(i), recipe)"
        )


_PREPARES: dict[str, Callable[[ModuleType], None]] = {
    STAGE: _prepare_stage,
    FRONTEND: _prepare_frontend,
}
