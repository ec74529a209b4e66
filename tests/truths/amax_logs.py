"""Logs of planted amaxes, as a dynamic run would have written them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.formats import FORMATS
from unclamp.runlog import Header, RunLogWriter

Site = tuple[str, str]
DEFAULT_FORMATS = {"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e5m2"}


def write_amaxes(
    path: Path,
    amaxes: Mapping[Site, np.ndarray],
    *,
    priced: Mapping[Site, float] | None = None,
    clamped_at: Sequence[int] = (),
    loss: float | None = None,
    **header: Any,
) -> Path:
    """Write a run: of each site, (fqn, role), one amax a step.

    Of sites that are `priced`, the casts `clamped_at` these steps clamped one element at this
    price. With a `loss` every step has it.
    """
    sites, priced = list(amaxes), priced or {}
    formats = [DEFAULT_FORMATS[role] for _, role in sites]
    with RunLogWriter(path, header=Header(unclamp_version="0", **header)) as writer:
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
            hit = np.isin(np.arange(len(amax)), clamped_at) & (site in priced)
            writer.add(
                "casts",
                {
                    "step": np.arange(len(amax)),
                    "site": np.full(len(amax), number, np.int32),
                    "amax": amax,
                    "scale": 448 / np.maximum(amax, 1e-6),
                    "elements": zeros + 1000,
                    **dict.fromkeys(("underflowed", "nonfinite", "recast"), zeros),
                    "saturated": hit.astype(np.int64),
                    "saturated_error": 0.1 * hit,
                    "price_clamp": [priced[site] if each else None for each in hit],
                    "microsteps": (zeros + 1).astype(np.int32),
                },
            )
        if loss is not None:
            steps = np.arange(len(next(iter(amaxes.values()))))
            writer.add(
                "steps", {"step": steps, "time_s": steps * 1.0, "loss": np.full(len(steps), loss)}
            )
    return path
