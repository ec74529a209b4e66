"""What a report says, as plain data: read from run logs, rendered by others. Torch-free."""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.report.figures import RunFigures, read_run
from unclamp.runlog import RunLog, is_run
from unclamp.study.config import SCENARIOS, StudyConfig, is_study, read_study

FINAL_SHARE = 0.1
"""The final loss is the mean over this last share of the steps that are not planted."""
BASELINE = "dynamic"
"""The arm that losses at planted steps are compared with."""
WORST_SITES = 12


@dataclass(frozen=True, kw_only=True)
class ArmView:
    """One arm over its seeds; counts are means a run, rates are fractions.

    Attributes:
        final_loss: Mean over seeds of the mean loss over the last tenth of the steps, planted
            ones left out.
        final_loss_spread: Standard deviation of that over seeds; None with one seed.
        final_gap: Final loss minus that of the dynamic arm on the same seed: mean, and standard
            deviation over seeds, NaN with one; None for that arm itself.
        planted_ratio: Loss over that of the dynamic arm at the same planted step and seed,
            mean, smallest and largest; None without planted steps or without that arm.
        casts: Casts made.
        clamped_casts: Casts in which anything saturated.
        recasts: Casts repeated with the true scale, by guarded scaling.
        overshoot: Largest amax over the largest representable value.
    """

    name: str
    seeds: int
    unfinished: int
    final_loss: float | None
    final_loss_spread: float | None
    final_gap: tuple[float, float] | None
    planted_ratio: tuple[float, float, float] | None
    planted_spikes: int
    other_spikes: int
    saturated: float
    casts: float
    clamped_casts: float
    recasts: float
    underflow_share: float
    overshoot: float
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class ScenarioView:
    """One scenario: its arms side by side, and what the plots show."""

    name: str
    description: str
    findings: list[str]
    planted: list[int]
    arms: list[ArmView]
    curves: dict[str, dict[str, list[float]]]
    spikes: dict[str, list[int]]
    heat: dict[str, dict[str, Any]]
    worst: dict[str, list[dict[str, Any]]]
    switched: dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class View:
    """A whole report."""

    title: str
    path: str
    status: str
    facts: dict[str, str]
    scenarios: list[ScenarioView]

    def to_dict(self) -> dict[str, Any]:
        """Return the report's figures as JSON data, without the heat maps; NaN and Inf are None."""
        data = asdict(self)
        for scenario in data["scenarios"]:
            del scenario["heat"]
        return _finite(data)


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold by None."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build_view(path: Path) -> View:
    """Return the report of a run or a study.

    Raises:
        RunLogError: The folder is neither, or another version wrote it.
        StudyError: A study that cannot be read.
    """
    if is_study(path):
        return _study_view(path)
    with RunLog.open(path) as log:
        header = log.header
    name = str(header.metadata.get("scenario", "run"))
    arm = str(header.metadata.get("arm", path.resolve().name))
    figures = {arm: {int(header.metadata.get("seed", 0)): read_run(path)}}
    facts = {"written by": f"unclamp {header.unclamp_version}", "created": header.created}
    facts |= {key: str(value) for key, value in header.environment.items()}
    return View(
        title=f"Run {path.resolve().name}",
        path=str(path),
        status=header.status,
        facts=facts,
        scenarios=[_scenario_view(name, figures, {})],
    )


def _study_view(path: Path) -> View:
    study = read_study(path)
    config = StudyConfig.from_dict(study["config"])
    scenarios = []
    for name in config.scenarios:
        figures: dict[str, dict[int, RunFigures]] = defaultdict(dict)
        for arm in config.arms:
            for seed in config.seeds:
                run = path / name / arm / f"seed-{seed}"
                if is_run(run):
                    figures[arm][seed] = read_run(run)
        switched = study.get("switched", {}).get(name, {})
        named = {arm: [f"{s['fqn']} {s['role']}" for s in sites] for arm, sites in switched.items()}
        scenarios.append(_scenario_view(name, figures, named))
    model, data = config.model, config.data
    small = f"Llama, {model.layers} layers of {model.hidden_size}, bytes as tokens"
    facts = {
        "written by": f"unclamp {study['unclamp_version']}",
        "model": model.hf_model or small,
        "text": ", ".join(data.text) or "the language reference that ships with Python",
        "batch": f"{data.batch_size} x {data.seq_len} tokens",
        "steps": str(config.steps),
        "seeds": ", ".join(map(str, config.seeds)),
    }
    return View(
        title="Which scaling clamped what, and did the loss care?",
        path=str(path),
        status=study["status"],
        facts=facts,
        scenarios=scenarios,
    )


def _scenario_view(
    name: str, figures: dict[str, dict[int, RunFigures]], switched: dict[str, list[str]]
) -> ScenarioView:
    figures = {arm: runs for arm, runs in figures.items() if runs}
    baseline = figures.get(BASELINE, {})
    arms = [_arm_view(arm, runs, baseline) for arm, runs in figures.items()]
    planted = sorted({s for runs in figures.values() for run in runs.values() for s in run.planted})
    return ScenarioView(
        name=name,
        description=SCENARIOS.get(name, ""),
        findings=_findings(arms, len(planted), switched),
        planted=planted,
        arms=arms,
        curves={arm: _curve(list(runs.values())) for arm, runs in figures.items()},
        spikes={
            arm: sorted({step for run in runs.values() for step in run.spikes})
            for arm, runs in figures.items()
        },
        heat={arm: _heat(list(runs.values())) for arm, runs in figures.items()},
        worst={arm: _worst(list(runs.values())) for arm, runs in figures.items()},
        switched=switched,
    )


def _arm_view(name: str, runs: dict[int, RunFigures], baseline: dict[int, RunFigures]) -> ArmView:
    finals = [f for f in map(_final_loss, runs.values()) if f is not None]
    sites = [site for run in runs.values() for site in run.sites]
    speeds = [run.tokens_per_s for run in runs.values() if run.tokens_per_s is not None]
    elements = sum(site["elements"] for site in sites)
    at_planted = [step for run in runs.values() for step in run.spikes if step in run.planted]
    spikes = sum(len(run.spikes) for run in runs.values())
    return ArmView(
        name=name,
        seeds=len(runs),
        unfinished=sum(run.status != "finished" for run in runs.values()),
        final_loss=float(np.mean(finals)) if finals else None,
        final_loss_spread=float(np.std(finals, ddof=1)) if len(finals) > 1 else None,
        final_gap=None if name == BASELINE else _final_gap(runs, baseline),
        planted_ratio=_planted_ratio(runs, baseline),
        planted_spikes=len(at_planted),
        other_spikes=spikes - len(at_planted),
        saturated=sum(site["saturated"] for site in sites) / len(runs),
        casts=sum(site["casts"] for site in sites) / len(runs),
        clamped_casts=sum(site["clamped_casts"] for site in sites) / len(runs),
        recasts=sum(site["recasts"] for site in sites) / len(runs),
        underflow_share=sum(site["underflowed"] for site in sites) / max(elements, 1),
        overshoot=max((site["overshoot"] for site in sites), default=0.0),
        tokens_per_s=float(np.mean(speeds)) if speeds else None,
    )


def _final_loss(run: RunFigures) -> float | None:
    """Return the mean over the last steps, planted ones left out: they are compared apart."""
    ordinary = [x for s, x in zip(run.steps, run.loss, strict=True) if s not in run.planted]
    last = max(1, round(FINAL_SHARE * len(run.loss)))
    return float(np.mean(ordinary[-last:])) if ordinary else None


def _final_gap(
    runs: dict[int, RunFigures], baseline: dict[int, RunFigures]
) -> tuple[float, float] | None:
    pairs = [
        (_final_loss(run), _final_loss(baseline[s])) for s, run in runs.items() if s in baseline
    ]
    gaps = [own - other for own, other in pairs if own is not None and other is not None]
    if not gaps:
        return None
    return float(np.mean(gaps)), float(np.std(gaps, ddof=1)) if len(gaps) > 1 else math.nan


def _planted_ratio(
    runs: dict[int, RunFigures], baseline: dict[int, RunFigures]
) -> tuple[float, float, float] | None:
    ratios = []
    for seed, run in runs.items():
        if seed not in baseline:
            continue
        other = dict(zip(baseline[seed].steps, baseline[seed].loss, strict=True))
        own = dict(zip(run.steps, run.loss, strict=True))
        ratios += [own[s] / other[s] for s in run.planted if s in own and s in other]
    return (float(np.mean(ratios)), min(ratios), max(ratios)) if ratios else None


def _curve(runs: list[RunFigures]) -> dict[str, list[float]]:
    """Return loss over steps: mean, smallest and largest over the seeds that got there."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step, loss in zip(run.steps, run.loss, strict=True):
            by_step[step].append(loss)
    steps = sorted(by_step)
    return {
        "step": [float(step) for step in steps],
        "mean": [float(np.mean(by_step[step])) for step in steps],
        "low": [min(by_step[step]) for step in steps],
        "high": [max(by_step[step]) for step in steps],
    }


def _heat(runs: list[RunFigures]) -> dict[str, Any]:
    """Return the saturated share, sites by steps, mean over the seeds of equal shape."""
    run = max(runs, key=lambda r: len(r.steps))
    same = [r.shares for r in runs if r.shares.shape == run.shares.shape]
    return {
        "sites": [f"{site['fqn']} {site['role']}" for site in run.sites],
        "steps": run.steps,
        "share": np.mean(same, axis=0),
    }


def _worst(runs: list[RunFigures]) -> list[dict[str, Any]]:
    """Return the sites with the largest clamp error over all seeds, worst first."""
    total: dict[tuple[str, str], dict[str, Any]] = {}
    for site in (site for run in runs for site in run.sites):
        key = (site["fqn"], site["role"])
        total[key] = _merged(total[key], site) if key in total else site
    clamped = [site for site in total.values() if site["saturated"]]
    ranked = sorted(clamped, key=lambda s: (-s["clamp_error"], s["fqn"], s["role"]))
    return [_site_row(site) for site in ranked[:WORST_SITES]]


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    added = (
        "elements",
        "saturated",
        "underflowed",
        "nonfinite",
        "clamped_casts",
        "clamp_error",
        "recasts",
        "casts",
    )
    worst = one["worst_step"] if one["worst_step"] is not None else other["worst_step"]
    return {
        **one,
        **{name: one[name] + other[name] for name in added},
        "overshoot": max(one["overshoot"], other["overshoot"]),
        "worst_step": worst,
    }


def _site_row(site: dict[str, Any]) -> dict[str, Any]:
    casts = max(site["clamped_casts"], 1)
    return {
        "fqn": site["fqn"],
        "role": site["role"],
        "format": site["format"],
        "scaling": site["scaling"],
        "saturated": site["saturated"],
        "clamped_casts": site["clamped_casts"],
        "overshoot": site["overshoot"],
        "clamp_error": site["clamp_error"] / casts,
        "underflow_share": site["underflowed"] / max(site["elements"], 1),
        "worst_step": site["worst_step"],
    }


def _findings(arms: list[ArmView], planted: int, switched: dict[str, list[str]]) -> list[str]:
    """Say in words what the figures show, and no more."""
    said = []
    for arm in arms:
        if arm.planted_ratio is not None and arm.name != BASELINE:
            mean, low, high = arm.planted_ratio
            said.append(
                f"{arm.name}: at the {planted} planted steps the loss is {mean:.2f}x that of "
                f"{BASELINE} ({low:.2f}x to {high:.2f}x over steps and seeds)."
            )
        elif arm.saturated and arm.final_gap is not None:
            said.append(_harm(arm, *arm.final_gap))
    said += [
        f"{arm.name}: {100 * arm.recasts / arm.casts:.2g} % of the casts were repeated with the "
        "true scale."
        for arm in arms
        if arm.recasts
    ]
    said += [
        f"{arm} is dynamic at: {', '.join(sites)}." for arm, sites in switched.items() if sites
    ]
    return said


def _harm(arm: ArmView, gap: float, spread: float) -> str:
    clamped = (
        f"{arm.name} clamped {arm.saturated:,.0f} elements in {arm.clamped_casts:,.0f} casts a "
        f"run; against {BASELINE} on the same seed its final loss is {gap:+.4f}"
    )
    if math.isnan(spread):
        return f"{clamped} (one seed: no spread to judge it by)."
    verdict = "within that spread" if abs(gap) <= spread else "beyond that spread"
    return f"{clamped} ± {spread:.4f} over seeds: {verdict}."
