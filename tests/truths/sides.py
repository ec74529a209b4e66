"""Runs with planted losses and casts, of which a test knows how they differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.runlog import Header, RunLogWriter

DOWN, UP = "layers.0.down", "layers.0.up"
DELAYED = {
    role: {"format": "e4m3fn", "scaling": "delayed", "history_len": 16, "margin": 0}
    for role in ("input", "weight")
}
DYNAMIC = {
    role: {"format": "e4m3fn", "scaling": "dynamic", "margin": 0} for role in ("input", "weight")
}
TORCH = {"torch": "2.13", "device": "cpu"}
Casts = Mapping[int, tuple[int, float]]
"""By step: elements clamped and clamp error; steps that are not in it clamp nothing."""


def write_side(
    path: Path,
    losses: Sequence[float | None],
    *,
    steps: Sequence[int] | None = None,
    casts: Mapping[str, Casts] | None = None,
    planted: Sequence[int] = (),
    recipe: Mapping[str, Any] | None = DELAYED,
    status: Any = "finished",
    metadata: Mapping[str, Any] | None = None,
    **header: Any,
) -> Path:
    """Write a run of these losses, and casts of 1,000 elements at every step and site.

    Args:
        path: Its folder.
        losses: One a step; None where there is none.
        steps: Their numbers; 0, 1, ... without it.
        casts: By module, what its input clamped; of two modules that clamp nothing without it.
        planted: Steps with an event of that kind.
        recipe: The header's.
        status: How it ended.
        metadata: The header's.
        header: Its other fields.
    """
    at = list(range(len(losses)) if steps is None else steps)
    sites = {DOWN: {}, UP: {}} if casts is None else casts
    header.setdefault("environment", TORCH)
    made = Header(
        unclamp_version="test",
        recipe=None if recipe is None else dict(recipe),
        metadata=dict(metadata or {}),
        **header,
    )
    with RunLogWriter(path, header=made) as writer:
        if sites:
            writer.add("sites", _sites(list(sites)))
        if at:
            writer.add(
                "steps", {"step": at, "loss": list(losses), "time_s": [float(s) for s in at]}
            )
        for site, clamped in enumerate(sites.values()):
            if at:
                writer.add("casts", _casts(site, at, clamped))
        if planted:
            writer.add("events", {"step": list(planted), "kind": ["planted"] * len(planted),
                                  "data": ["{}"] * len(planted)})  # fmt: skip
        writer.close(status)
    return path


def _sites(names: list[str]) -> dict[str, Any]:
    count = len(names)
    return {"site": range(count), "fqn": names, "role": ["input"] * count,
            "format": ["e4m3fn"] * count, "format_max": [448.0] * count,
            "scaling": ["delayed"] * count}  # fmt: skip


def _casts(site: int, steps: list[int], clamped: Casts) -> dict[str, Any]:
    count = len(steps)
    lost = [clamped.get(step, (0, 0.0)) for step in steps]
    zeros = [0] * count
    return {"step": steps, "site": [site] * count, "scale": [1.0] * count,
            "amax": [896.0 if n else 112.0 for n, _ in lost], "elements": [1000] * count,
            "saturated": [n for n, _ in lost], "saturated_error": [e for _, e in lost],
            "underflowed": [10 * (site + 1)] * count, "nonfinite": zeros, "recast": zeros,
            "microsteps": [1] * count}  # fmt: skip


def noisy(seed: int, *, steps: int = 100, shift: float = 0.0, jitter: float = 0.0) -> list[float]:
    """Return a falling loss whose noise is that of the seed's batches, and jitter of its own.

    The first loss is the seed's alone, whatever the shift: no update came before it.
    """
    batches = np.random.default_rng(seed).standard_normal(steps)
    own = np.random.default_rng([seed, round(1e6 * (shift + 1)), round(1e6 * jitter)])
    loss = 2 + 3 * np.exp(-np.arange(steps) / 20) + 0.05 * batches
    loss[1:] += shift + jitter * own.standard_normal(steps - 1) + jitter * own.standard_normal()
    return loss.tolist()
