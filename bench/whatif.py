"""What-if against the truth: policy B from the log of A, and the run that trained with B.

    python -m bench.whatif runs/study [--twins runs/twins]
    python -m bench.whatif --speed

For each scenario and seed of a finished study, clamped casts (of guarded scaling: repeated ones)
that a log predicts for another arm's policy stand beside those of that arm's own run, with the
first step at which the two trainings' amaxes part: until then scales are compared bit for bit.
With `--twins` (see `bench.twins`) also those of the same arm trained again from weights that differ
in next to nothing: how far two trainings with the same policy are apart.
`--speed` writes two logs of 1,680 sites and extrapolates 40 policies to 100,000 steps.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from unclamp.analysis.whatif import evaluate, grid, trace
from unclamp.analysis.whatif.recorded import recorded
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.scaling import Delayed, Dynamic, Guarded, Scaling

ARMS: dict[str, Scaling] = {"dynamic": Dynamic(), "delayed": Delayed(), "guarded": Guarded()}
TARGETS = ("delayed", "guarded")
SITES, SPEED_STEPS, WANTED_STEPS, POLICIES = 1680, (2_000, 6_000), 100_000, 40


def compare(study: Path, twins: Path | None) -> None:
    """Print the table of a study."""
    print("scenario  log of   policy   seed  predicted  true   error   scales equal until  twins")
    errors: dict[str, list[float]] = {}
    for scenario in sorted(path.name for path in study.iterdir() if path.is_dir()):
        seeds = sorted((study / scenario / "dynamic").glob("seed-*"))
        for seed in (path.name for path in seeds):
            own = {target: _counted(study / scenario / target / seed, target) for target in TARGETS}
            again = {
                target: [_counted(path, target) for path in _twins(twins, scenario, target, seed)]
                for target in TARGETS
            }
            for target in TARGETS:
                apart = [twin / max(own[target], 1) - 1 for twin in again[target]]
                errors.setdefault(f"{scenario}, {target}: twins", []).extend(apart)
            for source in ARMS:
                for target in TARGETS:
                    folder = study / scenario
                    predicted, until = _predicted(folder, source, target, seed)
                    true = own[target]
                    error = (predicted - true) / max(true, 1)
                    near = " ".join(f"{twin:,}" for twin in again[target])
                    print(
                        f"{scenario:8}  {source:7}  {target:7}  {seed.split('-')[1]:>4}  "
                        f"{predicted:9,}  {true:5,}  {error:+6.1%}  {until:18}  {near}",
                        flush=True,
                    )
                    kind = "its own log" if source == target else f"log of {source}"
                    errors.setdefault(f"{scenario}, {target}: {kind}", []).append(error)
    print()
    for what, found in sorted(errors.items()):
        if found:
            print(
                f"{what}: mean {np.mean(found):+.1%}, root mean square "
                f"{np.sqrt(np.mean(np.square(found))):.1%}, largest {max(map(abs, found)):.1%}"
            )


def _twins(twins: Path | None, scenario: str, arm: str, seed: str) -> list[Path]:
    if twins is None:
        return []
    return sorted((twins / scenario / arm / seed).glob("*"))


def _counted(path: Path, target: str) -> int:
    """Return the casts that a run clamped, or under guarded scaling repeated."""
    with RunLog.open(path) as log:
        own = recorded(log, log.computed_sites())
    return own.recast if ARMS[target].guards else own.clamped


def _predicted(folder: Path, source: str, target: str, seed: str) -> tuple[int, str]:
    policy = ARMS[target]
    with (
        RunLog.open(folder / source / seed) as log,
        RunLog.open(folder / target / seed) as other,
    ):
        (outcome,) = evaluate(log, [policy]).outcomes
        until = _equal_until(log, other, policy)
    return outcome.recast if policy.guards else outcome.clamped, until


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
    folder = Path(tempfile.mkdtemp())
    found = []
    try:
        for steps in SPEED_STEPS:
            _write(folder / str(steps), steps)
            # In a process of its own: what the writer used is no part of it.
            command = [sys.executable, "-m", "bench.whatif", str(folder / str(steps)), "--one"]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(Cost(**json.loads(text)))
            print(f"{steps:,} steps of {SITES:,} sites, {POLICIES} policies: {found[-1]}")
    finally:
        shutil.rmtree(folder)
    small, large = found
    more = (WANTED_STEPS - SPEED_STEPS[1]) / (SPEED_STEPS[1] - SPEED_STEPS[0])
    total = large.seconds + (large.seconds - small.seconds) * more
    busy = large.core_seconds + (large.core_seconds - small.core_seconds) * more
    print(
        f"extrapolated to {WANTED_STEPS:,} steps: {total:.0f} s; {busy:.0f} s of one core, so "
        f"{busy / 2:.0f} s of two that do nothing else"
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What evaluating took."""

    seconds: float
    core_seconds: float
    peak_gib: float

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s, {self.core_seconds:.1f} s of one core, "
            f"peak {self.peak_gib:.2f} GiB"
        )


def _peak_gib() -> float:
    """Return the largest memory of this process; `getrusage` would count its parent's with it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def evaluate_one(path: Path) -> None:
    """Print as JSON what evaluating 40 policies on a log takes."""
    policies = grid()[:: len(grid()) // POLICIES][:POLICIES]
    began, busy = time.perf_counter(), time.process_time()
    with RunLog.open(path) as log:
        evaluate(log, policies)
    cost = Cost(
        seconds=time.perf_counter() - began,
        core_seconds=time.process_time() - busy,
        peak_gib=_peak_gib(),
    )
    print(json.dumps(asdict(cost)))


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
    parser.add_argument("--twins", type=Path, help="what bench.twins trained of it")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--one", action="store_true", help="evaluate a log, print what it takes")
    given = parser.parse_args()
    if given.one:
        evaluate_one(given.study)
    elif given.study is not None:
        compare(given.study, given.twins)
    if given.speed:
        speed()


if __name__ == "__main__":
    main()
