"""Rules for switching, tried on the logs of a study; and what an autopilot did in one.

`python -m bench.backtest STUDY` prints the tables of docs/autopilot.md, of the folder of a study:
each rule on the runs of each arm in FP8, how far measured clamp errors stay below the bound that
rules go by, and, where the study has an arm `autopilot`, what came of it beside the others.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unclamp.analysis import run_spikes
from unclamp.analysis.steering import Backtest, backtest, parse_rule
from unclamp.runlog import RunLog, find_runs

RULES = ("", "floor=50", "floor=16", "tolerance=0.25", "tolerance=0.01", "casts=2, of=8",
         "ladder=delayed > dynamic")  # fmt: skip
OF_ARMS = ("dynamic", "delayed", "guarded", "smooth", "mixed")
CLOSED = "autopilot"


@dataclass(frozen=True, kw_only=True)
class Closed:
    """What one run of a study came to.

    Attributes:
        final: Mean loss of the last tenth of the steps, marked ones left out.
        first: Loss at the first marked step, NaN where there is none.
        later: Mean loss at later marked steps, likewise.
        spikes: Spikes of the loss that begin after the first marked step.
        reads: Reads a cast.
        harmful: Casts after the first marked step that lost more than a tenth by clamping.
    """

    final: float
    first: float
    later: float
    spikes: int
    reads: float
    harmful: int


def table(study: Path, rules: Iterable[str] = RULES, *, late: int = 0) -> None:
    """Print each rule on the runs of each scenario, all arms together and one by one."""
    print(f"\nlate={late}: scenario | rule | logs | up | back | false | idle | first | missed "
          "(measured) | avoided | reads a cast")  # fmt: skip
    for scenario in _scenarios(study):
        for text in rules:
            rule = parse_rule(text)
            found = [backtest(runs, rule, late=late) for runs in _by_arm(study / scenario)]
            _print_row(scenario, text or "as it comes", found)


def _print_row(scenario: str, rule: str, found: list[Backtest]) -> None:
    runs = [run for each in found for run in each.runs]

    def of(name: str) -> int:
        return sum(getattr(run, name) for run in runs)

    ups = of("ups")
    false = f"{of('false')} ({100 * of('false') / max(ups, 1):.1f} %)"
    reads = sum(r.reads_a_cast * r.casts for r in runs) / of("casts")
    print(f"{scenario} | {rule} | {len(runs)} | {ups} | {of('downs')} | {false} | {of('idle')} | "
          f"{of('first')} | {of('missed')} ({of('missed_measured')}) | {of('avoided')} | "
          f"{reads:.4f}")  # fmt: skip


def bound(study: Path) -> None:
    """Print how clamp errors that were measured lie to their bound from the overshoot."""
    shares = [share for run in find_runs(study) for share in _shares(run)]
    if shares:
        print(f"\n{len(shares):,} clamped casts: measured clamp error over its bound, median "
              f"{np.median(shares):.3f}, 99 % {np.quantile(shares, 0.99):.3f}, largest "
              f"{max(shares):.6f}")  # fmt: skip


def _shares(run: Path) -> Iterator[float]:
    with RunLog.open(run) as log:
        rows = log.sql(
            "SELECT saturated_error AS error, amax * scale / format_max AS overshoot FROM casts "
            "JOIN sites USING (rank, site) WHERE saturated > 0 AND microsteps = 1"
        )
    over = rows.column("overshoot").to_numpy().astype(np.float64)
    yield from rows.column("error").to_numpy() / np.square(1 - 1 / over)


def closed(study: Path) -> None:
    """Print what each arm of a study that has an autopilot came to, means over seeds."""
    for scenario in _scenarios(study):
        if not (study / scenario / CLOSED).is_dir():
            continue
        print(f"\n{scenario}: arm | runs | final loss | first planted | later planted | spikes "
              "after | casts that lost > 10 % after | reads a cast")  # fmt: skip
        for arm in sorted(path.name for path in (study / scenario).iterdir()):
            runs = [came_to(run) for run in find_runs(study / scenario / arm)]
            if runs:
                _print_arm(arm, runs)


def _print_arm(arm: str, runs: list[Closed]) -> None:
    final, first, later = (
        f"{np.mean(values):.4f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.4f}"
        for values in ([getattr(r, n) for r in runs] for n in ("final", "first", "later"))
    )
    reads, spikes, harmful = ([getattr(r, n) for r in runs] for n in ("reads", "spikes", "harmful"))
    print(f"{arm} | {len(runs)} | {final} | {first} | {later} | {spikes} | {harmful} | "
          f"{np.mean(reads):.4f} (most {max(reads):.4f})")  # fmt: skip


def came_to(run: Path) -> Closed:
    """Return what a run of a study came to."""
    with RunLog.open(run) as log:
        steps = log.steps()
        loss = np.array(steps["loss"].to_pylist(), np.float64)
        marked = log.header.metadata.get("planted_steps") or []
        after = marked[0] if marked else -1
        spikes = [s for s in run_spikes(log) if s.series == "loss" and s.onset > after]
        (cast,) = log.sql(
            "SELECT count(*) AS casts, count(*) FILTER (recast > 0) AS again, "
            "count(*) FILTER (saturated_error > 0.1 AND step > $after) AS harmful "
            "FROM casts JOIN sites USING (rank, site) WHERE NOT only_counted",
            after=after,
        ).to_pylist()
        own = _own_reads(log)
    plain = [i for i in range(len(loss) - len(loss) // 10, len(loss)) if i not in marked]
    return Closed(
        final=float(loss[plain].mean()),
        first=float(loss[marked[0]]) if marked else np.nan,
        later=float(loss[marked[1:]].mean()) if marked[1:] else np.nan,
        spikes=len(spikes),
        reads=1 + (cast["again"] + own) / cast["casts"] if cast["casts"] else 0.0,
        harmful=cast["harmful"],
    )


def _own_reads(log: RunLog) -> int:
    """Return the casts whose scale was the tensor's own, which is measured first."""
    (row,) = log.sql(
        "SELECT count(*) AS own FROM casts JOIN sites USING (rank, site) LEFT JOIN ("
        "  SELECT fqn, role, casts.step AS at, arg_max(after->>'scaling', w.step) AS kind "
        "  FROM casts JOIN sites USING (rank, site) JOIN switches w USING (fqn, role) "
        "  WHERE casts.step >= w.step GROUP BY ALL"
        ") changed USING (fqn, role) WHERE NOT only_counted "
        "AND (changed.at IS NULL OR changed.at = casts.step) "
        "AND coalesce(changed.kind, scaling) = 'dynamic'"
    ).to_pylist()
    return row["own"]


def _scenarios(study: Path) -> list[str]:
    return sorted({run.relative_to(study).parts[0] for run in find_runs(study)})


def _by_arm(folder: Path) -> list[list[Path]]:
    return [runs for arm in OF_ARMS if (runs := find_runs(folder / arm))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.backtest", description=__doc__)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--rule", action="append", help="a rule; may be repeated")
    asked = parser.parse_args()
    table(asked.study, asked.rule or RULES)
    table(asked.study, asked.rule or RULES[:1], late=1)
    bound(asked.study)
    closed(asked.study)
