"""Every reader, with a run that knows which casts clamped and not how many elements did.

Such runs come of the scaling state or the logs of others. What nobody counted is null everywhere:
in no place may it be a 0, which would say that nothing was lost.
"""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from truths.rows import assert_summaries_are_those_of_casts, columns, merge_early, uncounted_row
from unclamp.analysis import associate, clamped_gradients, find_spikes, run_curve
from unclamp.analysis.advice import advise
from unclamp.analysis.horizon import clamped_before
from unclamp.analysis.whatif import evaluate, parse_policy
from unclamp.names import SiteName
from unclamp.report import build_view
from unclamp.report.html import write_page
from unclamp.report.side_by_side import compare_runs, runs_to_compare
from unclamp.report.side_by_side.page import write_comparison
from unclamp.report.side_by_side.text import print_comparison
from unclamp.report.text import print_view
from unclamp.runlog import Every, Header, RunLog, RunLogWriter
from unclamp.runlog.cadence import Cadence

STEPS = 600
DOWN, UP, GRAD = SiteName("mlp.fc2", "input"), SiteName("mlp.fc1", "input"), SiteName(
    "mlp.fc1", "grad_output")  # fmt: skip
SITES = (DOWN, UP, GRAD)
CLAMPED = (61, 130, 158, 222, 291, 320, 377, 470, 532, 571)
"""Steps at which `DOWN` clamps, each followed by a spike of the loss."""
OTHERS = (20, 44, 97, 113, 171, 190, 250, 262, 340, 361, 410, 433, 500, 549)
"""Steps at which `UP` clamps, more often and without harm."""


def overshoot(step: int, site: SiteName) -> float:
    if site == DOWN:
        return 6.0 if step in CLAMPED else 0.5
    return 1.5 if site == UP and step in OTHERS else 0.9


def write(path: Path, *, ranks: int = 1, steps: int = STEPS, seed: int = 0) -> Path:
    header = Header(
        unclamp_version="0.1.0",
        world_size=ranks,
        run_id="one",
        counts="casts",
        cadence=Cadence(casts=Every(), inspect=None),
    )
    random = np.random.default_rng(seed)
    losses = 2.0 + 0.02 * random.standard_normal(steps)
    for step in CLAMPED:
        losses[step : step + 3] += (1.2, 0.7, 0.3) if step < steps else 0
    for rank in range(ranks):
        with RunLogWriter(path, header=header, rank=rank) as writer:
            names = [
                {
                    "site": n * ranks + rank,
                    "fqn": site.fqn,
                    "role": site.role,
                    "format": "e4m3fn",
                    "scaling": "delayed",
                    "history_len": 16,
                    "format_max": 448.0,
                    "replicated": rank > 0,
                }
                for n, site in enumerate(SITES)
            ]
            writer.add("sites", columns(names))
            for first in range(0, steps, 50):
                every = range(first, min(first + 50, steps))
                writer.add("casts", columns([row(s, n, rank, ranks) for s in every
                                             for n in range(len(SITES))]))  # fmt: skip
                writer.add("steps", {"step": list(every), "loss": losses[first : first + 50],
                                     "time_s": [0.0] * len(every)})  # fmt: skip
                writer.flush()
    return path


def row(step: int, number: int, rank: int, ranks: int) -> dict[str, Any]:
    over = overshoot(step, SITES[number])
    if rank == 1:
        over *= 3.0
    return uncounted_row(
        step,
        number * ranks + rank,
        rank=rank,
        amax=2.0,
        scale=over * 448.0 / 2.0,
        microsteps=1,
        clamped=over * 448.0 > 464.0,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("uncounted") / "run")


def walk(data: Any, path: str = "") -> Any:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from walk(value, f"{path}.{key}")
    elif isinstance(data, list):
        for value in data:
            yield from walk(value, path)
    else:
        yield path, data


UNCOUNTED = ("saturated", "clamp_error", "underflow_share", "nonfinite", "clamp_error_max",
             "clamp_error_a_cast", "elements")  # fmt: skip


def assert_nothing_is_counted(data: Any) -> None:
    found = [(path, value) for path, value in walk(data)
             if path.rpartition(".")[2] in UNCOUNTED and ".glossary" not in path]  # fmt: skip
    assert found
    assert [pair for pair in found if pair[1] is not None] == []


def test_columns_are_null_and_so_are_their_sums(run: Path):
    with RunLog.open(run) as log:
        casts = log.casts()
        assert_summaries_are_those_of_casts(log)
        summaries = log.summaries()
    for name in ("elements", "saturated", "underflowed", "nonfinite"):
        assert casts[name].null_count == casts.num_rows
        assert summaries[name].null_count == summaries.num_rows
    assert sum(summaries["clamped"].to_pylist()) == len(CLAMPED) + len(OTHERS)
    assert summaries["uncounted"].to_pylist() == summaries["steps"].to_pylist()


@pytest.mark.parametrize("is_long", [False, True], ids=["from casts", "from summaries"])
def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool):
    merge_early(monkeypatch, fan_in=2)
    if is_long:
        monkeypatch.setattr("unclamp.runlog.windows.LONG_STEPS", 100)
    with RunLog.open(write(tmp_path / "run")) as log:
        windows = log.windows(most=6)
    assert windows.cut.from_summaries == is_long
    totals = dict(zip((site.name for site in windows.sites), windows.totals, strict=True))
    down = totals[DOWN]
    assert (down.rows, down.uncounted, down.clamped_rows) == (STEPS, STEPS, len(CLAMPED))
    assert down.overshoot == pytest.approx(6.0)
    assert (down.clamp_error, down.underflow_share, down.saturated_share) == (None, None, None)
    assert not (down + totals[UP]).is_counted
    place = [site.name for site in windows.sites].index(DOWN)
    shares = windows.saturated_share(place)  # of casts, since nobody counted elements
    expected = [sum(s // 100 == cell for s in CLAMPED) / 100 for cell in range(6)]
    assert shares.tolist() == pytest.approx(expected)


def test_spikes(run: Path):
    with RunLog.open(run) as log:
        curve = run_curve(log)
    found = find_spikes(curve.series["loss"], steps=curve.steps)
    assert [spike.onset for spike in found] == list(CLAMPED)


def test_an_association_names_the_site_and_tells_no_clamp_error(run: Path):
    with RunLog.open(run) as log:
        found = associate(log)
    assert found.verdict == "named"
    assert [SiteName(s.fqn, s.role) for s in found.sites if s.by] == [DOWN]  # type: ignore[arg-type]
    assert {site.clamp_error for site in found.sites} == {None}
    assert [site.clamped_steps for site in found.sites] == [len(CLAMPED), len(OTHERS)]
    text = str(found)
    assert "how much clamping removed is not in this log" in text
    assert "mean clamp error" not in text
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_clamped_before_a_step(run: Path):
    before = clamped_before(run, 200)
    assert before.steps == len({s for s in (*CLAMPED, *OTHERS) if s < 200})
    assert before.sites[0] == DOWN  # the larger overshoot
    assert before.hardest == CLAMPED[0]


def test_gradients_were_not_measured(run: Path):
    with RunLog.open(run) as log:
        assert not clamped_gradients(log).has_clamped


def test_the_report_of_the_terminal(run: Path):
    console = Console(width=120, record=True, file=StringIO())
    print_view(build_view(run), console)
    text = console.export_text()
    clamped, rows = len(CLAMPED) + len(OTHERS), 3 * STEPS
    assert f"{clamped} of {rows:,} recorded casts clamped, at 2 of 3 sites" in text
    assert "the largest overshoot is 6" in text
    assert "Only the largest element of each cast is in this log" in " ".join(text.split())
    assert "0 elements" not in text
    assert "Nothing was clamped" not in text
    figures = next(line for line in text.splitlines() if line.strip().startswith("-"))
    assert figures.split()[:2] == ["-", str(len(OTHERS))]  # elements unknown, casts known


def test_the_reports_json_and_page(run: Path, tmp_path: Path):
    view = build_view(run)
    data = view.to_dict()
    assert_nothing_is_counted({"sites": data["run"]["sites"]})
    clamped = {(s["fqn"], s["role"]): s["clamped_casts"] for s in data["run"]["sites"]}
    assert clamped == {
        (DOWN.fqn, DOWN.role): len(CLAMPED),
        (UP.fqn, UP.role): len(OTHERS),
        (GRAD.fqn, GRAD.role): 0,
    }
    assert [s["overshoot"] for s in data["run"]["sites"]] == [1.5, pytest.approx(6.0), None]
    assert view.run is not None
    assert max(view.run.heat[str(DOWN)]) == 0.5  # a window of two steps
    panel = next(p for p in view.run.panels.values() if p.fqn == DOWN.fqn)
    assert set(panel.clamp) == set(panel.under) == {None}
    page = write_page(view, tmp_path / "page.html").read_text()
    assert "Shares are of the casts, since elements were not counted" in page


def test_runs_beside_each_other(run: Path, tmp_path: Path):
    other = write(tmp_path / "other", seed=1)
    comparison = compare_runs(runs_to_compare([run, other])[0])
    data = comparison.to_dict()
    assert_nothing_is_counted({"sites": data["sites"], "runs": data["runs"]})
    said = " ".join(comparison.verdict)
    assert "of its recorded casts, elements not counted" in said
    console = Console(width=160, record=True, file=StringIO())
    print_comparison(comparison, console)
    assert "not counted" in console.export_text()
    write_comparison(comparison, tmp_path / "page.html")


def test_ranks_apart(tmp_path: Path):
    with RunLog.open(write(tmp_path / "run", ranks=2)) as log:
        windows = log.windows()
        found = log.overshoots(windows.cut)
    assert [rank.saturated for rank in found] == [None, None]
    assert [rank.overshoot for rank in found] == pytest.approx([6.0, 18.0])
    totals = dict(zip((site.name for site in windows.sites), windows.totals, strict=True))
    assert totals[DOWN].rows == STEPS  # what both hold counts once
    view = build_view(tmp_path / "run")
    assert view.run is not None
    assert [rank.saturated for rank in view.run.ranks.rows] == [None, None]
    write_page(view, tmp_path / "page.html")


def test_experts_are_told_by_their_casts(tmp_path: Path):
    header = Header(unclamp_version="0.1.0", counts="casts")
    with RunLogWriter(tmp_path / "run", header=header) as writer:
        for expert in range(3):
            name = {"site": expert, "fqn": f"experts.{expert}", "role": "input",
                    "format": "e4m3fn", "scaling": "delayed", "format_max": 448.0,
                    "history_len": 4}  # fmt: skip
            writer.add("sites", columns([name]))
            cast = [s for s in range(20) if expert != 1 or s % 5 == 0]
            writer.add("casts", columns([uncounted_row(s, expert) for s in cast]))
        steps = list(range(20))
        writer.add("steps", {"step": steps, "loss": [1.0] * 20, "time_s": [0.0] * 20})
    view = build_view(tmp_path / "run")
    assert view.run is not None
    (row,) = view.run.experts
    assert (row.fewest, row.even_share, row.gap) == ("experts.1", None, 4)
    write_page(view, tmp_path / "page.html")


def test_a_header_with_other_counts_is_refused(run: Path, tmp_path: Path):
    data = json.loads((run / "run.json").read_text())
    with pytest.raises(Exception, match="counts must be one of"):
        Header.from_dict({**data, "counts": "bits"})
    del data["counts"]
    assert Header.from_dict(data).counts == "elements"  # of older logs


def test_what_if_and_advice_are_made_of_amaxes_alone(tmp_path: Path) -> None:
    with RunLog.open(write(tmp_path / "run")) as log:
        found = evaluate(log, [parse_policy("delayed(16)"), parse_policy("guarded")])
        advice = advise(log)
    delayed, guarded = found.outcomes
    assert delayed.lost is None
    assert delayed.casts == STEPS * len(SITES)
    assert delayed.reads == 1.0
    assert guarded.reads == pytest.approx(1 + guarded.recast / guarded.casts)
    assert found.recorded.clamped == len(CLAMPED) + len(OTHERS)
    assert "Nobody counted this run's elements" in " ".join(found.limits)
    assert advice.verdict == "does not matter"


def half_known(path: Path, *, clamps: bool) -> Path:
    """A run in which it is known of every other cast whether it clamped; every fourth may have."""
    header = Header(
        unclamp_version="0.1.0",
        world_size=1,
        run_id=path.name,
        counts="casts",
        cadence=Cadence(casts=Every(), inspect=None),
    )
    known = {0: clamps, 2: False}
    with RunLogWriter(path, header=header, rank=0) as writer:
        name = {"site": 0, "fqn": DOWN.fqn, "role": DOWN.role, "format": "e4m3fn",
                "scaling": "delayed", "format_max": 448.0, "replicated": False}  # fmt: skip
        writer.add("sites", columns([name]))
        each = [uncounted_row(step, 0, clamped=known.get(step % 4)) for step in range(400)]
        writer.add("casts", columns(each))
        writer.add("steps", {"step": list(range(400)), "loss": [2.0] * 400,
                             "time_s": [0.0] * 400})  # fmt: skip
    return path


@pytest.mark.parametrize("is_long", [False, True], ids=["from casts", "from summaries"])
@pytest.mark.parametrize("clamps", [False, True], ids=["none", "some"])
def test_casts_of_which_nobody_knows_are_in_no_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clamps: bool, is_long: bool
):
    if is_long:
        monkeypatch.setattr("unclamp.runlog.windows.LONG_STEPS", 100)
    paths = [
        half_known(tmp_path / "one", clamps=clamps),
        half_known(tmp_path / "two", clamps=clamps),
    ]
    with RunLog.open(paths[0]) as log:
        assert_summaries_are_those_of_casts(log)
        windows = log.windows(most=4)
    assert (windows.totals[0].rows, windows.totals[0].undecided) == (400, 200)
    assert set(windows.saturated_share(0).tolist()) == {0.5 if clamps else 0.0}

    view = build_view(paths[0])
    data = view.to_dict()
    assert_nothing_is_counted(data)
    (site,) = data["run"]["sites"]
    assert (site["clamped_casts"], site["undecided_casts"]) == (100 if clamps else 0, 200)
    console = Console(width=400, record=True, file=StringIO())
    print_view(view, console)
    compared = compare_runs(runs_to_compare(paths)[0])
    print_comparison(compared, console)
    said = console.export_text()
    with RunLog.open(paths[0]) as log:
        association = str(associate(log))
    assert "f 200 recorded casts nobody knows whether they clamped" in association
    if clamps:
        assert "100 of 200 recorded casts (of 200 more that is not known) clamped" in said
        assert "in 50 % of its recorded casts (200 more not known)" in said
    else:
        assert "Of 200 of 400 recorded casts at 1 site it is not known whether they clamped" in said
        assert "Nothing is known to have clamped in any run (of 400 casts it is not known)" in said
        assert "Nothing was clamped" not in said
        assert "nothing clamped" not in said
