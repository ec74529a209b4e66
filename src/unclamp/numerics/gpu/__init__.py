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
    if torch.compiler.is_compiling():  # a graph does not look at the environment
        return x.device.type == "cuda"
    return x.device.type == "cuda" or (x.device.type == "cpu" and is_interpreted())


def host_may_look(x: Tensor) -> bool:
    """Whether the host sees a tensor's elements without waiting for a device that computes them."""
    if torch.compiler.is_compiling():
        return x.device.type == "cpu"
    return x.device.type == "cpu" and not is_interpreted()


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take a tensor: memory of a GPU, and no stand-in for it."""
    is_real = type(x) in (Tensor, torch.nn.Parameter)
    return is_real and goes_to_gpu(x) and _has_triton()


_MAY_BE_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton itself asks once, when it is imported; looking at the environment in every cast costs."""


def is_interpreted() -> bool:
    """Whether tensors of the CPU go the way of a GPU's."""
    return _MAY_BE_INTERPRETED and os.environ.get(DEVICE_PATH) == "interpreter"


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


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
