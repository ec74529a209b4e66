"""Where Transformer Engine keeps its delayed scaling state, version by version.

Nothing of Transformer Engine is imported: a module is recognised by its `fp8_meta`, and a state by
its `amax_history` and `scale`. Sources, of NVIDIA/TransformerEngine:

Early 1.x: `FP8TensorMeta` with `amax_history [L, n]`, `scale [n]`, `scale_inv [n]`. Between two
    steps row 0 is the newest amax, of which the module's next forward, or backward, makes the next
    scale; the history is another tensor each time. `pytorch/fp8.py` (`amax_and_scale_update`),
    `pytorch/module/base.py` (`prepare_forward`, `_prepare_backward`).
Later 1.x, with `make_graphed_callables`: the same tensors, updated in place by
    `reduce_and_update_fp8_tensors`, at the exit of the outermost `fp8_autocast` and at the end of
    the backward. The newest amax is then in row L - 1, and row 0 is 0. `pytorch/fp8.py`,
    `common/recipe/delayed_scaling.cu`.
2.x: `DelayedScalingRecipeState` with `amax_history` and `scale`, and no `scale_inv`; updated
    likewise. `pytorch/fp8.py`, later `pytorch/quantization.py` (`RecipeState`).

Columns: forward three a GEMM (input, weight, output), backward two (grad_output, grad_input).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from unclamp.formats import E4M3FN, E5M2, Format
from unclamp.names import Role, SiteName

VERSIONS = "1.0 to 1.13 and 2.x"
"""Releases whose layouts are read."""
KEYS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
"""Of the two states in `fp8_meta` (`FP8GlobalStateManager.get_meta_tensor_key`)."""
STRIDES = {"forward": 3, "backward": 2}
"""Columns a GEMM (`TransformerEngineBaseModule.set_meta_tensor`)."""
EARLY_KEY = "update_amax_and_scale_fwd"
"""Key of `fp8_meta` in early 1.x, where a forward updates what the one before it saw."""
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

Direction = Literal["forward", "backward"]
Timing = Literal["after", "before"]
"""Whether scales are updated after a pass, or before the next one."""

_ROLES: Mapping[str, Role] = {
    "input": "input",
    "weight": "weight",
    "output": "input",
    "grad_output": "grad_output",
    "grad_input": "grad_output",
}
_BY_PLACE = {"forward": ("input", "weight", "output"), "backward": ("grad_output", "grad_input")}
_ATTENTION = {
    "forward": {2: "qkv", 3: "o", 5: "o_cp", 8: "s"},
    "backward": {0: "dqkv", 1: "dqkv_cp", 3: "do", 5: "dp"},
}
"""FP8 attention (`META_QKV`, `META_O`, `META_S`, `META_DQKV`, `META_DO`, `META_DP` of
`cpp_extensions/fused_attn.py`): columns of three GEMMs that it never makes."""
_MLP_BACKWARD = {
    "1.x": {0: "fc2", 2: "fc1"},
    "2.0": {0: "fc2", 1: "fc1"},
    "2.x": {0: "fc1", 2: "fc2"},
}
"""Gradients of `LayerNormMLP` (`module/layernorm_mlp.py`): GRAD_OUTPUT1 and GRAD_OUTPUT2 of 1.x,
GRAD_OUTPUT1 and GRAD_INPUT1 of the first 2.x, and 1.x the other way round since."""


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """One module's delayed scaling state of one direction.

    Attributes:
        fqn: Dotted name of the module.
        module: The module.
        direction: Of the pass whose tensors are cast with it.
        tensors: What holds `amax_history` and `scale`.
    """

    fqn: str
    module: nn.Module
    direction: Direction
    tensors: Any

    @property
    def history(self) -> Tensor:
        """Amaxes, float32 `[L, n]`."""
        return self.tensors.amax_history

    @property
    def scale(self) -> Tensor:
        """Scales of the coming pass, or of the last one, by `timing`; float32 `[n]`."""
        return self.tensors.scale

    @property
    def meta(self) -> Mapping[str, Any]:
        """The module's `fp8_meta`."""
        return self.module.fp8_meta  # type: ignore[return-value]

    @property
    def timing(self) -> Timing:
        """When scales are updated."""
        return "before" if EARLY_KEY in self.meta else "after"

    @property
    def recipe(self) -> Any:
        """The recipe of the state, or else of the module."""
        return getattr(self.tensors, "recipe", None) or self.meta.get("recipe")

    @property
    def format(self) -> Format:
        """E4M3 in the forward; E5M2 in the backward, unless the recipe says E4M3."""
        name = getattr(getattr(self.recipe, "fp8_format", None), "name", "HYBRID")
        if name == "E5M2" or (name == "HYBRID" and self.direction == "backward"):
            return E5M2
        return E4M3FN

    def names(self, used: frozenset[int]) -> dict[int, SiteName]:
        """Return the sites of some columns that were cast, by column.

        Args:
            used: All columns in which any amax was seen: they tell versions apart.
        """
        found = {column: self._name(column, used) for column in sorted(used)}
        return {column: name for column, name in found.items() if name is not None}

    def _name(self, column: int, used: frozenset[int]) -> SiteName | None:
        slot = self._slot(column)
        if slot is not None:
            return self._site(*slot)
        if "Attention" in type(self.module).__name__:
            tensor = _ATTENTION[self.direction].get(column, f"tensor{column}")
            role: Role = "input" if self.direction == "forward" else "grad_output"
            return SiteName(_joined(self.fqn, tensor), role)
        offsets = getattr(self.module, "_offsets", None)
        if isinstance(offsets, Mapping):
            return self._grouped(column, offsets)
        if self._is_mlp and self.direction == "backward":
            product = _MLP_BACKWARD[self._mlp_version(used)].get(column)
            if product is not None:
                return self._site(product, "grad_output")
        gemm, place = divmod(column, STRIDES[self.direction])
        return self._site(self._product(gemm), _BY_PLACE[self.direction][place])

    def _slot(self, column: int) -> tuple[str, str] | None:
        """Return product and tensor that the state itself names, as of 2.x with roles."""
        roles = getattr(self.tensors, "roles", None)
        role = roles[column] if roles is not None and column < len(roles) else None
        tensor = getattr(role, "tensor_type", "")
        if tensor not in _ROLES:
            return None
        if self._is_mlp:
            name = str(getattr(role, "name", ""))
            return (name, tensor) if name in ("fc1", "fc2") else None
        return None if self._gemms != 1 else ("", tensor)

    @property
    def _gemms(self) -> int:
        return int(self.meta.get("num_gemms") or self.scale.numel() // STRIDES[self.direction])

    @property
    def _is_mlp(self) -> bool:
        return hasattr(self.module, "fc1_weight") and hasattr(self.module, "fc2_weight")

    def _mlp_version(self, used: frozenset[int]) -> str:
        if hasattr(self.tensors, "scale_inv"):
            return "1.x"
        return "2.0" if 1 in used and 2 not in used else "2.x"

    def _product(self, gemm: int) -> str:
        if self._is_mlp:
            return f"fc{gemm + 1}"
        return "" if self._gemms == 1 else str(gemm)

    def _grouped(self, column: int, offsets: Mapping[str, int]) -> SiteName | None:
        """Return a column of a `GroupedLinear`: its tensors side by side, or a GEMM after another.

        2.x says how many columns a GEMM has; before it all inputs came first, then all weights.
        """
        per_gemm = getattr(self.module, "_num_fp8_tensors_per_gemm", None)
        stride = STRIDES[self.direction] if per_gemm else 1
        for tensor in _BY_PLACE[self.direction]:
            gemm, rest = divmod(column - offsets[tensor], stride)
            if rest == 0 and 0 <= gemm < self._gemms:
                return self._site(str(gemm), tensor)
        return None

    def _site(self, product: str, tensor: str) -> SiteName:
        """Return the site of a tensor; outputs that are cast get a name of their own."""
        suffix = tensor if tensor in ("output", "grad_input") else ""
        return SiteName(_joined(self.fqn, product, suffix), _ROLES[tensor])


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the modules of Transformer Engine hold by now.

    Attributes:
        states: The delayed scaling states there are; they come with the first FP8 forward.
        stateless: Modules whose recipe keeps no state (current, block scaling), with its name.
        unread: Modules whose state has a layout that is not read here: custom recipes of which
            some tensors alone are scaled by histories.
    """

    states: list[State]
    stateless: dict[str, str]
    unread: list[str]


@dataclass(frozen=True, kw_only=True)
class Modules:
    """The modules of Transformer Engine in a model, found once.

    Attributes:
        by_name: Those with an `fp8_meta`, by their dotted names, in the model's order.
        operations: Names of `te.ops`, whose state is not read.
    """

    by_name: Mapping[str, nn.Module]
    operations: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> "Modules":
        """Find those of a model."""
        named = [(_bare(name), module) for name, module in model.named_modules()]
        return cls(
            by_name={
                name: module
                for name, module in named
                if isinstance(getattr(module, "fp8_meta", None), Mapping)
            },
            operations=[
                name for name, module in named if getattr(module, "_fp8_metas", None) is not None
            ],
        )

    def find(self) -> Found:
        """Return what they hold now."""
        states: list[State] = []
        stateless, unread = {}, []
        for fqn, module in self.by_name.items():
            own = list(_states(fqn, module))
            if any(hasattr(state.tensors, "_inner_delayed_scaling_recipe") for state in own):
                unread.append(fqn)
                continue
            delayed = [state for state in own if _is_delayed(state.tensors)]
            states += delayed
            if own and not delayed:
                stateless[fqn] = type(own[0].recipe).__name__
        return Found(states=states, stateless=stateless, unread=unread)


def _states(fqn: str, module: Any) -> Iterator[State]:
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        tensors = module.fp8_meta.get(KEYS[direction])
        if tensors is not None:
            yield State(fqn=fqn, module=module, direction=direction, tensors=tensors)


def _is_delayed(tensors: Any) -> bool:
    history, scale = getattr(tensors, "amax_history", None), getattr(tensors, "scale", None)
    return (
        isinstance(history, Tensor)
        and isinstance(scale, Tensor)
        and history.dim() == 2
        and history.shape[1] == scale.numel() > 0
    )


def _bare(name: str) -> str:
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[:1] == ["module"] else parts)


def is_shared(state: State) -> bool:
    """Whether ranks reduce the amaxes of a state, so that each holds those of the whole group."""
    return _is_reduced(state) and dist.get_world_size(_group(state)) > 1


def repeats_lower(state: State) -> bool:
    """Whether a lower rank of the group holds the same amaxes.

    Before a next pass has reduced them they are the rank's own.
    """
    is_reduced = state.timing == "after" and is_shared(state)
    return is_reduced and dist.get_rank(_group(state)) > 0


def _is_reduced(state: State) -> bool:
    is_on = dist.is_available() and dist.is_initialized()
    return is_on and bool(getattr(state.recipe, "reduce_amax", True))


def _group(state: State) -> Any:
    group = state.meta.get("fp8_group")
    return group if group is None or not isinstance(group, int) else None
