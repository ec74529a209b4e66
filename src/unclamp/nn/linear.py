"""The linear layer in FP8: three casts a step, three GEMMs.

With tokens T, in features K, out features N, and a hat for a tensor that went through FP8:

    output       [T, N] = input_hat [T, K] @ weight_hat [N, K].T + bias
    grad_input   [T, K] = grad_output_hat [T, N] @ weight_hat [N, K]
    grad_weight  [N, K] = grad_output_hat [T, N].T @ input_hat [T, K]
    grad_bias    [N]    = sum of grad_output over T, in high precision

The codes of input and weight that the forward made are what backward uses: three casts and not
six, one byte an element kept for backward, and no chance of two scales for one tensor. On a GPU
the codes of a weight that would be most of what is kept are made again in backward. A re-computed
forward (activation checkpointing) finds the same scales, since they change only after an
optimizer step.

Statistics are kept with the graph node and committed to the ledger when its backward runs,
once. So an evaluation forward changes nothing, and a forward that runs twice for one backward
counts once. A layer that takes part in training without needing a gradient itself (frozen, at
the bottom of the model) has no backward: it commits in the forward.

Where blocks share a scale along the contracted axis, the two GEMMs of an operand need two casts,
each along its own axis and each from the tensor itself: backward keeps the codes of the second.

The emulation computes in float32 on the dequantised values. With every role in high precision
the layer *is* `nn.Linear`, bit for bit; a GEMM in high precision is the one of `nn.Linear`.

A *smoothed* layer multiplies each channel of its input by a power of two that brings the
channel's amax into (1/2, 1], and the weight's column by the inverse, before the casts:

    input @ weight.T = (input * s) @ (weight / s).T        exact for powers of two

On the down projection of a gated MLP that is Smooth-SwiGLU (arXiv 2409.12517): the channel's
scale, folded into the up projection whose output it multiplies, and into the down projection.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unclamp.names import GEMMS, ROLES, Gemm, Role
from unclamp.nn.site import Casts, LayerSites, Seen
from unclamp.numerics import GemmOperand, Stat, channel_scale
from unclamp.numerics.operators import gemm, sum_tokens
from unclamp.scaling import HighPrecision, describe

Commit = Literal["in backward", "now"] | None
"""When a forward's statistics reach the ledger; None: never, it is an evaluation."""

STATE_PREFIX = "unclamp_"
"""Starts the name of every key of scaling state in a state_dict."""


def weights_only(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state_dict without scaling state: what a model that is not converted can load.

    Transformers' `save_pretrained(path, state_dict=weights_only(model.state_dict()))` writes a
    checkpoint for others in the middle of training.
    """
    return {
        key: value
        for key, value in state_dict.items()
        if not key.rpartition(".")[2].startswith(STATE_PREFIX)
    }


class Fp8Linear(nn.Linear):
    """An `nn.Linear` whose operands go through FP8. Made by `unclamp.convert`, not by hand.

    Parameters, their names and the state_dict keys of the weights are those of `nn.Linear`.
    The scaling state adds keys that start with `unclamp_`, plain tensors; a checkpoint without
    them loads, strictly too, and the next tensor seeds the scale.

    Shapes: input `[..., in_features]`, output `[..., out_features]`, any leading shape, empty
    included. Input dtype in, input dtype out (under autocast: autocast's).
    """

    sites: LayerSites

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias` with the operands cast as the recipe says.

        Raises:
            ValueError: The last dimension is not `in_features`.
        """
        if self.sites.plain:
            return F.linear(input, self.weight, self.bias)
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.sites.fqn}: expected an input [..., {self.in_features}], "
                f"got {list(input.shape)}"
            )
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        commit = self._when_to_commit(input)
        # Reshaped out here: an in-place operation on a view made inside the function would fail.
        tokens = input.reshape(input.shape[:-1].numel(), self.in_features)
        output = _Fp8LinearFunction.apply(tokens, self.weight, self.bias, self.sites, commit)
        return output.reshape(*input.shape[:-1], self.out_features)

    def _when_to_commit(self, input: Tensor) -> Commit:
        if not (self.training and torch.is_grad_enabled()):
            return None
        if any(t is not None and t.requires_grad for t in (input, self.weight, self.bias)):
            return "in backward"
        # Without a backward of its own, a forward that backward re-computes must not count again.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return "now"
        return None

    def extra_repr(self) -> str:
        """Add to what `nn.Linear` shows: scalings, formats, GEMMs that are special, smoothing."""
        operands = {role: self.sites.operand(role) for role in ROLES}
        roles = ", ".join(
            f"{role}={describe(operand.scaling)}"
            + ("" if isinstance(operand.scaling, HighPrecision) else f":{operand.format.name}")
            for role, operand in operands.items()
        )
        modes = "".join(f", {g}={m}" for g, m in self.sites.modes.items() if m != "float32")
        smooth = ", smooth" if self.sites.smooth else ""
        smooth += ", only observed" if self.sites.ledger.observes else ""
        return f"{super().extra_repr()}, {roles}{modes}{smooth}"

    def _apply(self, fn: Any, recurse: bool = True) -> "Fp8Linear":
        super()._apply(fn, recurse)
        self.sites.ledger.move_to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        ledger = self.sites.ledger
        if ledger.observes:  # the checkpoint is that of the plain model
            return
        for role, index in self.sites.indices.items():
            key = f"{prefix}{STATE_PREFIX}{role}"
            destination[f"{key}_amax_history"] = ledger.history_of(index)
            destination[f"{key}_scale"] = ledger.scale_of(index)
        destination[f"{prefix}{STATE_PREFIX}updates"] = torch.tensor(ledger.count())

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = f"{prefix}{STATE_PREFIX}"
        # A state_dict that does not speak of this layer, such as an adapter's, changes nothing.
        if f"{prefix}weight" in state_dict or any(key.startswith(own) for key in state_dict):
            ledger = self.sites.ledger
            for role, index in self.sites.indices.items():
                history = state_dict.get(f"{own}{role}_amax_history")
                ledger.restore(index, history, state_dict.get(f"{own}{role}_scale"))
            if f"{own}updates" in state_dict:
                ledger.restore_updates(int(state_dict[f"{own}updates"]))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.sites.ledger.move_to(self.weight.device)  # assign=True may bring another device
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(own)]


class _Fp8LinearFunction(torch.autograd.Function):
    """Forward and backward as three GEMMs; see the module's equations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sites: LayerSites, commit: Commit
    ) -> Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        plain = {"input": x, "weight": weight}
        smooth = channel_scale(x) if sites.smooth else None
        tensors = plain if smooth is None else _smoothed(x, weight, smooth)
        x_gemms: list[Gemm] = ["output", "grad_weight"] if needs_weight else ["output"]
        remakes = needs_input and sites.remakes_weight(weight, x.shape[0])
        keeps = needs_input and not remakes
        w_gemms: list[Gemm] = ["output", "grad_input"] if keeps else ["output"]
        casts: dict[Role, Casts] = {
            "input": sites.cast("input", tensors["input"], x_gemms),
            "weight": sites.cast("weight", tensors["weight"], w_gemms),
        }

        def operand(role: Role, gemm: Gemm) -> GemmOperand:
            tensor = (plain if sites.is_high(gemm) else tensors)[role]
            return sites.gemm_operand(role, tensor, casts[role], gemm, high=sites.is_high(gemm))

        output = _gemm(
            sites,
            "output",
            operand("input", "output"),
            operand("weight", "output"),
            bias,
            high=sites.is_high("output"),
            dtype=x.dtype,
        )
        kept_x = operand("input", "grad_weight") if needs_weight else NOTHING
        kept_w = operand("weight", "grad_input") if keeps else NOTHING
        ctx.remade = sites.casts["weight"] if remakes else None
        if remakes:
            scale = sites.scales["weight", 1]
            kept_w = GemmOperand(weight, None if scale is None else scale.clone())
        # Nothing of the codes may stay outside of `save_for_backward`, or checkpointing keeps it.
        seen: dict[Role, Seen] = {role: sites.seen(role, made) for role, made in casts.items()}
        ctx.sites, ctx.commit, ctx.seen = sites, commit, seen
        ctx.high = {name: sites.is_high(name) for name in GEMMS}
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.granularities = (kept_x.granularity, kept_w.granularity)
        ctx.save_for_backward(*kept_x[:2], *kept_w[:2], smooth)
        if commit == "now":
            sites.commit(seen)
        output = output.to(x.dtype)
        # A view: where a compiled function returns an operator's very result, torch 2.11 takes
        # the gradient for zeros.
        return output.view_as(output) if torch.compiler.is_compiling() else output

    # A second derivative would silently miss everything that goes through a cast: raise.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy = grad_outputs[0]
        saved = ctx.saved_tensors  # once: under checkpointing each read unpacks, and may only once
        smooth, sites = saved[4], ctx.sites
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wanted: dict[Gemm, bool] = {"grad_input": needs_input, "grad_weight": needs_weight}
        gemms = [name for name, is_wanted in wanted.items() if is_wanted]
        casts = sites.cast("grad_output", dy, gemms)
        seen = sites.seen("grad_output", casts)

        def gradient(name: Gemm, kept: GemmOperand) -> Tensor:
            high = ctx.high[name]
            operand = sites.gemm_operand("grad_output", dy, casts, name, high=high)
            # Smoothing comes after the sum, and before it is rounded.
            exact = smooth is not None and not high
            dtype = torch.float32 if exact else x_dtype if name == "grad_input" else weight_dtype
            grad = _gemm(sites, name, operand, kept, high=high, dtype=dtype)
            if smooth is None or high:
                return grad
            return grad * smooth if name == "grad_input" else grad / smooth

        grad_input = grad_weight = grad_bias = None
        if needs_input:
            if ctx.remade is not None:
                kept_w = sites.remake(saved[2], saved[3], ctx.remade)
            else:
                kept_w = GemmOperand(saved[2], saved[3], ctx.granularities[1], 0)
            grad_input = _poisoned(gradient("grad_input", kept_w).to(x_dtype), dy, seen.stats)
        if needs_weight:
            kept_x = GemmOperand(saved[0], saved[1], ctx.granularities[0], 0)
            grad_weight = _poisoned(
                gradient("grad_weight", kept_x).to(weight_dtype), dy, seen.stats
            )
        if needs_bias:
            grad_bias = sum_tokens(dy).to(bias_dtype)
        if ctx.commit == "in backward":
            sites.commit({**ctx.seen, "grad_output": seen})
            ctx.seen = {}
        return grad_input, grad_weight, grad_bias, None, None


NOTHING = GemmOperand(None)  # pyright: ignore[reportArgumentType]
"""Stands for an operand that backward does not need."""


def _smoothed(x: Tensor, weight: Tensor, smooth: Tensor) -> dict[Role, Tensor]:
    """Return input and weight with each channel scaled; float32 holds the products exactly."""
    return {"input": x.to(torch.float32) * smooth, "weight": weight.to(torch.float32) / smooth}


def _poisoned(grad: Tensor, dy: Tensor, stats: Tensor) -> Tensor:
    """Return NaN for a gradient made of a float16 one with an Inf: loss scaling must see it.

    The cast saturates Inf, and a gradient scaler would take an overflow for a good step.
    """
    if dy.dtype != torch.float16:
        return grad
    return torch.where(stats[Stat.NONFINITE] > 0, torch.nan, grad)


def _gemm(
    sites: LayerSites,
    name: Gemm,
    a: GemmOperand,
    b: GemmOperand,
    bias: Tensor | None = None,
    *,
    high: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply as the layer's plan says; in high precision as `nn.Linear` does.

    `dtype` is that of the result; one in high precision has its operands' own.
    """
    if not high:
        return gemm(a, b, bias, sites.modes[name], dtype)
    left, right = (x.tensor if x.axis == 1 else x.tensor.t() for x in (a, b))
    with torch.autocast(left.device.type, enabled=False):
        bias = None if bias is None else bias.to(left.dtype)
        return F.linear(left, right.to(left.dtype), bias)
