"""A stand-in for Transformer Engine: its buffers and update rules, version by version, on a CPU.

Written after NVIDIA/TransformerEngine: `pytorch/fp8.py`, `pytorch/quantization.py`,
`pytorch/module/base.py`, `layernorm_mlp.py`, `grouped_linear.py` and
`common/recipe/delayed_scaling.cu`. Names are theirs where anything outside reads them. Each cast
is noted in `TE.truth` with its tensor, so that tests have what happened by brute force.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Version = Literal["early 1.x", "later 1.x", "2.0", "2.x"]
VERSIONS: tuple[Version, ...] = ("early 1.x", "later 1.x", "2.0", "2.x")


class Format(Enum):
    E4M3 = (448, 448)
    HYBRID = (448, 57344)


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    scaling_factor_compute_algo: Any = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8CurrentScaling:
    fp8_format: Format = Format.HYBRID
    use_power_2_scales: bool = False


@dataclass(frozen=True)
class Cast:
    """One cast that was made: its tensor and the scale that was used, and the step of it."""

    step: int
    fqn: str
    role: str
    tensor: Tensor
    scale: float


class RecipeState:
    """Of 2.x: without `scale_inv`, with its recipe."""

    def __init__(self, recipe: Any, mode: str, columns: int) -> None:
        self.recipe, self.mode = recipe, mode
        if isinstance(recipe, DelayedScaling):
            self.scale = torch.ones(columns)
            self.amax_history = torch.zeros(recipe.amax_history_len, columns)


def update(history: Tensor, scale: Tensor, recipe: DelayedScaling, largest: float) -> Tensor:
    """Make the next scales in place and return the rolled history, which is another tensor."""
    amax: Tensor
    if callable(recipe.amax_compute_algo):
        amax = recipe.amax_compute_algo(history)  # type: ignore[assignment]
    elif recipe.amax_compute_algo == "max":
        amax = history.max(0).values
    else:
        amax = history[0].clone()
    rolled = torch.roll(history, -1, 0) if len(history) > 1 else history.clone()
    rolled[0] = 0.0
    found = (largest / amax) / (2**recipe.margin)
    found = torch.where(amax > 0.0, found, scale)
    found = torch.where(amax.isfinite(), found, scale)
    found = torch.where(found.isinf(), torch.full_like(found, torch.finfo(found.dtype).max), found)
    scale.copy_(found)
    return rolled


@dataclass
class TE:
    """What is global in Transformer Engine, of one version: autocast and the buffers.

    Attributes:
        version: Whose rules.
        truth: All casts.
        step: Number of the step that casts belong to.
    """

    version: Version
    recipe: Any = field(default_factory=DelayedScaling)
    truth: list[Cast] = field(default_factory=list)
    step: int = 0
    modules: "list[Module]" = field(default_factory=list)
    depth: int = 0
    is_first: bool = False

    @property
    def is_early(self) -> bool:
        return self.version == "early 1.x"

    @contextmanager
    def autocast(self, recipe: Any = None) -> Iterator[None]:
        self.recipe = recipe or self.recipe
        self.is_first = self.is_first or self.depth == 0
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if (
                self.depth == 0
                and not self.is_early
                and (self.version != "2.x" or torch.is_grad_enabled())
            ):
                self.reduce_and_update(forward=True)

    def reduce_and_update(self, *, forward: bool) -> None:
        for module in self.modules:
            module.update(forward=forward)


class _Gemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: "Module", gemm: int) -> Tensor:
        codes = module.cast("forward", gemm, "input", x)
        weights = module.cast("forward", gemm, "weight", weight)
        ctx.save_for_backward(codes, weights)
        ctx.module, ctx.gemm = module, gemm
        return codes @ weights.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        codes, weights = ctx.saved_tensors
        ctx.module.begin_backward()
        grad = ctx.module.cast("backward", ctx.gemm, "grad_output", grads[0])
        ctx.module.end_backward()
        return grad @ weights, grad.T @ codes, None, None


class Module(nn.Module):
    """`TransformerEngineBaseModule`: `fp8_meta` from the start, its states from the first pass."""

    gemms = 1

    def __init__(self, te: TE, fqn: str) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"recipe": te.recipe, "fp8_group": None}
        self.te, self.fqn = te, fqn
        self.left, self.trains = 0, False
        self.ends_backward = False

    def prepare_forward(self) -> None:
        te, recipe = self.te, self.te.recipe
        if "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["num_gemms"] = self.gemms
            self.fp8_meta["recipe"] = recipe
            for key, mode, columns in (
                ("scaling_fwd", "forward", 3),
                ("scaling_bwd", "backward", 2),
            ):
                self.fp8_meta[key] = self.make_state(recipe, mode, columns * self.gemms)
            te.modules.append(self)
            if not te.is_early:
                self.fp8_meta["buffer_index_and_autocast_key"] = len(te.modules)
        if te.is_early:
            if self.fp8_meta.get("update_amax_and_scale_fwd", False):
                self.update(forward=True)
            self.fp8_meta["update_amax_and_scale_fwd"] = torch.is_grad_enabled()
        self.trains = torch.is_grad_enabled()
        if self.trains:
            self.left = self.gemms
            self.ends_backward, te.is_first = te.is_first, False

    def make_state(self, recipe: Any, mode: str, columns: int) -> Any:
        if self.te.version in ("2.0", "2.x"):
            return RecipeState(recipe, mode, columns)
        return SimpleNamespace(
            scale=torch.ones(columns),
            scale_inv=torch.ones(columns),
            amax_history=torch.zeros(recipe.amax_history_len, columns),
        )

    def update(self, *, forward: bool) -> None:
        state = self.fp8_meta["scaling_fwd" if forward else "scaling_bwd"]
        if not hasattr(state, "amax_history"):
            return
        largest = self.fp8_meta["recipe"].fp8_format.value[not forward]
        rolled = update(state.amax_history, state.scale, self.fp8_meta["recipe"], largest)
        if self.te.is_early:
            state.amax_history = rolled
        else:
            state.amax_history.copy_(rolled)

    def begin_backward(self) -> None:
        if self.te.is_early and self.left == self.gemms:
            self.update(forward=False)

    def end_backward(self) -> None:
        self.left -= 1
        if self.left == 0 and self.ends_backward and not self.te.is_early:
            self.te.reduce_and_update(forward=False)

    def column(self, direction: str, gemm: int, tensor: str) -> int:
        if direction == "forward":
            return 3 * gemm + ("input", "weight", "output").index(tensor)
        return 2 * gemm

    def product(self, gemm: int) -> str:
        return self.fqn

    def cast(self, direction: str, gemm: int, tensor: str, x: Tensor) -> Tensor:
        key = {"forward": "scaling_fwd", "backward": "scaling_bwd"}[direction]
        state, x = self.fp8_meta[key], x.detach()
        largest = self.fp8_meta["recipe"].fp8_format.value[direction == "backward"]
        column = self.column(direction, gemm, tensor)
        if not hasattr(state, "amax_history"):  # current scaling
            scale = float(largest / x.abs().max().clamp(min=1e-12))
        else:
            scale = float(state.scale[column])
            seen = state.amax_history[0, column]
            state.amax_history[0, column] = torch.fmax(seen, x.abs().max())
        if self.trains:
            step = self.te.step
            self.te.truth.append(Cast(step, self.product(gemm), tensor, x.clone(), scale))
        dtype = torch.float8_e4m3fn if largest == 448 else torch.float8_e5m2
        codes = (x * scale).clamp(-largest, largest).to(dtype)
        return codes.float() / scale


class Linear(Module):
    def __init__(self, te: TE, fqn: str, inputs: int, outputs: int) -> None:
        super().__init__(te, fqn)
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare_forward()
        return _apply(x, self.weight, self, 0)


class LayerNormLinear(Linear):
    def __init__(self, te: TE, fqn: str, inputs: int, outputs: int) -> None:
        super().__init__(te, fqn, inputs, outputs)
        self.layer_norm_weight = nn.Parameter(torch.ones(inputs))

    def forward(self, x: Tensor) -> Tensor:
        self.prepare_forward()
        normed = nn.functional.layer_norm(x, x.shape[-1:], self.layer_norm_weight)
        return _apply(normed, self.weight, self, 0)


class LayerNormMLP(Module):
    gemms = 2

    def __init__(self, te: TE, fqn: str, width: int, hidden: int) -> None:
        super().__init__(te, fqn)
        self.fc1_weight = nn.Parameter(torch.randn(hidden, width) / width**0.5)
        self.fc2_weight = nn.Parameter(torch.randn(width, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare_forward()
        normed = nn.functional.layer_norm(x, x.shape[-1:])
        hidden = nn.functional.gelu(_apply(normed, self.fc1_weight, self, 0))
        return _apply(hidden, self.fc2_weight, self, 1)

    def product(self, gemm: int) -> str:
        return f"{self.fqn}.fc{gemm + 1}"

    def column(self, direction: str, gemm: int, tensor: str) -> int:
        if direction == "forward":
            return super().column(direction, gemm, tensor)
        # GRAD_OUTPUT1, GRAD_INPUT1, GRAD_OUTPUT2, GRAD_INPUT2 are 0 to 3.
        return {"early 1.x": (2, 0), "later 1.x": (2, 0), "2.0": (1, 0), "2.x": (0, 2)}[
            self.te.version
        ][gemm]


class GroupedLinear(Module):
    def __init__(self, te: TE, fqn: str, gemms: int, width: int) -> None:
        super().__init__(te, fqn)
        self.gemms = gemms
        for i in range(gemms):
            setattr(self, f"weight{i}", nn.Parameter(torch.randn(width, width) / width**0.5))
        if te.version in ("2.0", "2.x"):
            self._offsets = {"input": 0, "weight": 1, "output": 2, "grad_output": 0,
                             "grad_input": 1}  # fmt: skip
            self._num_fp8_tensors_per_gemm = {"fwd": 3, "bwd": 2}
        else:
            self._offsets = {"input": 0, "weight": gemms, "output": 2 * gemms,
                             "grad_output": 0, "grad_input": gemms}  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        self.prepare_forward()
        parts = x.chunk(self.gemms)
        return torch.cat(
            [_apply(part, getattr(self, f"weight{i}"), self, i) for i, part in enumerate(parts)]
        )

    def product(self, gemm: int) -> str:
        return f"{self.fqn}.{gemm}"

    def column(self, direction: str, gemm: int, tensor: str) -> int:
        stride = {"forward": 3, "backward": 2}[direction]
        return self._offsets[tensor] + gemm * (
            stride if hasattr(self, "_num_fp8_tensors_per_gemm") else 1
        )


class DotProductAttention(Module):
    """FP8 attention's state alone: three GEMMs' columns, of which it uses six."""

    gemms = 3
    FORWARD: ClassVar = {"qkv": 2, "o": 3, "s": 8}
    BACKWARD: ClassVar = {"dqkv": 0, "do": 3, "dp": 5}

    def forward(self, x: Tensor) -> Tensor:
        self.prepare_forward()
        return _Attention.apply(x, self)  # type: ignore[no-any-return]

    def column(self, direction: str, gemm: int, tensor: str) -> int:
        return (self.FORWARD if direction == "forward" else self.BACKWARD)[tensor]


class _Attention(torch.autograd.Function):
    """Casts what FP8 attention casts, of tensors that stand for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: DotProductAttention) -> Tensor:
        ctx.module = module
        for factor, tensor in ((1.0, "qkv"), (0.5, "s"), (2.0, "o")):
            module.cast("forward", 0, tensor, factor * x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.module.begin_backward()
        for factor, tensor in ((1.0, "do"), (0.5, "dp"), (2.0, "dqkv")):
            ctx.module.cast("backward", 0, tensor, factor * grads[0])
        ctx.module.left = 1
        ctx.module.end_backward()
        return grads[0], None


def _apply(x: Tensor, weight: Tensor, module: Module, gemm: int) -> Tensor:
    return _Gemm.apply(x, weight, module, gemm)  # type: ignore[no-any-return]


class Model(nn.Module):
    """One of each module; all but the head are named as attributes of it."""

    def __init__(self, te: TE, width: int = 16) -> None:
        super().__init__()
        self.qkv = LayerNormLinear(te, "qkv", width, width)
        self.core_attention = DotProductAttention(te, "core_attention")
        self.proj = Linear(te, "proj", width, width)
        self.mlp = LayerNormMLP(te, "mlp", width, 2 * width)
        self.experts = GroupedLinear(te, "experts", 2, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        attended = x + self.proj(self.core_attention(self.qkv(x)))
        mixed = attended + self.mlp(attended)
        return self.head(mixed + self.experts(mixed)).squeeze(-1)
