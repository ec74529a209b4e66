"""What clamping took of the weights' gradients, from logs in which every gradient is planted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from unclamp.analysis import ClampedGradients, clamped_gradients, clamped_gradients_by
from unclamp.analysis.gradients import change_in_words
from unclamp.names import SiteName
from unclamp.report import build_view
from unclamp.report.arms import scenario_view
from unclamp.report.recorded import read_run
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.totals import GradientChange

UP, DOWN = SiteName("layers.0.up", "grad_output"), SiteName("layers.1.down", "grad_output")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A weight's gradient with and without clamping, at one step, rank and site."""

    step: int
    site: int
    computed: Sequence[float]
    unclamped: Sequence[float]
    rank: int = 0

    def row(self) -> dict:
        computed, unclamped = np.array(self.computed), np.array(self.unclamped)
        norms = np.linalg.norm(computed), np.linalg.norm(unclamped)
        return self.counts(saturated=3) | {
            "grad_error": np.linalg.norm(unclamped - computed) / norms[1],
            "grad_cosine": float(computed @ unclamped) / (norms[0] * norms[1]),
            "grad_ratio": norms[0] / norms[1],
            "weight_grad_norm": norms[1],
        }

    def counts(self, *, saturated: int) -> dict:
        zeros = dict.fromkeys(("underflowed", "nonfinite", "recast"), 0)
        return zeros | {"step": self.step, "site": self.site, "amax": 1.0, "scale": 1.0,
                        "elements": 100, "saturated": saturated, "microsteps": 1,
                        "saturated_error": 0.5 if saturated else 0.0}  # fmt: skip


ALL = [
    Planted(step=3, site=1, computed=[1, 0, 2], unclamped=[4, 0, 9]),
    Planted(step=3, site=2, computed=[1, 1], unclamped=[1, 1.5]),
    Planted(step=7, site=1, computed=[0, 3, 0], unclamped=[2, 3, 1]),
    Planted(step=8, site=1, computed=[5, 0, 0], unclamped=[4, 0, 0]),
]
NOWHERE = {"grad_error": 0.0, "grad_cosine": 1.0, "grad_ratio": 1.0, "weight_grad_norm": None}


def write(path: Path, rows: Sequence[dict], *, ranks: int = 1) -> Path:
    header = Header(unclamp_version="test", world_size=ranks)
    for rank in range(ranks):
        with RunLogWriter(path, header=header, rank=rank) as writer:
            # The input of one product comes first, and is no gradient.
            names = [SiteName("layers.0.up", "input"), UP, DOWN]
            writer.add("sites", {"site": [rank + ranks * i for i in range(3)],
                                 "fqn": [name.fqn for name in names],
                                 "role": [name.role for name in names],
                                 "format": ["e5m2"] * 3, "scaling": ["delayed"] * 3,
                                 "format_max": [57344.0] * 3})  # fmt: skip
            for step in range(10):
                writer.add("steps", {"step": [step], "loss": [2.0], "time_s": [float(step)]})
            for row in rows:
                if row.get("rank", 0) == rank:
                    shifted = row | {"site": rank + ranks * row["site"], "rank": rank}
                    writer.add("casts", {name: [value] for name, value in shifted.items()})
    return path


def read(path: Path, **settings) -> ClampedGradients:
    with RunLog.open(path) as log:
        return clamped_gradients(log, **settings)


def together(planted: Sequence[Planted]) -> tuple[float, float, float]:
    """Return error, cosine and ratio of the gradients as one long vector."""
    computed = np.concatenate([p.computed for p in planted])
    unclamped = np.concatenate([p.unclamped for p in planted])
    norms = float(np.linalg.norm(computed)), float(np.linalg.norm(unclamped))
    error = float(np.linalg.norm(unclamped - computed)) / norms[1]
    return error, float(computed @ unclamped) / (norms[0] * norms[1]), norms[0] / norms[1]


def figures(change: GradientChange) -> tuple[float, float, float]:
    return change.error, change.cosine, change.ratio


def test_the_gradients_of_all_casts_count_as_one_long_vector(tmp_path):
    found = read(write(tmp_path / "run", [planted.row() for planted in ALL]))
    assert figures(found.change) == pytest.approx(together(ALL), rel=1e-7)
    assert (found.asked, found.steps, found.casts, found.unmeasured) == (None, 3, 4, 0)


def test_each_site_has_its_own_and_the_largest_error_comes_first(tmp_path):
    found = read(write(tmp_path / "run", [planted.row() for planted in ALL]))
    assert [site.name for site in found.sites] == [UP, DOWN]
    up = found.by_name[UP]
    mine = [planted for planted in ALL if planted.site == 1]
    assert figures(up.change) == pytest.approx(together(mine), rel=1e-7)
    assert up.casts == 3
    worst = (up.worst.error, up.worst.cosine, up.worst.ratio)
    assert (up.worst.step, worst) == (3, pytest.approx(together(ALL[:1]), rel=1e-9))


def test_all_kinds_at_once_are_each_by_itself(tmp_path):
    path = write(tmp_path / "run", [planted.row() for planted in ALL])
    kinds: dict[int, str | None] = {3: "early", 7: "late", 0: None, 8: "late", 1: None}
    with RunLog.open(path) as log:
        found = clamped_gradients_by(log, kinds)
    assert list(found) == ["early", "late", None]
    for kind, own in found.items():
        mine = [planted for planted in ALL if kinds[planted.step] == kind]
        assert (own.casts, own.asked) == (len(mine), list(kinds.values()).count(kind))
        assert own.steps == len({planted.step for planted in mine})
        if mine:
            assert figures(own.change) == pytest.approx(together(mine), rel=1e-7)


def test_some_steps_are_told_apart(tmp_path):
    path = write(tmp_path / "run", [planted.row() for planted in ALL])
    found = read(path, steps=[7, 8, 9, 9])
    assert figures(found.change) == pytest.approx(together(ALL[2:]), rel=1e-7)
    assert (found.asked, found.steps, found.casts) == (3, 2, 2)
    nothing = read(path, steps=[])
    assert (nothing.asked, nothing.casts, nothing.sites) == (0, 0, ())
    assert read(path, steps=[0, 1]).words() == "No gradient was clamped in 2 steps."


def test_ranks_are_taken_together(tmp_path):
    planted = [*ALL, replace(ALL[0], rank=1, unclamped=[9, 9, 9])]
    rows = [each.row() | {"rank": each.rank} for each in planted]
    found = read(write(tmp_path / "run", rows, ranks=2))
    assert figures(found.change) == pytest.approx(together(planted), rel=1e-7)
    assert [site.name for site in found.sites] == [UP, DOWN]


def test_what_was_not_measured_is_counted_and_not_guessed(tmp_path):
    rows = [ALL[0].row(), ALL[2].counts(saturated=5), ALL[3].counts(saturated=0) | NOWHERE]
    found = read(write(tmp_path / "run", rows))
    assert figures(found.change) == pytest.approx(together(ALL[:1]), rel=1e-7)
    assert (found.casts, found.unmeasured) == (1, 1)
    assert found.words().startswith("Clamped gradients were measured at 1 of 2 weights, in 1 step:")
    assert found.words().endswith("of their size; what 1 more clamped cast did was not measured.")
    unknown = read(write(tmp_path / "old", rows[1:]))
    assert unknown.words() == (
        "1 cast of a gradient clamped; what that did to the gradients of the weights was not "
        "measured."
    )
    assert unknown.worst_words() == []


def test_of_many_weights_it_says_how_many_it_is_of(tmp_path):
    """Two of forty weights lose four fifths in 3 of 15 batches: no four fifths of the update."""
    names = [SiteName(f"layers.{i}", role) for i in range(40) for role in ("input", "grad_output")]
    rows = [
        Planted(step=step, site=site, computed=[0, 1], unclamped=[3, 4]).row()
        for step in (2, 8, 14)
        for site in (7, 31)
    ]
    path = tmp_path / "run"
    with RunLogWriter(path, header=Header(unclamp_version="test"), rank=0) as writer:
        writer.add("sites", {"site": list(range(80)), "fqn": [name.fqn for name in names],
                             "role": [name.role for name in names], "format": ["e5m2"] * 80,
                             "scaling": ["delayed"] * 80,
                             "format_max": [57344.0] * 80})  # fmt: skip
        for row in rows:
            writer.add("casts", {name: [value] for name, value in row.items()})
    found = read(path, steps=range(15))
    assert found.words("'answers' batch", "'answers' batches") == (
        "Gradients were clamped at 2 of 40 weights, in 3 of 15 'answers' batches: there clamping "
        "turned the weights' gradients by 36.9 degrees and took 80 % of their size."
    )
    assert len((found + found).weights) == 40  # two runs of one model have its weights once
    assert "at 2 of 40 weights, in 6 of 30 steps:" in (found + found).words()


def test_products_of_attention_are_no_weights(tmp_path):
    """Of three layers one is clamped; the two products of the attention have no weight."""
    fqns = ["0.attn.qkv", "0.attn.qk", "0.attn.pv.3", "0.attn.out", "0.up"]
    path = tmp_path / "run"
    with RunLogWriter(path, header=Header(unclamp_version="test"), rank=0) as writer:
        writer.add("sites", {"site": list(range(5)), "fqn": fqns, "role": ["grad_output"] * 5,
                             "format": ["e5m2"] * 5, "scaling": ["delayed"] * 5,
                             "format_max": [57344.0] * 5})  # fmt: skip
        row = Planted(step=2, site=3, computed=[0, 1], unclamped=[3, 4]).row()
        writer.add("casts", {name: [value] for name, value in row.items()})
    assert read(path, steps=range(3)).words().startswith("Gradients were clamped at 1 of 3 weights")


def test_a_clamped_input_is_no_clamped_gradient(tmp_path):
    row = replace(ALL[0], site=0).counts(saturated=9)
    assert read(write(tmp_path / "run", [row])).words() == "No gradient was clamped."


def test_two_runs_add_up(tmp_path):
    first = read(write(tmp_path / "a", [planted.row() for planted in ALL[:2]]))
    second = read(write(tmp_path / "b", [planted.row() for planted in ALL[2:]]))
    both = first + second
    assert figures(both.change) == pytest.approx(together(ALL), rel=1e-7)
    mine = [planted for planted in ALL if planted.site == 1]
    assert figures(both.by_name[UP].change) == pytest.approx(together(mine), rel=1e-7)
    assert (both.by_name[UP].worst.step, both.casts, both.steps) == (3, 4, 3)
    assert ClampedGradients() + first == first


def test_sentences_say_by_how_much_and_where(tmp_path):
    # A gradient of (3, 4) keeps a fifth of its size and turns from 53.13 to 90 degrees.
    row = Planted(step=5, site=2, computed=[0, 1], unclamped=[3, 4]).row()
    found = read(write(tmp_path / "run", [row]), steps=range(4, 8))
    assert found.words("'answers' batch", "'answers' batches") == (
        "Gradients were clamped at 1 of 2 weights, in 1 of 4 'answers' batches: there clamping "
        "turned the weights' gradients by 36.9 degrees and took 80 % of their size."
    )
    assert found.worst_words() == [
        "Clamping changed the gradient of a weight most at layers.1.down grad_output: at step 5 "
        "it turned the weight's gradient by 36.9 degrees and took 80 % of its size."
    ]


def test_a_gradient_may_grow_or_keep_its_direction():
    def change(computed, unclamped):
        a, b = np.array(computed), np.array(unclamped)
        sums = (float(x @ y) for x, y in ((a, a), (b - a, b - a), (a, b - a)))
        return GradientChange.of(**dict(zip(("computed", "change", "product"), sums, strict=True)))

    assert change_in_words(change([1.0, 1.0], [1.0, 0.5])).endswith(
        "turned the weight's gradient by 18.4 degrees and made it 26.5 % larger"
    )
    assert change_in_words(change([0.5, 0.5], [1.0, 1.0])) == (
        "hardly turned the weight's gradient and took 50 % of its size"
    )


def test_a_log_without_the_columns_is_one_that_did_not_measure(tmp_path):
    path = write(tmp_path / "run", [ALL[0].counts(saturated=4)])
    for part in path.glob("casts/*.parquet"):
        with pq.ParquetFile(part) as file:
            rows = file.read()
        pq.write_table(rows.drop_columns(list(NOWHERE)), part)
    with RunLog.open(path) as log:
        (row,) = log.casts().to_pylist()
        assert {row[name] for name in NOWHERE} == {None}
        assert clamped_gradients(log).unmeasured == 1


# ---- the report -----------------------------------------------------------------------------
def test_the_report_of_a_run_tells_it_and_ranks_the_sites(tmp_path):
    view = build_view(write(tmp_path / "run", [planted.row() for planted in ALL]))
    assert view.run is not None
    said = " ".join(view.run.sentences)
    degrees = math.degrees(math.acos(together(ALL)[1]))
    assert f"turned the weights' gradients by {degrees:.3g} degrees and took" in said
    assert "most at layers.0.up grad_output: at step 3 it turned" in said
    assert "By gradient error over all clamped casts: layers.0.up grad_output" in said
    errors = {SiteName.from_dict({"fqn": s.fqn, "role": s.role}): s for s in view.run.sites}
    mine = [planted for planted in ALL if planted.site == 1]
    assert errors[UP].grad_error == pytest.approx(together(mine)[0], rel=1e-4)


def test_the_report_says_that_clamped_gradients_were_not_measured(tmp_path):
    rows = [planted.counts(saturated=3) for planted in ALL]  # as on a GPU between inspected steps
    view = build_view(write(tmp_path / "run", rows))
    assert view.run is not None
    unknown = (
        "4 casts of gradients clamped; what that did to the gradients of the weights was not "
        "measured."
    )
    assert unknown in view.run.sentences
    with RunLog.open(tmp_path / "run") as log:
        record, _ = read_run(log)
    assert f"delayed: {unknown}" in scenario_view("text", "", {"delayed": {0: record}}, {}).findings


def test_an_arm_tells_it_where_it_is_much(tmp_path):
    path = write(tmp_path / "run", [planted.row() for planted in ALL])
    little = Planted(step=3, site=1, computed=[100, 0], unclamped=[100, 2]).row()
    with RunLog.open(path) as log:
        record, _ = read_run(log)
    with RunLog.open(write(tmp_path / "little", [little])) as log:
        hardly, _ = read_run(log)
    view = scenario_view(
        "text", "", {"delayed": {0: record, 1: record}, "dynamic": {0: hardly}}, {}
    )
    told = [line for line in view.findings if "gradient" in line]
    assert told[0].startswith(
        "delayed: gradients were clamped at 2 of 2 weights, in 6 steps of all seeds: there "
        "clamping turned the weights' gradients by"
    )
    assert not any(line.startswith("dynamic") for line in told)
    arms = {arm.name: arm for arm in view.arms}
    assert arms["delayed"].grad_error == pytest.approx(together(ALL)[0], rel=1e-6)
    assert arms["dynamic"].grad_error == pytest.approx(0.02, rel=1e-3)
    worst = {SiteName(row.fqn, row.role): row for row in view.worst["delayed"]}  # pyright: ignore
    assert worst[UP].grad_error == pytest.approx(view.worst["delayed"][0].grad_error)
