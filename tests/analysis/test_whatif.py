"""What-if: scales and clamped casts of other policies, against brute force and real trainings."""

import math
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import unclamp
from unclamp.analysis.whatif import WhatIf, amaxes, evaluate, trace
from unclamp.errors import AnalysisError, RecipeError
from unclamp.runlog import Cadence, Every, Header, RunLog, RunLogWriter
from unclamp.scaling import Delayed, Dynamic, Guarded, HighPrecision, PerRow, Scaling, Static

F32 = np.float32
E4M3_MAX, E4M3_LIMIT = 448.0, 464.0
E5M2_MAX, E5M2_LIMIT = 57344.0, float(np.nextafter(F32(61440), F32(0)))


class Case:
    """Amaxes of two sites, one of which does not cast in every step, as a log and as lists."""

    def __init__(self, seed: int, steps: int = 90) -> None:
        generator = np.random.default_rng(seed)
        walk = np.exp(np.cumsum(generator.normal(0, 0.3, (steps, 2)), 0)).astype(F32)
        walk[generator.random((steps, 2)) < 0.05] *= F32(30)
        walk[generator.random((steps, 2)) < 0.05] = 0
        walk[:3, 1] = 0  # nothing known for a while
        self.amax = walk
        self.casts = generator.random((steps, 2)) < [1.0, 0.6]
        self.nonfinite = generator.random((steps, 2)) < 0.05  # nothing finite was seen

    def write(self, path: Path, **header: Any) -> Path:
        with RunLogWriter(path, header=Header(unclamp_version="0", **header)) as writer:
            writer.add(
                "sites",
                {
                    "site": [0, 1],
                    "fqn": ["a.up", "a.down"],
                    "role": ["input", "grad_output"],
                    "format": ["e4m3fn", "e5m2"],
                    "scaling": ["dynamic"] * 2,
                    "format_max": [E4M3_MAX, E5M2_MAX],
                },
            )
            for step in range(len(self.amax)):
                writer.add("casts", self._rows(step))
        return path

    def _rows(self, step: int) -> dict[str, list[Any]]:
        sites = [i for i in range(2) if self.casts[step, i]]
        return {
            "step": [step] * len(sites),
            "site": sites,
            "amax": [float(self.amax[step, i]) for i in sites],
            "scale": [1.0] * len(sites),
            "elements": [64] * len(sites),
            "nonfinite": [64 if self.nonfinite[step, i] else 0 for i in sites],
            **{name: [0] * len(sites) for name in ("saturated", "underflowed", "recast")},
            "saturated_error": [0.0] * len(sites),
            "microsteps": [1] * len(sites),
        }

    def seen(self, site: int) -> list[tuple[int, np.float32]]:
        """Return a site's steps and amaxes, without those that enter no history."""
        there = self.casts[:, site] & ~self.nonfinite[:, site]
        return [(int(step), self.amax[step, site]) for step in np.flatnonzero(there)]


def scale_by_hand(amax: np.float32, largest: float, *, power_of_two: bool) -> np.float32:
    if power_of_two:
        exact = Fraction(largest) / Fraction(float(amax))
        power = math.floor(math.log2(exact))
        while Fraction(2) ** power > exact:
            power -= 1
        while Fraction(2) ** (power + 1) <= exact:
            power += 1
        return F32(2.0 ** min(max(power, -126), 126))
    return np.clip(F32(largest) / amax, F32(2.0**-126), F32(2.0**126))


def by_hand(
    policy: Delayed | Guarded, seen: list[tuple[int, np.float32]], fmt_max: float, limit: float
) -> list[tuple[int, np.float32, bool]]:
    """Return each cast's step, scale and whether it clamps, with a deque; scale 0: its own."""
    history: deque[np.float32] = deque(maxlen=policy.history_len)
    scale, out = F32(0), []
    for step, amax in seen:
        out.append((step, scale, bool(amax * scale > F32(limit))))
        history.append(amax)
        largest = history[-1] if policy.reduce == "most_recent" else max(history)
        if callable(policy.reduce):
            past = np.zeros((1, policy.history_len), F32)
            past[0, : len(history)] = list(history)[::-1]
            largest = F32(cast(Any, policy.reduce)(past)[0])
        if largest > 0:
            scale = scale_by_hand(
                largest, fmt_max / 2**policy.margin, power_of_two=policy.power_of_two
            )
    return out


def second_largest(history: np.ndarray) -> np.ndarray:
    return np.sort(history, 1)[:, -2] if history.shape[1] > 1 else history[:, 0]


POLICIES: list[Delayed | Guarded] = [
    Delayed(1),
    Delayed(2),
    Delayed(16),
    Delayed(1024),
    Delayed(5, margin=2),
    Delayed(16, reduce="most_recent"),
    Delayed(7, power_of_two=True),
    Delayed(4, reduce=second_largest),
    Guarded(),
    Guarded(16, margin=0, power_of_two=True),
]


@pytest.fixture(params=[None, 40, 7])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read all at once, and in chunks that are shorter than the histories."""
    if request.param is not None:
        monkeypatch.setattr(amaxes, "CHUNK_ROWS", request.param)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("seed", [0, 1])
def test_scales_and_clamped_casts_are_those_of_a_list(seed: int, tmp_path: Path) -> None:
    case = Case(seed)
    with RunLog.open(case.write(tmp_path / "run")) as log:
        found = evaluate(log, POLICIES)
        for policy, outcome in zip(POLICIES, found.outcomes, strict=True):
            for site, (name, fmt_max, limit) in enumerate(
                [("a.up", E4M3_MAX, E4M3_LIMIT), ("a.down", E5M2_MAX, E5M2_LIMIT)]
            ):
                truth = by_hand(policy, case.seen(site), fmt_max, limit)
                rows = trace(log, policy, site=name).to_pylist()
                assert [(r["step"], F32(r["scale"]), r["clamps"]) for r in rows] == truth
                clamps = [step for step, _, hit in truth if hit]
                got = next(s for s in outcome.sites if s.site.fqn == name)
                assert (got.clamped, got.recast) == (
                    (0, len(clamps)) if policy.guards else (len(clamps), 0)
                )
                assert got.casts == len(truth)
                assert got.elements == 64 * len(truth)
                assert got.reads == got.elements + (64 * len(clamps) if policy.guards else 0)
                if not policy.guards:
                    assert got.first_clamp == (clamps[0] if clamps else None)
                    scaled = [float(case.amax[t, site]) * float(s) for t, s, _ in truth]
                    assert got.overshoot == pytest.approx(max(scaled) / fmt_max, rel=1e-6)


def test_scales_that_follow_from_no_history(tmp_path: Path) -> None:
    case = Case(2)
    with RunLog.open(case.write(tmp_path / "run")) as log:
        found = evaluate(log, [Dynamic(), Dynamic(PerRow()), Static(16.0), HighPrecision()])
    dynamic, rows, static, plain = found.outcomes
    assert (dynamic.clamped, dynamic.reads, rows.reads) == (0, 2.0, 2.0)
    assert (plain.clamped, plain.reads, plain.lost) == (0, 0.0, None)
    up = [amax for _, amax in case.seen(0) if amax * F32(16) > F32(E4M3_LIMIT)]
    down = [amax for _, amax in case.seen(1) if amax * F32(16) > F32(E5M2_LIMIT)]
    assert static.clamped == len(up) + len(down) > 0
    assert static.reads == 1.0


Train = Callable[[Scaling], Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return what trains a small net under one scaling and returns its log, once for each."""
    made: dict[str, Path] = {}

    def run(scaling: Scaling) -> Path:
        name = repr(scaling)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("trained") / "run"
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4)
            )
            unclamp.convert(model, unclamp.Recipe.uniform(scaling))
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            with unclamp.Recorder(model, made[name], inspect=1) as recorder:
                for step in range(60):
                    x = torch.randn(64, 16) * (1 + 9 * (step in (13, 27, 28, 50)))
                    loss = model(x).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    recorder.step(loss=loss)
        return made[name]

    return run


def logged(scale: float) -> float:
    """Return a scale as a log writes it: the inverse of the inverse that a GEMM gets."""
    return float(F32(1 / np.float64(F32(1) / F32(scale))))


@pytest.mark.parametrize("policy", [Delayed(4), Delayed(16), Guarded(), Guarded(8, margin=0)])
def test_a_run_s_own_policy_gives_its_own_scales_bit_for_bit(policy: Scaling, train: Train) -> None:
    with RunLog.open(train(policy)) as log:
        (outcome,) = evaluate(log, [policy]).outcomes
        for site in log.named_sites():
            mine = trace(log, policy, site=f"{site.fqn} {site.role}").to_pydict()
            theirs = log.casts(site.name).to_pydict()
            kept = [
                (a, b)
                for a, b, again in zip(
                    mine["scale"], theirs["scale"], theirs["recast"], strict=True
                )
                if a != 0 and not again  # else the tensor's own
            ]
            assert len(kept) > 40
            assert [logged(a) for a, _ in kept] == [b for _, b in kept]
            own = next(s for s in outcome.sites if s.site == site.name)
            assert own.clamped == sum(n > 0 for n in theirs["saturated"])
            assert own.recast == sum(n > 0 for n in theirs["recast"])
        clamped = log.sql("SELECT count(*) AS n FROM casts WHERE saturated > 0").to_pylist()[0]["n"]
        recorded = evaluate(log, [policy]).recorded
    assert (outcome.clamped, outcome.recast) == (recorded.clamped, recorded.recast)
    assert outcome.reads == pytest.approx(recorded.reads)
    assert (clamped > 0) != policy.guards


def test_what_casts_lose_is_near_what_they_lost(train: Train) -> None:
    """Of a delayed run's own policy the log knows the truth: counts and errors of every cast."""
    with RunLog.open(train(Delayed(4))) as log:
        (outcome,) = evaluate(log, [Delayed(4)]).outcomes
        (truth,) = log.sql(
            """SELECT count(*) AS casts, sum(saturated) AS clamped,
                count(*) FILTER (saturated > 0) AS clamped_casts,
                avg(saturated_error) FILTER (saturated > 0) AS error,
                avg(underflowed / list_sum(map_values(exponents))) AS underflow
            FROM casts WHERE exponents IS NOT NULL"""
        ).to_pylist()
    lost = outcome.lost
    assert lost is not None
    assert (lost.casts, lost.clamped_casts) == (truth["casts"], truth["clamped_casts"])
    assert lost.clamped.low <= truth["clamped"] <= lost.clamped.high
    assert lost.clamp_error.low <= truth["error"] <= lost.clamp_error.high
    assert lost.underflow.low <= truth["underflow"] <= lost.underflow.high
    assert lost.clamped.value == pytest.approx(truth["clamped"], rel=0.2)
    assert lost.clamp_error.value == pytest.approx(truth["error"], rel=0.2)


def limits_of(path: Path, policy: Scaling = Delayed()) -> str:
    with RunLog.open(path) as log:
        return " ".join(evaluate(log, [policy]).limits)


def test_a_log_without_clamping_is_unbiased_and_one_with_it_says_the_direction(
    train: Train, tmp_path: Path
) -> None:
    assert "without clamping (unbiased)" in limits_of(train(Guarded()))
    said = limits_of(train(Delayed(4)))
    assert "is understated" in said
    assert "is overstated" in said
    observed = Case(3).write(tmp_path / "seen", observed=True)
    assert limits_of(observed).startswith("The run was observed")


def test_sparse_cadences_and_missing_looks_are_said(tmp_path: Path) -> None:
    cadence = Cadence(casts=Every(10, or_clamped=True), inspect=None)
    said = limits_of(Case(3).write(tmp_path / "run", cadence=cadence))
    assert "overstated" in said
    assert "No cast was inspected" in said


def test_steps_without_a_record_are_said(tmp_path: Path) -> None:
    case = Case(4)
    case.casts[10:20] = False
    assert "80 of 90 steps" in limits_of(case.write(tmp_path / "run"))


def test_the_frontier_holds_what_nothing_beats(tmp_path: Path) -> None:
    policies = [Delayed(1), Delayed(1024), Guarded(), Dynamic(), Delayed(1024, power_of_two=True)]
    with RunLog.open(Case(5).write(tmp_path / "run")) as log:
        found = evaluate(log, policies)
    figures = [(o.reads, o.clamped) for o in found.outcomes]
    expected = {
        mine
        for mine in figures
        if not any(o != mine and o[0] <= mine[0] and o[1] <= mine[1] for o in figures)
    }
    assert {(o.reads, o.clamped) for o in found.frontier} == expected
    assert (2.0, 0) not in expected  # guarded never clamps either, and reads less


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    with RunLog.open(Case(6).write(tmp_path / "run")) as log:
        with pytest.raises(RecipeError, match="one amax a cast"):
            evaluate(log, [Delayed(granularity=PerRow())])
        with pytest.raises(AnalysisError, match="no site of the run matches 'lm_head'"):
            evaluate(log, [Delayed()], site="lm_head")
        with pytest.raises(AnalysisError, match="at least one policy"):
            evaluate(log, [])
        with pytest.raises(AnalysisError, match="expected a glob of one site"):
            trace(log, Delayed(), site="a.*")


def test_a_run_without_casts_is_refused(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        writer.add("steps", {"step": [0], "time_s": [0.0]})
    with (
        RunLog.open(tmp_path / "run") as log,
        pytest.raises(AnalysisError, match="has no casts"),
    ):
        evaluate(log, [Delayed()])


def test_ranks_share_the_largest_amax(tmp_path: Path) -> None:
    """Two ranks, the one after the other the larger: the history of all has the larger."""
    amaxes_of_ranks = np.array([[1, 2], [4, 1], [1, 1], [8, 9]], F32)
    header = Header(unclamp_version="0", world_size=2, run_id="r")
    for rank in range(2):
        with RunLogWriter(tmp_path / "run", header=header, rank=rank) as writer:
            writer.add(
                "sites",
                {
                    "site": [rank],
                    "fqn": ["up"],
                    "role": ["input"],
                    "format": ["e4m3fn"],
                    "scaling": ["delayed"],
                    "format_max": [E4M3_MAX],
                },
            )
            for step, amax in enumerate(amaxes_of_ranks[:, rank].tolist()):
                writer.add(
                    "casts",
                    {
                        "step": [step],
                        "site": [rank],
                        "amax": [amax],
                        "scale": [1.0],
                        "elements": [10],
                        **{n: [0] for n in ("saturated", "underflowed", "nonfinite", "recast")},
                        "saturated_error": [0.0],
                        "microsteps": [1],
                    },
                )
    with RunLog.open(tmp_path / "run") as log:
        found: WhatIf = evaluate(log, [Delayed(16)])
        rows = trace(log, Delayed(16), site="up").to_pydict()
    assert rows["amax"] == [2, 4, 1, 9]
    assert rows["scale"] == [0, 224, 112, 112]
    (site,) = found.outcomes[0].sites
    assert (site.casts, site.clamped, site.elements) == (4, 2, 80)
