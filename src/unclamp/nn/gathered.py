"""A weight that came in FP8 codes: what stands in a product's place for its weight when the
ranks that hold a shard of it each sent the codes of theirs (`unclamp.parallel`).

There is no high-precision tensor behind it, so a product takes the codes and casts nothing, and
everybody else gets an error.
"""  # noqa: D205

from typing import Any

import torch
from torch import Tensor

from unclamp.errors import UnsupportedError
from unclamp.numerics import Quantized

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)
_NEW = (
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.new_empty.default,
)


class GatheredCodes(Tensor):
    """A matrix `[N, K]` of which there are codes and scales, and no values.

    Attributes:
        quantized: The cast: codes and scales of the whole matrix, and the statistics of the part
            that this rank cast.
    """

    quantized: Quantized
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, quantized: Quantized, dtype: torch.dtype) -> "GatheredCodes":
        """Make one that shows the dtype that its gradient is to have."""
        codes = quantized.codes
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, codes.shape, dtype=dtype, device=codes.device
        )
        made.quantized = quantized
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what needs no values: views of the whole, and new tensors of this shape."""
        own = next((a for a in args if isinstance(a, GatheredCodes)), None)
        if own is not None and (func in _SAME or _is_whole(func, args)):
            return GatheredCodes(own.quantized, own.dtype)
        if own is not None and own is args[0] and func in _NEW:
            like = torch.empty(own.shape, dtype=own.dtype, device="meta")
            return func(like, *args[1:], **{"device": own.device, **_given(kwargs)})
        raise UnsupportedError(
            f"{func}: expected the weight to be read by its own layer alone, since it was gathered "
            "as FP8 codes (unclamp.gather_codes); leave its layer out, or read its shards"
        )

    def __repr__(self, **_: Any) -> str:
        return f"GatheredCodes({list(self.shape)}, {self.quantized.codes.dtype})"


def _given(kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def _is_whole(func: Any, args: Any) -> bool:
    """Whether a view is one of everything, as FSDP2 takes it of what was gathered."""
    return func is _aten.as_strided.default and tuple(args[1]) == tuple(args[0].shape)
