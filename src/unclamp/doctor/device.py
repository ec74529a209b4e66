"""All answers of one device, and what unclamp runs there."""

import importlib
import platform
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from unclamp.doctor.casts import SOURCES, CastAnswer, one_line, probe_cast
from unclamp.doctor.matmul import MatmulAnswer, api, probe_matmul
from unclamp.errors import UnclampWarning
from unclamp.formats import FORMATS
from unclamp.numerics.fused import fused

NO_ACCUMULATION = "not available"


@dataclass(frozen=True, kw_only=True)
class DeviceAnswer:
    """What was found on one device.

    Attributes:
        device: torch's name of it.
        name: What the hardware is.
        matmul_api: The scaled matmul that was probed.
        kernels: What unclamp runs for each job.
    """

    device: str
    name: str
    casts: tuple[CastAnswer, ...]
    matmul_api: str
    matmul: tuple[MatmulAnswer, ...]
    kernels: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def probe_device(device: str) -> DeviceAnswer:
    """Try everything on one device; what raises there is reported as the answer."""
    return DeviceAnswer(
        device=device,
        name=_hardware(device),
        casts=tuple(probe_cast(f, source, device) for f in FORMATS.values() for source in SOURCES),
        matmul_api=api(),
        matmul=probe_matmul(device),
        kernels={
            "casts": casts(device),
            "GEMMs": "emulated: dequantised values, multiplied in float32",
            "Hopper-like accumulation": accumulation(),
            "Triton kernels": "none yet",
        },
    )


def casts(device: str) -> str:
    """Return what computes a cast on this device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnclampWarning)
        is_fused = device == "cpu" and fused() is not None
    return "one pass, compiled by numba" if is_fused else "plain torch operations"


@cache
def accumulation() -> str:
    """Return what computes Hopper-like accumulation: numba, if it imports and compiles."""
    try:
        numba = importlib.import_module("numba")
        compiled = numba.njit(lambda x: x + 1)(1.0)
    except Exception as error:
        return f"{NO_ACCUMULATION}: {one_line(error)}"
    return "numba, on the CPU" if compiled == 2 else f"{NO_ACCUMULATION}: numba gives {compiled!r}"


def _hardware(device: str) -> str:
    if not device.startswith("cuda"):
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    try:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    except Exception as error:
        return one_line(error)
