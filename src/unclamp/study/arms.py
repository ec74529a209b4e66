"""Run a whole study: every arm, seed and scenario, by workers; stop and resume.

Each run trains in a process with one thread, here or on a Ray cluster, so that its losses do not
depend on how many run side by side. Runs that another arm starts from come first. A finished run
is never repeated.
"""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from unclamp.analysis.steering import backtest
from unclamp.errors import RunLogError, StudyError
from unclamp.names import Role, SiteName
from unclamp.recipe import Recipe
from unclamp.runlog import RunLog, find_runs, is_run, read_header
from unclamp.study.config import StudyConfig, is_study, read_study, write_study
from unclamp.study.data import read_text, text_digest
from unclamp.study.loop import RunPlan
from unclamp.study.models import check_study
from unclamp.study.pool import CtrlC, Executor, Listener, train_all
from unclamp.study.processes import Processes
from unclamp.study.ray_tasks import RayTasks

Site = tuple[str, Role]


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    listener: Listener | None = None,
) -> None:
    """Train every run of a study into `out`, or what is missing of it.

    Args:
        config: The study.
        out: Its folder: new, empty, or the same study's.
        jobs: Runs side by side; one a core without it, of a cluster one a CPU.
        ray: The address of a Ray cluster to train them on, "auto" for that of this machine;
            without it they train in processes here.
        listener: Whom to tell how it goes.

    Raises:
        StudyError: The folder holds something else, the text cannot be used, a model cannot be
            made, a scenario plants nothing, an arm with a recipe has no layer in FP8, there is no
            such cluster, or workers die again and again.
        UnclampError: Ray is not installed.
        Interrupted: Ctrl-C; every recorded step is readable.
    """
    executor: Executor = Processes(jobs) if ray is None else RayTasks(ray, jobs=jobs)
    with CtrlC() as ctrl_c, closing(executor):
        _run(config, out, executor, listener or Listener(), ctrl_c)


def _run(
    config: StudyConfig, out: Path, executor: Executor, listener: Listener, ctrl_c: CtrlC
) -> None:
    text = read_text(config.data.text, seq_len=config.data.seq_len)
    config.check_marks()
    bases = {arm.from_arm for arm in config.arms.values() if arm.from_arm is not None}
    first = [name for name, arm in config.arms.items() if arm.from_arm is None]
    # High precision before all, since it needs no kernel while kernels are compiled.
    first.sort(key=lambda name: (config.arms[name].recipe is not None, name not in bases))
    derived = [name for name, arm in config.arms.items() if arm.from_arm is not None]
    plans = _plans(config, out, first, {})
    if not all(_is_finished(plan) for plan in plans):
        check_study(config)
    facts: dict[str, Any] = {"text": text_digest(text), "switched": {}}
    _claim(out, config, facts)
    _train_missing(plans, executor=executor, listener=listener, ctrl_c=ctrl_c)
    if derived:
        switched = {
            (scenario, name): worst_sites(_runs_of(config, out, scenario, name), config, name)
            for scenario in config.scenarios
            for name in derived
            if config.arms[name].autopilot is None
        }
        for (scenario, name), sites in switched.items():
            listed = [{"fqn": fqn, "role": role} for fqn, role in sites]
            facts["switched"].setdefault(scenario, {})[name] = listed
        write_study(out, config, status="running", **facts)
        plans = _plans(config, out, derived, switched)
        _try_rules([plan for plan in plans if not _is_finished(plan)])
        _train_missing(plans, executor=executor, listener=listener, ctrl_c=ctrl_c)
    write_study(out, config, status="finished", **facts)


def worst_sites(runs: Iterable[Path], config: StudyConfig, arm: str) -> list[Site]:
    """Return the sites that clamped most in these runs, worst first.

    Most is the clamp error summed over steps and runs: the share of the tensor's squares that
    saturation removed. A count would put many small losses before one large one.
    """
    total: dict[Site, float] = {}
    for run in runs:
        with RunLog.open(run) as log:
            rows = log.sql(
                "SELECT fqn, role, sum(saturated_error) AS error FROM casts JOIN sites "
                "USING (rank, site) WHERE saturated > 0 AND NOT only_counted GROUP BY fqn, role"
            ).to_pylist()
        for row in rows:
            site = (row["fqn"], row["role"])
            total[site] = total.get(site, 0.0) + row["error"]
    ranked = sorted(total, key=lambda site: (-total[site], site))
    return ranked[: config.arms[arm].switch_worst]


def switch_to_dynamic(recipe: Recipe, sites: Iterable[Site]) -> Recipe:
    """Return the recipe with these sites dynamic; what it says of their layers otherwise stays."""
    return recipe.at_sites(SiteName(fqn, role) for fqn, role in sites)


def _runs_of(config: StudyConfig, out: Path, scenario: str, derived: str) -> list[Path]:
    base = config.arms[derived].from_arm
    assert base is not None
    return [_path(out, scenario, base, seed) for seed in config.seeds]


def _path(out: Path, scenario: str, arm: str, seed: int) -> Path:
    return out / scenario / arm / f"seed-{seed}"


def _plans(
    config: StudyConfig, out: Path, arms: list[str], switched: dict[tuple[str, str], list[Site]]
) -> list[RunPlan]:
    plans = []
    for scenario in config.scenarios:
        for name in arms:
            arm = config.arms[name]
            recipe = arm.recipe
            if arm.from_arm is not None:
                base = config.arms[arm.from_arm].recipe
                assert base is not None
                sites = switched.get((scenario, name), [])
                recipe = switch_to_dynamic(base, sites) if sites else base
            plans += [
                RunPlan(
                    config=config,
                    scenario=scenario,
                    arm=name,
                    seed=seed,
                    recipe=recipe,
                    path=_path(out, scenario, name, seed),
                    rule=arm.autopilot,
                )
                for seed in config.seeds
            ]
    return plans


def _try_rules(plans: list[RunPlan]) -> None:
    """Try the rules of steered arms on the runs of the arm that each starts from."""
    for plan in {plan.backtest: plan for plan in plans if plan.rule is not None}.values():
        assert plan.rule is not None
        runs = _runs_of(plan.config, plan.path.parents[2], plan.scenario, plan.arm)
        plan.backtest.parent.mkdir(parents=True, exist_ok=True)
        backtest(runs, plan.rule).save(plan.backtest)


def _claim(out: Path, config: StudyConfig, facts: dict[str, Any]) -> None:
    """Make the folder this study's, or find that it is already."""
    if is_study(out):
        found = read_study(out)
        is_same = (found.get("config"), found.get("text")) == (config.to_dict(), facts["text"])
        if not is_same and find_runs(out):
            raise StudyError(
                f"{str(out)!r} holds another study: expected the same configuration and text to "
                "resume it; choose another --out"
            )
        write_study(out, config, status="running", **facts)
        return
    if out.exists() and not out.is_dir():
        raise StudyError(f"expected a folder for the study, got the file {str(out)!r}")
    if is_run(out) or (out.is_dir() and any(out.iterdir())):
        what = "a run" if is_run(out) else "other files"
        raise StudyError(
            f"expected a new, empty or resumable folder, but {str(out)!r} holds {what}; "
            "choose another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_study(out, config, status="running", **facts)
    except OSError as error:
        raise StudyError(f"cannot write to {str(out)!r}: {error.strerror}") from error


def _is_finished(plan: RunPlan) -> bool:
    if not is_run(plan.path):
        return False
    try:
        header = read_header(plan.path)
    except RunLogError:
        return False
    # The recorder adds facts of its own.
    known = {key: header.metadata.get(key) for key in plan.identity}
    return header.status == "finished" and known == plan.identity


def _train_missing(
    plans: list[RunPlan], *, executor: Executor, listener: Listener, ctrl_c: CtrlC
) -> None:
    """Train the plans that are not finished."""
    todo = [plan for plan in plans if not _is_finished(plan)]
    ctrl_c.count()
    listener.on_start(todo, len(plans) - len(todo))
    if todo:
        train_all(todo, executor=executor, listener=listener, ctrl_c=ctrl_c)
