"""The casts and GEMMs on a GPU: which tensors they take, and nothing that loads Triton.

`cast` and `cast_blocks` launch Triton kernels and are imported when a first tensor comes that
they take; `gemm` multiplies by torch's scaled matmul.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

DEVICE_PATH = "UNCLAMP_DEVICE_PATH"
"""Environment variable: "interpreter" sends tensors of the CPU the way of a GPU's, with kernels
run by Triton's interpreter (TRITON_INTERPRET=1). For tests; some thousand times slower."""


def goes_to_gpu(x: Tensor) -> bool:
    """Whether a tensor's casts and GEMMs go the way of a GPU; stand-ins for tensors too."""
    kind = x.device.type
    return kind == "cuda" or (kind == "cpu" and is_interpreted())


def host_may_look(x: Tensor) -> bool:
    """Whether the host sees a tensor's elements without waiting for a device that computes them."""
    return x.device.type == "cpu" and not is_interpreted()


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take a tensor that goes to a GPU: memory, no stand-in for it."""
    return type(x) in (Tensor, torch.nn.Parameter) and _has_triton()


_MAY_BE_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton itself asks once, when it is imported; looking at the environment in every cast costs."""


def is_interpreted() -> bool:
    """Whether tensors of the CPU go the way of a GPU's; no graph looks at the environment."""
    return (
        _MAY_BE_INTERPRETED
        and not torch.compiler.is_compiling()
        and os.environ.get(DEVICE_PATH) == "interpreter"
    )


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    # Not `is_available`, which counts the devices: before the first use nothing is captured.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def architecture(device: torch.device) -> str:
    """Return what a device is: "sm_90", "gfx942", or the type of a device that is no GPU."""
    if device.type != "cuda":
        return device.type
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    name = getattr(properties, "gcnArchName", "")
    if torch.version.hip is not None and name:
        return name.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
