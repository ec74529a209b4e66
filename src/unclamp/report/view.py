"""What a report says, as plain data: read from run logs, rendered by others. Torch-free."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unclamp.errors import RunLogError, UnclampError
from unclamp.files import strict
from unclamp.names import SiteName
from unclamp.report.arms import ScenarioView, counted_together, scenario_view
from unclamp.report.recorded import RunRecord, read_run
from unclamp.report.runs import RunView, read_run_view
from unclamp.report.status import ABSENT, damage_notes, run_notes, study_notes
from unclamp.report.verdict import study_verdict
from unclamp.runlog import Header, RunLog, is_run
from unclamp.study.config import StudyConfig, is_study, read_study
from unclamp.study.scenarios import described
from unclamp.written import counted


@dataclass(frozen=True, kw_only=True)
class View:
    """A whole report.

    Attributes:
        verdict: What the figures answer, in sentences; of a run, its first sentence.
        notes: What a reader must know before the figures: what is missing, and of what.
        scenarios: Arms side by side, of a study those with planted steps first; of a run, itself
            as the only arm.
        run: The run's own page; None of a study.
        runs: Folders of a study's runs, relative to it, by scenario and arm.
    """

    title: str
    path: str
    status: str
    facts: dict[str, str]
    notes: list[str]
    scenarios: list[ScenarioView]
    run: RunView | None
    runs: dict[str, dict[str, list[str]]]
    verdict: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report's figures as JSON data; NaN and Inf are None.

        What is only drawn, heat maps and panels, is left out.
        """
        data = asdict(self)
        for scenario in data["scenarios"]:
            del scenario["heat"]
        if data["run"] is not None:
            for drawn in ("heat", "panels", "window_steps", "window_size", "kind_curves"):
                del data["run"][drawn]
            for row in data["run"]["ranks"]["rows"]:
                del row["cells"]
        return strict(data)


def build_view(path: Path, *, sites: Sequence[str] = ()) -> View:
    """Return the report of a run or a study.

    Args:
        path: Its folder.
        sites: Globs of sites whose panels a run's page holds in any case.

    Raises:
        RunLogError: The folder is neither, or another version wrote it.
        StudyError: A study that cannot be read.
        UnclampError: A glob matches no site, or the folder is a study, whose page has no panels.
    """
    if not is_study(path):
        return _run_view(path, sites)
    if sites:
        raise UnclampError(
            f"{path} is a study, whose page has no panels of sites: give --site with one of its "
            f"runs, such as {next(iter(_run_paths(path).values()), path)}"
        )
    return _study_view(path)


def _run_view(path: Path, sites: Sequence[str]) -> View:
    with RunLog.open(path) as log:
        header = log.header
        record, windows = read_run(log)
        run = read_run_view(log, record, windows, globs=sites)
        notes = run_notes(log)
    name = str(header.metadata.get("scenario", "run"))
    arm = str(header.metadata.get("arm", run.name))
    given = header.metadata.get("seed")  # free: a user's own
    seed = given if isinstance(given, int) else 0
    model = header.metadata.get("model")  # free too
    architecture = model.get("architecture") if isinstance(model, dict) else None
    description = described(name, architecture=architecture)
    return View(
        title=f"Run {run.name}",
        path=str(path),
        status=header.status,
        facts=_run_facts(header, record),
        notes=notes,
        scenarios=[scenario_view(name, description, {arm: {seed: record}}, {})],
        run=run,
        runs={},
        verdict=run.sentences[:1],
    )


def _run_facts(header: Header, record: RunRecord) -> dict[str, str]:
    facts = {"status": header.status, "written by": f"unclamp {header.unclamp_version}"}
    facts |= {"created": header.created, "steps": f"{len(record.steps):,}"}
    facts["sites"] = f"{len(record.sites):,}"
    if record.counted_sites:
        facts["only counted"] = counted(len(record.counted_sites), "more site")
    if header.world_size > 1:
        facts["ranks"] = str(header.world_size)
    if record.tokens_per_s is not None:
        facts["tokens/s"] = f"{record.tokens_per_s:,.0f}"
    if header.git_commit:
        facts["commit"] = header.git_commit[:12]
    shown = {k: v for k, v in header.metadata.items() if isinstance(v, str | int | float)}
    return facts | {key: str(value) for key, value in (header.environment | shown).items()}


def _study_view(path: Path) -> View:
    study = read_study(path)
    config = StudyConfig.from_dict(study["config"])
    paths = _run_paths(path)
    scenarios = []
    states: dict[str, str] = {}
    runs: dict[str, dict[str, list[str]]] = {}
    for name in config.scenarios:
        records: dict[str, dict[int, RunRecord]] = defaultdict(dict)
        for (scenario, arm, seed), run in paths.items():
            if scenario != name:
                continue
            found, states[f"{scenario}/{arm}/seed-{seed}"] = _read(run)
            if found is not None:
                records[arm][seed] = found
                runs.setdefault(name, {}).setdefault(arm, []).append(str(run.relative_to(path)))
        switched = study.get("switched", {}).get(name, {})
        named = {
            arm: [str(SiteName.from_dict(site)) for site in sites]
            for arm, sites in switched.items()
        }
        if records:
            description = described(name, architecture=config.model.architecture)
            scenarios.append(scenario_view(name, description, records, named))
    scenarios = counted_together(sorted(scenarios, key=lambda scenario: not scenario.planted))
    model, data = config.model, config.data
    facts = {
        "written by": f"unclamp {study['unclamp_version']}",
        "model": model.title,
        "text": ", ".join(data.text) or "the language reference that ships with Python",
        "batch": f"{data.batch_size} x {data.seq_len} tokens",
        "steps": str(config.steps),
        "seeds": f"{len(config.seeds)} ({', '.join(map(str, config.seeds))})",
    }
    return View(
        title="Which scaling clamped what, and did the loss care?",
        path=str(path),
        status=study["status"],
        facts=facts,
        notes=study_notes(study["status"], states) + damage_notes(_named(paths)),
        scenarios=scenarios,
        run=None,
        runs=runs,
        verdict=study_verdict(scenarios, is_whole=all(s == "finished" for s in states.values())),
    )


def _run_paths(path: Path) -> dict[tuple[str, str, int], Path]:
    """Return the folders of all runs that a study has when it is whole."""
    config = StudyConfig.from_dict(read_study(path)["config"])
    return {
        (scenario, arm, seed): path / scenario / arm / f"seed-{seed}"
        for scenario in config.scenarios
        for arm in config.arms
        for seed in config.seeds
    }


def _named(paths: dict[tuple[str, str, int], Path]) -> dict[str, Path]:
    return {f"{s}/{arm}/seed-{seed}": run for (s, arm, seed), run in paths.items() if is_run(run)}


def _read(run: Path) -> tuple[RunRecord | None, str]:
    """Return a run's record, None if it recorded no step or cannot be read; and its state."""
    if not is_run(run):
        return None, ABSENT
    try:
        with RunLog.open(run) as log:
            record, _ = read_run(log)
    except RunLogError as error:
        return None, str(error)
    return (record if record.steps else None), record.status
