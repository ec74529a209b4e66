"""What-if against the truth: policy B from the log of A, and the run that trained with B.

    python -m bench.whatif runs/study [--speed]

For each scenario and seed of a finished study, clamped casts (of guarded scaling: repeated ones)
that a log predicts for another arm's policy stand beside those of that arm's own run, with the
first step at which the two trainings' amaxes part: until then scales are compared bit for bit.
`--speed` writes two logs of 1,680 sites and extrapolates 40 policies to 100,000 steps.
"""

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from unclamp.analysis.whatif import evaluate, grid, trace
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.scaling import Delayed, Dynamic, Guarded, Scaling

ARMS: dict[str, Scaling] = {"dynamic": Dynamic(), "delayed": Delayed(), "guarded": Guarded()}
SITES, SPEED_STEPS, WANTED_STEPS, POLICIES = 1680, (2_000, 6_000), 100_000, 40


def compare(study: Path) -> None:
    """Print the table of a study."""
    print("scenario  log of   policy   seed  predicted  true   error   scales equal until step")
    errors: dict[str, list[float]] = {}
    for scenario in sorted(path.name for path in study.iterdir() if path.is_dir()):
        seeds = sorted((study / scenario / "dynamic").glob("seed-*"))
        for seed in (path.name for path in seeds):
            for source in ARMS:
                for target in ("delayed", "guarded"):
                    line, error = _compared(study / scenario, source, target, seed)
                    print(f"{scenario:8}  {source:7}  {target:7}  {seed.split('-')[1]:>4}  {line}")
                    kind = "its own log" if source == target else f"of {source}"
                    errors.setdefault(f"{scenario}, {target} {kind}", []).append(error)
    print()
    for what, found in errors.items():
        print(f"{what}: mean error {np.mean(found):+.1%}, largest {max(map(abs, found)):.1%}")


def _compared(folder: Path, source: str, target: str, seed: str) -> tuple[str, float]:
    policy = ARMS[target]
    with (
        RunLog.open(folder / source / seed) as log,
        RunLog.open(folder / target / seed) as other,
    ):
        (outcome,) = evaluate(log, [policy]).outcomes
        own = evaluate(other, [policy]).recorded
        predicted = outcome.recast if policy.guards else outcome.clamped
        true = own.recast if policy.guards else own.clamped
        until = _equal_until(log, other, policy)
    error = (predicted - true) / max(true, 1)
    return f"{predicted:9,}  {true:5,}  {error:+6.1%}  {until}", error


def _equal_until(log: RunLog, other: RunLog, policy: Scaling) -> str:
    """Return the first step at which the trainings' amaxes part, and whether scales are equal."""
    parts, wrong = [], 0
    for site in log.computed_sites():
        name = f"{site.fqn} {site.role}"
        mine = trace(log, policy, site=name).to_pydict()
        theirs = other.casts(site.name).to_pydict()
        same = [a == b for a, b in zip(mine["amax"], theirs["amax"], strict=False)]
        parted = same.index(False) if False in same else len(same)
        parts.append(parted)
        for i in range(parted):
            scale, again = mine["scale"][i], theirs["recast"][i]
            logged = np.float32(1 / np.float64(np.float32(1) / np.float32(scale or np.nan)))
            wrong += bool(scale) and not again and logged != np.float32(theirs["scale"][i])
    return f"{min(parts)}{'' if not wrong else f' ({wrong} DIFFER)'}"


def speed() -> None:
    """Print seconds of 40 policies at two sizes, and what they come to at 100,000 steps."""
    policies = grid()[:: len(grid()) // POLICIES][:POLICIES]
    folder = Path(tempfile.mkdtemp())
    seconds = []
    try:
        for steps in SPEED_STEPS:
            path = folder / str(steps)
            _write(path, steps)
            began = time.perf_counter()
            with RunLog.open(path) as log:
                evaluate(log, policies)
            seconds.append(time.perf_counter() - began)
            print(f"{steps:,} steps of {SITES:,} sites, {POLICIES} policies: {seconds[-1]:.1f} s")
    finally:
        shutil.rmtree(folder)
    a_step = (seconds[1] - seconds[0]) / (SPEED_STEPS[1] - SPEED_STEPS[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    total = seconds[1] + a_step * (WANTED_STEPS - SPEED_STEPS[1])
    print(f"extrapolated to {WANTED_STEPS:,} steps: {total:.0f} s; peak memory {peak:.2f} GiB")


def _write(path: Path, steps: int) -> None:
    generator = np.random.default_rng(0)
    with RunLogWriter(path, header=Header(unclamp_version="0")) as writer:
        writer.add(
            "sites",
            {
                "site": list(range(SITES)),
                "fqn": [f"layers.{i // 3}" for i in range(SITES)],
                "role": [("input", "weight", "grad_output")[i % 3] for i in range(SITES)],
                "format": ["e4m3fn"] * SITES,
                "scaling": ["dynamic"] * SITES,
                "format_max": [448.0] * SITES,
            },
        )
        zeros = np.zeros(SITES, np.int64)
        for step in range(steps):
            writer.add(
                "casts",
                {
                    "step": np.full(SITES, step),
                    "site": np.arange(SITES, dtype=np.int32),
                    "amax": np.exp(0.2 * generator.standard_normal(SITES)).astype(np.float32),
                    "scale": np.ones(SITES, np.float32),
                    "elements": np.full(SITES, 1 << 24),
                    **dict.fromkeys(("saturated", "underflowed", "nonfinite", "recast"), zeros),
                    "saturated_error": zeros.astype(float),
                    "microsteps": np.ones(SITES, np.int32),
                },
            )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.whatif", description=__doc__)
    parser.add_argument("study", type=Path, nargs="?")
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    if given.study is not None:
        compare(given.study)
    if given.speed:
        speed()


if __name__ == "__main__":
    main()
