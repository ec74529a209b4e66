"""Runs of two kinds of batches, one of which has a higher loss, clamps, and spikes of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unclamp.analysis.evidence import Clamping
from unclamp.analysis.groups import Group
from unclamp.analysis.spikes import find_spikes
from unclamp.runlog import Header, RunLogWriter

SITES = 40
CULPRIT = 7


@dataclass(frozen=True, kw_only=True)
class KindRun:
    """Losses, kinds and clamping of a run; `spikes` are found within kinds."""

    loss: np.ndarray
    groups: list[Group]
    clamping: Clamping
    names: list[tuple[int, str, str]]

    def spikes(self, *, grouped: bool = True) -> list[tuple[int, int]]:
        found = find_spikes(self.loss, groups=self.groups if grouped else ())
        return [(spike.onset, spike.end) for spike in found]


def kind_run(
    seed: int, *, steps: int = 4000, share: float = 0.1, harm: float = 1.0, regular: bool = False
) -> KindRun:
    """Return a run whose "answers" have 1.75 times the loss, noisier and skewed, with spikes.

    Sites clamp at random in answers alone, each in a third of them, whatever the loss. With
    `harm` the loss of an answers batch is so many times as high where site `CULPRIT` clamps.
    """
    rng = np.random.default_rng([seed, 307])
    every = round(1 / share)
    is_answer = np.arange(steps) % every == 0 if regular else rng.random(steps) < share
    noise = 0.02 * rng.standard_normal(steps) + is_answer * 0.03 * rng.exponential(1, steps)
    loss = np.where(is_answer, 3.5, 2.0) * np.exp(noise)
    answers = np.flatnonzero(is_answer)
    spiky = rng.choice(answers[40:], size=8, replace=False)
    loss[spiky] *= 1.8
    places = [np.sort(rng.choice(answers, size=len(answers) // 3, replace=False))
              for _ in range(SITES)]  # fmt: skip
    loss[places[CULPRIT]] *= harm
    clamping = Clamping(
        starts=np.concatenate([[0], np.cumsum([len(p) for p in places])]),
        steps=np.concatenate(places),
        errors=np.concatenate([rng.uniform(0.01, 0.9, len(p)) for p in places]),
        first_lags=np.array([i % 2 for i in range(SITES)], dtype=np.int64),
        length=steps,
    )
    # The culprit's harm is prompt: it acts on the loss of its own step.
    clamping.first_lags[CULPRIT] = 0
    return KindRun(
        loss=loss,
        groups=["answers" if answer else None for answer in is_answer],
        clamping=clamping,
        names=[(i, f"layers.{i}", "grad_output" if i % 2 else "input") for i in range(SITES)],
    )


def write_losses(
    path: Path,
    losses: Sequence[float],
    groups: Sequence[str | None],
    *,
    steps: Sequence[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    **metadata: object,
) -> Path:
    """Write a run of losses and kinds alone."""
    header = Header(
        unclamp_version="0.1.0", world_size=world_size, run_id="one", plain=True, metadata=metadata
    )
    with RunLogWriter(path, header=header, rank=rank) as writer:
        count = len(losses)
        writer.add(
            "steps",
            {
                "step": list(range(count) if steps is None else steps),
                "loss": [float(loss) for loss in losses],
                "time_s": [0.0] * count,
                "group": list(groups),
            },
        )
    return path
