"""A run that holds one of everything, planted: tests know what a page must say of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.runlog import Header, RunLogWriter

SITES = [("model.layers.0.down", "input", "e4m3fn", 448.0),
         ("model.layers.0.down", "weight", "e4m3fn", 448.0),
         ("model.layers.1.up", "grad_output", "e5m2", 57344.0)]  # fmt: skip
SPIKE, CLAMP_STEPS = 150, (148, 149)


def write_planted(
    path: Path,
    *,
    steps: int = 200,
    status: Any = "finished",
    observed: bool = False,
    **metadata: Any,
) -> Path:
    """Write a run with a loss spike at 150 to 152, a clamping site, a switch and events.

    Site 0 clamps 5 elements at steps 148 and 149, with clamp error 0.5 and 0.25, and is
    inspected at every fiftieth step; the others never clamp.
    """
    header = Header(unclamp_version="test", observed=observed, metadata=metadata)
    generator = np.random.default_rng(0)
    loss = 2.0 + 0.01 * generator.standard_normal(steps)
    norm = 1.0 + 0.01 * generator.standard_normal(steps)
    loss[SPIKE : SPIKE + 3] = 5.0
    with RunLogWriter(path, header=header) as writer:
        fqns, roles, formats, largest = map(list, zip(*SITES, strict=True))
        writer.add("sites", {"site": [0, 1, 2], "fqn": fqns, "role": roles, "format": formats,
                             "format_max": largest, "scaling": ["delayed"] * 3,
                             "granularity": ["tensor"] * 3})  # fmt: skip
        for step in range(steps):
            writer.add("steps", {"step": [step], "loss": [loss[step]], "grad_norm": [norm[step]],
                                 "time_s": [float(step)], "step_ms": [10.0],
                                 "scalars": [[("tokens", 100.0)]]})  # fmt: skip
            writer.add("casts", _casts(step))
        change = {"fqn": fqns[2], "role": roles[2], "before": {"scaling": "delayed"},
                  "after": {"scaling": "dynamic"}}  # fmt: skip
        for step, kind, data in (
            (160, "switch", {"sites": [change]}),
            (140, "snapshot", {"path": "snap-140"}),
            (170, "note", {"text": "</script><b>"}),
        ):
            writer.add("events", {"step": [step], "kind": [kind], "data": [json.dumps(data)]})
        writer.close(status)
    return path


def _casts(step: int) -> dict[str, Any]:
    clamps = step in CLAMP_STEPS
    looked = step % 50 == 0
    return {
        "step": [step] * 3,
        "site": [0, 1, 2],
        "amax": [896.0 if clamps else 112.0, 1.0, 2.0],
        "scale": [1.0, 2.0, 4.0],
        "elements": [1000] * 3,
        "saturated": [5 if clamps else 0, 0, 0],
        "underflowed": [10, 0, 0],
        "nonfinite": [0, 0, 1 if step == 7 else 0],
        "recast": [0, 1 if step == 9 else 0, 0],
        "saturated_error": [{148: 0.5, 149: 0.25}.get(step, 0.0), 0.0, 0.0],
        "microsteps": [1] * 3,
        "sqnr_db": [20.0 + step / 50 if looked else None, None, None],
        "exponents": [[(-3, 600), (6, 300 + step)] if looked else None, None, None],
    }


def write_large(path: Path, *, steps: int = 40) -> Path:
    """Write 1,680 sites; site i has clamp error that falls with i."""
    roles = ("input", "weight", "grad_output")
    names = [
        (f"model.layers.{i}.{m}", role) for i in range(80) for m in "qkvogud" for role in roles
    ]
    same = {
        "format": ["e4m3fn"] * 1680,
        "format_max": [448.0] * 1680,
        "scaling": ["delayed"] * 1680,
    }
    with RunLogWriter(path, header=Header(unclamp_version="test")) as writer:
        fqns, role = map(list, zip(*names, strict=True))
        writer.add("sites", {"site": range(1680), "fqn": fqns, "role": role, **same})
        for step in range(steps):
            zeros = [0] * 1680
            writer.add("steps", {"step": [step], "loss": [2.0], "time_s": [0.0]})
            writer.add("casts", {"step": [step] * 1680, "site": range(1680), "amax": [1.0] * 1680,
                "scale": [448.0] * 1680, "elements": [100] * 1680, "saturated": [1] * 1680,
                "underflowed": zeros, "nonfinite": zeros, "recast": zeros, "microsteps": [1] * 1680,
                "saturated_error": [1e-3 / (1 + i) for i in range(1680)]})  # fmt: skip
    return path
