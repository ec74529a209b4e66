"""Logs of planted amaxes, as a dynamic run would have written them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unclamp.formats import FORMATS
from unclamp.runlog import Header, RunLogWriter

Site = tuple[str, str]
DEFAULT_FORMATS = {"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e5m2"}


def write_amaxes(path: Path, amaxes: Mapping[Site, np.ndarray], **header: object) -> Path:
    """Write a run: of each site, (fqn, role), one amax a step."""
    sites = list(amaxes)
    formats = [DEFAULT_FORMATS[role] for _, role in sites]
    with RunLogWriter(path, header=Header(unclamp_version="0", **header)) as writer:  # type: ignore[arg-type]
        writer.add(
            "sites",
            {
                "site": list(range(len(sites))),
                "fqn": [fqn for fqn, _ in sites],
                "role": [role for _, role in sites],
                "format": formats,
                "scaling": ["dynamic"] * len(sites),
                "format_max": [FORMATS[name].max for name in formats],
            },
        )
        for number, site in enumerate(sites):
            amax = np.asarray(amaxes[site], np.float32)
            zeros = np.zeros(len(amax), np.int64)
            writer.add(
                "casts",
                {
                    "step": np.arange(len(amax)),
                    "site": np.full(len(amax), number, np.int32),
                    "amax": amax,
                    "scale": 448 / np.maximum(amax, 1e-6),
                    "elements": zeros + 1000,
                    **dict.fromkeys(("saturated", "underflowed", "nonfinite", "recast"), zeros),
                    "saturated_error": zeros.astype(float),
                    "microsteps": (zeros + 1).astype(np.int32),
                },
            )
    return path
