"""All answers of one device, and what unclamp runs there."""

import importlib
import platform
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from unclamp.doctor.casts import SOURCES, CastAnswer, probe_cast
from unclamp.doctor.experiments import TrapAnswer, probe_traps
from unclamp.doctor.kernels import KernelAnswer, kernels_by_scaling
from unclamp.doctor.matmul import MatmulAnswer, api, probe_matmul
from unclamp.errors import UnclampWarning
from unclamp.formats import FORMATS
from unclamp.numerics.gpu import architecture
from unclamp.numerics.gpu.gemm import has_fp8_gemm
from unclamp.numerics.paths import path_of
from unclamp.traps.answers import one_line

NO_ACCUMULATION = "not available"


@dataclass(frozen=True, kw_only=True)
class DeviceAnswer:
    """What was found on one device.

    Attributes:
        device: torch's name of it.
        name: What the hardware is.
        matmul_api: The scaled matmul that was probed.
        kernels: What unclamp runs for each job.
        by_scaling: The same for each scaling and granularity.
        traps: How those experiments of `unclamp.traps` behaved that take no time.
    """

    device: str
    name: str
    casts: tuple[CastAnswer, ...]
    matmul_api: str
    matmul: tuple[MatmulAnswer, ...]
    kernels: dict[str, str]
    by_scaling: tuple[KernelAnswer, ...] = ()
    traps: tuple[TrapAnswer, ...] = ()

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
        kernels=kernels(device),
        by_scaling=kernels_by_scaling(device),
        traps=probe_traps(device),
    )


def kernels(device: str) -> dict[str, str]:
    """Return what unclamp runs for each job on a device, asked of those who decide it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnclampWarning)
        return {
            "casts": casts(device),
            "GEMMs": gemms(device),
            "Hopper-like accumulation": accumulation(),
        }


def casts(device: str) -> str:
    """Return what computes a cast on this device: `numerics.paths` of a tensor there."""
    try:
        return path_of(torch.ones(16, 16, device=device)).value
    except Exception as error:
        return one_line(error)


def gemms(device: str) -> str:
    """Return what multiplies FP8 operands on this device."""
    if not device.startswith("cuda"):
        return "emulated: dequantised values, multiplied in float32"
    try:
        arch = architecture(torch.device(device))
    except Exception as error:
        return one_line(error)
    if has_fp8_gemm(arch):
        return "torch's scaled matmul, on FP8 tensor cores"
    return f"dequantised, at the speed of bfloat16: {arch} has no FP8 tensor cores"


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
