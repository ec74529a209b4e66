"""Which optimizers and wrappers unclamp follows by itself, and which it must be told of: tried.

One converted layer trains for five steps on inputs whose amax is 1, 2, 4, 8 and 16. Where every
step made an update, the history of the input reads 16, 8, 4, 2, 1. `python -m bench.optimizers`
prints the table of docs/training.md; what is not installed is said.
"""

import argparse
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import unclamp
from unclamp.nn import find_ledgers

AMAXES = (1.0, 2.0, 4.0, 8.0, 16.0)
WIDTH = 128
"""Wide enough that libraries treat the weight as a large one (torchao: 4,096 elements)."""

Loss = Callable[[], Tensor]
Step = Callable[[Loss], Any]
"""Makes one training step, given what computes the loss."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to train.

    Attributes:
        name: What it is.
        make: Returns what makes a step of a layer.
        is_followed: Whether unclamp updates by itself.
        library: What has to be installed.
    """

    name: str
    make: Callable[[nn.Linear], Step]
    is_followed: bool = True
    library: str | None = None


def histories(case: Case, *, tells: bool) -> list[float]:
    """Train by a case; return the input's history, newest first, without what is empty."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH)
    unclamp.convert(layer, unclamp.Recipe.uniform(unclamp.Delayed(history_len=16)))
    (ledger,) = find_ledgers(layer)
    step = case.make(layer)
    for amax in AMAXES:
        x = torch.full((4, WIDTH), amax)
        step(lambda x=x: layer(x).square().mean())
        if tells:
            unclamp.step(layer)
    return [value for value in ledger.history_of(0).tolist() if value > 0]


def is_right(history: list[float]) -> bool:
    """Whether there was one update a step."""
    return history == list(reversed(AMAXES))


# ---- ways to train ---------------------------------------------------------------------------


def plain(optimizer_of: Callable[[Any], Any]) -> Callable[[nn.Linear], Step]:
    """Backward, step, zero: by an optimizer of the layer's parameters."""

    def make(layer: nn.Linear) -> Step:
        optimizer = optimizer_of(layer.parameters())
        if hasattr(optimizer, "train"):  # schedulefree
            optimizer.train()

        def step(loss: Loss) -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


def lbfgs(layer: nn.Linear) -> Step:
    """Evaluate several times a step; the largest amax of an evaluation enters."""
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=1e-3, max_iter=6)

    def step(loss: Loss) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]

    return step


def scaled(**options: Any) -> Callable[[nn.Linear], Step]:
    """Scale the loss, unscale, step if nothing overflowed."""

    def make(layer: nn.Linear) -> Step:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

        def step(loss: Loss) -> None:
            scaler.scale(loss()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return step

    return make


def in_backward(layer: nn.Linear) -> Step:
    """Step an optimizer for each parameter as soon as its gradient is there."""
    for parameter in layer.parameters():
        optimizer = torch.optim.SGD([parameter], lr=1e-3)

        def hook(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(hook)
    return lambda loss: loss().backward()


def masters(link: Callable[[nn.Parameter, Tensor], None] | None) -> Callable[[nn.Linear], Step]:
    """Train float32 copies, and write them back through `.data`, which no version shows."""

    def make(layer: nn.Linear) -> Step:
        own = list(layer.parameters())
        copies = [p.detach().clone().requires_grad_() for p in own]
        optimizer = torch.optim.AdamW(copies, lr=1e-3)
        for parameter, copy in zip(own, copies, strict=True):
            if link is not None:
                link(parameter, copy)

        def step(loss: Loss) -> None:
            loss().backward()
            for parameter, copy in zip(own, copies, strict=True):
                copy.grad, parameter.grad = parameter.grad, None
            optimizer.step()
            for parameter, copy in zip(own, copies, strict=True):
                parameter.data.copy_(copy.data)

        return step

    return make


def megatron(parameter: nn.Parameter, copy: Tensor) -> None:
    """Link as Megatron-LM does."""
    parameter.main_param = copy  # pyright: ignore[reportAttributeAccessIssue]


def flat(*, has_link: bool) -> Callable[[nn.Linear], Step]:
    """Train one flat float32 copy of all parameters; with DeepSpeed's link or without."""

    def make(layer: nn.Linear) -> Step:
        own = list(layer.parameters())
        buffer = torch.cat([p.detach().reshape(-1) for p in own]).requires_grad_()
        pieces = list(buffer.detach().split([p.numel() for p in own]))
        for parameter, piece in zip(own, pieces, strict=True):
            if has_link:
                parameter._hp_mapping = _Mapping(piece)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer = torch.optim.AdamW([buffer], lr=1e-3)

        def step(loss: Loss) -> None:
            loss().backward()
            buffer.grad = torch.cat([g.reshape(-1) for p in own if (g := p.grad) is not None])
            optimizer.step()
            for parameter, piece in zip(own, pieces, strict=True):
                parameter.data.copy_(piece.view_as(parameter))
                parameter.grad = None

        return step

    return make


def views(layer: nn.Linear) -> Step:
    """Train one flat buffer of which the parameters are views."""
    own = list(layer.parameters())
    buffer = torch.cat([p.detach().reshape(-1) for p in own]).requires_grad_()
    pieces = buffer.detach().split([p.numel() for p in own])
    for parameter, piece in zip(own, pieces, strict=True):
        parameter.data = piece.view_as(parameter)
    optimizer = torch.optim.AdamW([buffer], lr=1e-3)

    def step(loss: Loss) -> None:
        loss().backward()
        buffer.grad = torch.cat([g.reshape(-1) for p in own if (g := p.grad) is not None])
        optimizer.step()
        for parameter in own:
            parameter.grad = None

    return step


@dataclass
class _Mapping:
    """As DeepSpeed's `tensor_fragment`, of which one field counts here."""

    hp_fragment: Tensor


def apex(layer: nn.Linear) -> Step:
    """Train copies in the optimizer's groups; the optimizer says of which parameters."""
    own = list(layer.parameters())
    copies = [p.detach().clone().requires_grad_() for p in own]
    optimizer: Any = torch.optim.AdamW(copies, lr=1e-3)
    optimizer._amp_stash = _Stash(all_fp16_params=own)

    def step(loss: Loss) -> None:
        loss().backward()
        for parameter, copy in zip(own, copies, strict=True):
            copy.grad, parameter.grad = parameter.grad, None
        optimizer.step()
        for parameter, copy in zip(own, copies, strict=True):
            parameter.data.copy_(copy.data)

    return step


@dataclass
class _Stash:
    """As apex's `optimizer._amp_stash`, of which one field counts here."""

    all_fp16_params: list[nn.Parameter]


def lomo(layer: nn.Linear) -> Step:
    """Update inside of gradient hooks, without an optimizer, and drop each gradient."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.add_(parameter.grad, alpha=-1e-3)
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    return lambda loss: loss().backward()


def by_hand(layer: nn.Linear) -> Step:
    """Subtract the gradients."""

    def step(loss: Loss) -> None:
        loss().backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=1e-3)
                parameter.grad = None

    return step


def prompt(layer: nn.Linear) -> Step:
    """Train something outside of the layer, which is frozen."""
    layer.requires_grad_(False)
    probe = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3)

    def step(loss: Loss) -> None:
        (loss() * probe(torch.ones(WIDTH))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def offloaded(layer: nn.Linear) -> Step:
    """Train a copy of each parameter on the host, by an optimizer of its own."""
    own = list(layer.parameters())
    copies = [p.detach().clone().requires_grad_() for p in own]
    optimizers = [torch.optim.AdamW([copy], lr=1e-3) for copy in copies]

    def step(loss: Loss) -> None:
        loss().backward()
        for parameter, copy, optimizer in zip(own, copies, optimizers, strict=True):
            copy.grad, parameter.grad = parameter.grad, None
            optimizer.step()
            with torch.no_grad():
                parameter.copy_(copy)

    return step


def accelerated(layer: nn.Linear) -> Step:
    """Let accelerate wrap the optimizer."""
    accelerate = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(layer.parameters(), lr=1e-3))

    def step(loss: Loss) -> None:
        accelerator.backward(loss())
        optimizer.step()
        optimizer.zero_grad()

    return step


def named(module: str, name: str, **options: Any) -> Callable[[Any], Any]:
    """Return what makes an optimizer of a library, loaded when it is made."""
    return lambda parameters: getattr(importlib.import_module(module), name)(parameters, **options)


def torch_optim(name: str, **options: Any) -> Case:
    """Return the case of one of torch's own."""
    shown = "".join(f", {option}" for option in options if option != "lr")
    return Case(
        name=f"`torch.optim.{name}`{shown}", make=plain(named("torch.optim", name, **options))
    )


AO = "torchao.optim"
CASES = (
    torch_optim("SGD", lr=1e-3),
    torch_optim("AdamW", lr=1e-3),
    torch_optim("AdamW", lr=1e-3, fused=True),
    torch_optim("AdamW", lr=1e-3, foreach=True),
    torch_optim("Adafactor", lr=1e-3),
    Case(name="`torch.optim.LBFGS`, a closure", make=lbfgs),
    Case(name="`torch.amp.GradScaler`", make=scaled()),
    Case(name="`torch.amp.GradScaler`, fused AdamW", make=scaled(fused=True)),
    Case(name="an optimizer a parameter, in backward", make=in_backward),
    Case(name="accelerate", make=accelerated, library="accelerate"),
    Case(
        name="schedulefree `AdamWScheduleFree`",
        make=plain(named("schedulefree", "AdamWScheduleFree", lr=1e-3)),
        library="schedulefree",
    ),
    Case(
        name="bitsandbytes `AdamW8bit`, on a CPU",
        make=plain(named("bitsandbytes.optim", "AdamW8bit", lr=1e-3)),
        library="bitsandbytes",
    ),
    Case(
        name="torchao `AdamW8bit`", make=plain(named(AO, "AdamW8bit", lr=1e-3)), library="torchao"
    ),
    Case(
        name="torchao `CPUOffloadOptimizer`",
        make=plain(named(AO, "CPUOffloadOptimizer", lr=1e-3)),
        library="torchao",
        is_followed=False,
    ),
    Case(name="float32 copies, `param.main_param` (as Megatron-LM)", make=masters(megatron)),
    Case(name="flat float32 copy, `param._hp_mapping` (as DeepSpeed)", make=flat(has_link=True)),
    Case(name="float32 copies, `optimizer._amp_stash` (as apex)", make=apex),
    Case(name="a flat buffer of which the parameters are views", make=views),
    Case(name="float32 copies without a link", make=masters(None), is_followed=False),
    Case(name="copies on the host, an optimizer each", make=offloaded, is_followed=False),
    Case(name="a flat copy without a link", make=flat(has_link=False), is_followed=False),
    Case(name="updates in gradient hooks (as LOMO)", make=lomo, is_followed=False),
    Case(name="updates by hand", make=by_hand, is_followed=False),
    Case(name="a frozen model behind a trained probe", make=prompt, is_followed=False),
)


def row(case: Case) -> str:
    """Return a case's row of the table."""
    try:
        alone, told = (histories(case, tells=tells) for tells in (False, True))
    except ImportError:
        return f"| {case.name} | not installed | | |"
    except (RuntimeError, AssertionError) as error:
        return f"| {case.name} | does not run here: {str(error).splitlines()[0]} | | |"
    by_itself = "one update a step" if is_right(alone) else f"{len(alone)} updates"
    beside = "one update a step" if is_right(told) else f"wrong: {told}"
    call = "nothing" if is_right(alone) else "`unclamp.step(model)`"
    return f"| {case.name} | {by_itself} | {beside} | {call} |"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.optimizers", description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    print(
        "| trained by | by itself | with `unclamp.step(model)` | what to call |\n|---|---|---|---|"
    )
    for each in CASES:
        print(row(each))
