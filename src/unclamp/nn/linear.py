"""The linear layer in FP8: three casts a step, three GEMMs.

With tokens T, in features K, out features N, and a hat for a tensor that went through FP8:

    output       [T, N] = input_hat [T, K] @ weight_hat [N, K].T + bias
    grad_input   [T, K] = grad_output_hat [T, N] @ weight_hat [N, K]
    grad_weight  [N, K] = grad_output_hat [T, N].T @ input_hat [T, K]
    grad_bias    [N]    = sum of grad_output over T, in high precision

The codes of input and weight that the forward made are what backward uses: three casts and not
six, one byte an element kept for backward, and no chance of two scales for one tensor. A
re-computed forward (activation checkpointing) finds the same scales, since they change only
after an optimizer step.

Statistics are kept with the graph node and committed to the ledger when its backward runs,
once. So an evaluation forward changes nothing, and a forward that runs twice for one backward
counts once. A layer that takes part in training without needing a gradient itself (frozen, at
the bottom of the model) has no backward: it commits in the forward.

The emulation computes in float32 on the dequantised values. With every role in high precision
the layer *is* `nn.Linear`, bit for bit.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unclamp.nn.ledger import Ledger
from unclamp.numerics import Quantized, quantize
from unclamp.recipe import ROLES, HighPrecision, Operand, Role

Commit = Literal["in backward", "now"] | None
"""When a forward's statistics reach the ledger; None: never, it is an evaluation."""

STATE_PREFIX = "unclamp_"
"""Starts the name of every key of scaling state in a state_dict."""


class LayerSites:
    """The three sites of one layer: where its operands' state lies in the ledger."""

    def __init__(self, ledger: Ledger, rows: Mapping[Role, int]) -> None:
        self.ledger = ledger
        self.rows = dict(rows)

    def operand(self, role: Role) -> Operand:
        """Return what the recipe gives this role, as it stands now."""
        return self.ledger.sites[self.rows[role]].operand

    @property
    def all_high_precision(self) -> bool:
        """Whether no role is cast."""
        return all(isinstance(self.operand(role).scaling, HighPrecision) for role in ROLES)

    def quantize(self, role: Role, x: Tensor) -> Quantized | None:
        """Cast an operand as its site says; None where it stays in high precision."""
        operand = self.operand(role)
        if isinstance(operand.scaling, HighPrecision):
            return None
        scale = self.ledger.scale_for(self.rows[role])
        return quantize(x, operand.format, scale, margin=operand.scaling.margin)

    @property
    def fqn(self) -> str:
        """Return the layer's dotted name."""
        return self.ledger.sites[self.rows["input"]].fqn


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
        if self.sites.all_high_precision:
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
        return "now" if torch._C._current_graph_task_id() == -1 else None

    def extra_repr(self) -> str:
        """Add each role's format and scaling to what `nn.Linear` shows."""
        operands = {role: self.sites.operand(role) for role in ROLES}
        roles = ", ".join(
            f"{role}={operand.scaling.kind}"
            + ("" if operand.scaling.kind == "high_precision" else f":{operand.format.name}")
            for role, operand in operands.items()
        )
        return f"{super().extra_repr()}, {roles}"

    def _apply(self, fn: Any, recurse: bool = True) -> "Fp8Linear":
        super()._apply(fn, recurse)
        self.sites.ledger.move_to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for role, row in self.sites.rows.items():
            ledger = self.sites.ledger
            key = f"{prefix}{STATE_PREFIX}{role}"
            destination[f"{key}_amax_history"] = ledger.history_of(row)
            destination[f"{key}_scale"] = ledger.scale[row].clone()

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
        for role, row in self.sites.rows.items():
            key = f"{prefix}{STATE_PREFIX}{role}"
            history = state_dict.get(f"{key}_amax_history")
            self.sites.ledger.restore(row, history, state_dict.get(f"{key}_scale"))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = f"{prefix}{STATE_PREFIX}"
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(own)]


class _Fp8LinearFunction(torch.autograd.Function):
    """Forward and backward as three GEMMs; see the module's equations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sites: LayerSites, commit: Commit
    ) -> Tensor:
        kept_input = _keep(sites.quantize("input", x), x)
        kept_weight = _keep(sites.quantize("weight", weight), weight)
        with torch.autocast(x.device.type, enabled=False):
            output = F.linear(
                kept_input.values(),
                kept_weight.values(),
                None if bias is None else bias.to(torch.float32),
            )
        ctx.sites, ctx.commit = sites, commit
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.stats = {"input": kept_input.stats, "weight": kept_weight.stats}
        if commit == "now":
            _commit(ctx)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            *(kept_input.saved if needs_weight else (None, None)),
            *(kept_weight.saved if needs_input else (None, None)),
        )
        return output.to(x.dtype)

    # A second derivative would silently miss everything that goes through a cast: raise.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy = grad_outputs[0]
        saved = ctx.saved_tensors  # once: under checkpointing each read unpacks, and may only once
        input_saved, weight_saved = saved[:2], saved[2:]
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_input = grad_weight = grad_bias = None
        if needs_input or needs_weight:
            kept = _keep(ctx.sites.quantize("grad_output", dy), dy)
            ctx.stats["grad_output"] = kept.stats
            values = kept.values()
            with torch.autocast(dy.device.type, enabled=False):
                if needs_input:
                    grad_input = values @ _Kept(*weight_saved).values()
                    grad_input = grad_input.to(x_dtype)
                if needs_weight:
                    grad_weight = values.t() @ _Kept(*input_saved).values()
                    grad_weight = grad_weight.to(weight_dtype)
        if needs_bias:
            grad_bias = dy.sum(0, dtype=torch.float32).to(bias_dtype)
        if ctx.commit == "in backward":
            _commit(ctx)
        return grad_input, grad_weight, grad_bias, None, None


class _Kept(NamedTuple):
    """An operand as backward keeps it: codes and their scale, or the tensor itself."""

    tensor: Tensor
    scale_inv: Tensor | None
    stats: Tensor | None = None

    @property
    def saved(self) -> tuple[Tensor, Tensor | None]:
        return self.tensor, self.scale_inv

    def values(self) -> Tensor:
        """Return what the GEMM computes with, float32."""
        values = self.tensor.to(torch.float32)
        return values if self.scale_inv is None else values.mul_(self.scale_inv)


def _keep(quantized: Quantized | None, x: Tensor) -> _Kept:
    if quantized is None:
        return _Kept(x, None)
    return _Kept(quantized.codes, quantized.scale_inv, quantized.stats)


def _commit(ctx: Any) -> None:
    """Hand this node's statistics to the ledger, once."""
    for role, stats in ctx.stats.items():
        if stats is not None:
            ctx.sites.ledger.commit(ctx.sites.rows[role], stats)
    ctx.stats = {}
