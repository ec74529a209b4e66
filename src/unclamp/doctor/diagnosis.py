"""The whole document: the build, every device's answers, and the sentences that follow."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from unclamp.doctor.device import DeviceAnswer, probe_device
from unclamp.doctor.pasted import paragraph
from unclamp.doctor.sentences import sentences
from unclamp.version import __version__


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The build, its devices, and what a user should know about them.

    Attributes:
        build: Versions and processor.
        devices: What was found on each.
        warnings: What follows, in sentences.
        paragraph: All of it in a few lines, to paste into a bug report.
    """

    build: dict[str, str]
    devices: tuple[DeviceAnswer, ...]
    warnings: tuple[str, ...]
    paragraph: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Probe the CPU and, if there is one, the current CUDA device. Takes some seconds."""
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    devices = tuple(probe_device(name) for name in names)
    versions = build()
    return Diagnosis(
        build=versions,
        devices=devices,
        warnings=tuple(sentences(devices)),
        paragraph=paragraph(versions, devices),
    )


def build() -> dict[str, str]:
    """Return the versions, and the processor, that the answers belong to."""
    return {
        "unclamp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "numpy": _version("numpy"),
        "numba": _version("numba"),
        "triton": _version("triton"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
