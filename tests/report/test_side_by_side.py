"""Recorded runs side by side: arms, pairs, losses, settings and sites, against planted truth."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata, ttest_ind, ttest_rel

from truths.runs import write_planted
from truths.sides import DELAYED, DOWN, DYNAMIC, TORCH, UP, noisy, write_side
from unclamp.errors import RunLogError, UnclampError, UnclampWarning
from unclamp.report.side_by_side import Comparison, compare_runs
from unclamp.report.side_by_side.reading import short_names
from unclamp.runlog import Cadence, Every


def seeds(
    root: Path, arm: str, numbers: Any, *, shift: float = 0.0, jitter: float = 0.0, **given: Any
) -> list[Path]:
    """Write the seeds of an arm; the same seed has the same batches in every arm."""
    return [
        write_side(
            root / arm / f"seed-{n}",
            noisy(n, shift=shift, jitter=jitter),
            metadata={"seed": n} | given.get("metadata", {}),
            **{key: value for key, value in given.items() if key != "metadata"},
        )
        for n in numbers
    ]


def spearman(own: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of ranks, by its definition."""
    return float(np.corrcoef(rankdata(own), rankdata(other))[0, 1])


def verdict(found: Comparison) -> str:
    return " ".join(found.verdict)


def limits(found: Comparison) -> str:
    return " ".join(found.limits)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["r/a/seed-0", "r/b/seed-0", "r/c/x"], ["a/seed-0", "b/seed-0", "c/x"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["a/b/c/d", "a/x/c/d"], ["b/c/d", "x/c/d"]),
        (["one", "two"], ["one", "two"]),
        (["a/seed-0", "b/seed-1"], ["a/seed-0", "b/seed-1"]),
        (["a/0", "b/17"], ["a/0", "b/17"]),
        (["a/run-0", "a/run-1"], ["run-0", "run-1"]),
        (["a/seed-0", "b/last"], ["seed-0", "last"]),
        (["a/run", "a/run/again"], ["run", "again"]),
    ],
)
def test_names_are_the_shortest_ends_that_differ(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


def test_runs_with_the_same_recipe_and_metadata_are_seeds_of_one_arm(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "delayed", range(3)) + seeds(
        tmp_path, "dynamic", range(3), recipe=DYNAMIC
    )
    found = compare_runs(paths)
    assert found.baseline == "delayed"
    assert found.arms == {
        "delayed": [f"delayed/seed-{n}" for n in range(3)],
        "dynamic": [f"dynamic/seed-{n}" for n in range(3)],
    }
    assert [row.seed for row in found.runs] == [0, 1, 2, 0, 1, 2]


def test_the_same_seeds_elsewhere_are_another_arm(tmp_path: Path) -> None:
    there = {**TORCH, "device": "cuda"}
    paths = seeds(tmp_path, "here", (0, 1)) + seeds(tmp_path, "there", (0, 1), environment=there)
    found = compare_runs(paths)
    assert list(found.arms) == ["here", "there"]
    assert [(s.where, s.name, s.values) for s in found.settings] == [
        ("environment", "device", {"here": "cpu", "there": "cuda"})
    ]


def test_runs_that_say_nothing_of_how_they_differ_are_not_averaged(tmp_path: Path) -> None:
    paths = [write_side(tmp_path / name, noisy(0)) for name in ("before", "after")]
    found = compare_runs(paths)
    assert found.arms == {"before": ["before"], "after": ["after"]}
    assert found.settings == []
    assert "after and before differ in nothing that their headers know." in found.verdict


def test_arms_are_named_by_metadata_by_folder_or_by_what_names_share(tmp_path: Path) -> None:
    flat = [
        write_side(tmp_path / f"{arm}-seed{n}", noisy(n), metadata={"seed": n}, recipe=recipe)
        for arm, recipe in (("delayed", DELAYED), ("dynamic", DYNAMIC))
        for n in (0, 1)
    ]
    assert list(compare_runs(flat).arms) == ["delayed", "dynamic"]
    given = seeds(tmp_path / "x", "a", (0, 1), metadata={"arm": "mine"})
    given += seeds(tmp_path / "x", "b", (0, 1), metadata={"arm": "yours"})
    assert list(compare_runs(given).arms) == ["mine", "yours"]


def test_pairs_by_seed_give_students_interval(tmp_path: Path) -> None:
    own = seeds(tmp_path, "delayed", range(4), shift=0.05, jitter=0.01)
    base = seeds(tmp_path, "dynamic", range(4), recipe=DYNAMIC)
    found = compare_runs(own + base, baseline="dynamic")
    (difference,) = found.differences
    ends = [
        [np.mean(noisy(n, shift=shift, jitter=jitter)[-10:]) for n in range(4)]
        for shift, jitter in ((0.05, 0.01), (0.0, 0.0))
    ]
    want = ttest_rel(ends[0], ends[1]).confidence_interval(0.95)
    assert difference.paired is not None
    assert difference.paired.interval == pytest.approx((want.low, want.high), rel=1e-9)
    assert difference.own_loss == pytest.approx(np.mean(ends[0]))
    assert difference.other_loss == pytest.approx(np.mean(ends[1]))
    assert (difference.end_first, difference.last, difference.end_steps) == (90, 99, 10)
    assert found.verdict[0] == "Against dynamic, the loss at the end is higher for delayed."
    assert "delayed differs from dynamic, as far as 4 seeds can show." in verdict(found)
    assert "Paired by seed: the metadata give the same seed, and the first losses" in limits(found)
    assert difference.first_gap == 0


def test_the_curve_of_the_difference_is_that_of_the_pairs(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", range(3), jitter=0.02)
    paths += seeds(tmp_path, "b", range(3), recipe=DYNAMIC)
    (difference,) = compare_runs(paths, baseline="b").differences
    gaps = np.array([np.subtract(noisy(n, jitter=0.02), noisy(n)) for n in range(3)])
    assert difference.curve.step == list(range(100))
    assert difference.curve.mean == pytest.approx(gaps.mean(axis=0))
    assert difference.curve.low == pytest.approx(gaps.min(axis=0))
    assert difference.curve.high == pytest.approx(gaps.max(axis=0))


def test_no_seed_in_common_gives_welchs_interval(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", (0, 1, 2)) + seeds(tmp_path, "b", (3, 4), recipe=DYNAMIC)
    (difference,) = compare_runs(paths, baseline="b").differences
    ends = [[np.mean(noisy(n)[-10:]) for n in numbers] for numbers in ((0, 1, 2), (3, 4))]
    want = ttest_ind(ends[0], ends[1], equal_var=False).confidence_interval(0.95)
    assert difference.paired is None
    assert difference.unpaired is not None
    assert difference.unpaired.interval == pytest.approx((want.low, want.high), rel=1e-9)
    assert "no seed is in both arms" in difference.how


def test_the_users_word_decides_on_pairs(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", range(3)) + seeds(tmp_path, "b", range(3), recipe=DYNAMIC)
    assert compare_runs(paths, paired=False).differences[0].design == "unpaired"
    alone = [
        write_side(tmp_path / name, noisy(0, jitter=j)) for name, j in (("x", 0.0), ("y", 0.1))
    ]
    looked = compare_runs(alone)
    assert looked.differences[0].design == "unpaired"
    assert "the metadata of y and x give no seed, though the first losses agree" in limits(looked)
    assert "cannot be told" in verdict(looked)
    said = compare_runs(alone, paired=True)
    assert said.differences[0].pairs == [("y", "x")]
    assert "one pair of runs: no interval, so whether that is chance cannot be told" in verdict(
        said
    )


@pytest.mark.parametrize(
    ("first", "metadata", "design"),
    [
        (1.009, {}, "paired"),
        (1.011, {}, "unpaired"),
        (1.0, {"data": "other"}, "unpaired"),
        (math.nan, {}, "unpaired"),
    ],
)
def test_a_seed_alone_makes_no_pair(
    first: float, metadata: dict[str, Any], design: str, tmp_path: Path
) -> None:
    base = {"seed": 0, "data": "books"}
    losses = noisy(0)
    own = write_side(tmp_path / "a", losses, metadata=base)
    other = [losses[0] / first, *losses[1:]]
    second = write_side(tmp_path / "b", other, metadata=base | metadata, recipe=DYNAMIC)
    found = compare_runs([own, second])
    assert found.differences[0].design == design
    if design == "unpaired":
        assert "Not paired, though a seed is the same" in limits(found)


def test_first_losses_of_other_steps_cannot_tell(tmp_path: Path) -> None:
    own = write_side(tmp_path / "a", noisy(0), metadata={"seed": 0})
    other = write_side(
        tmp_path / "b", noisy(0)[10:], steps=range(10, 100), metadata={"seed": 0}, recipe=DYNAMIC
    )
    found = compare_runs([own, other])
    assert found.differences[0].design == "unpaired"
    assert "the first losses of b and a are of other steps (10 and 0)" in limits(found)


def test_runs_without_a_partner_are_named_and_left_out(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", (0, 1, 2)) + seeds(tmp_path, "b", (1, 2, 3), recipe=DYNAMIC)
    found = compare_runs(paths, baseline="a")
    assert found.differences[0].pairs == [("b/seed-1", "a/seed-1"), ("b/seed-2", "a/seed-2")]
    assert "Without a partner, and left out: b/seed-3 and a/seed-0." in limits(found)


def test_one_pair_gets_facts_and_no_interval(tmp_path: Path) -> None:
    base = noisy(0, steps=200)
    own = list(base)
    own[150:153] = [value + 3.0 for value in own[150:153]]
    own[180] += 0.001
    paths = [
        write_side(tmp_path / name, losses, metadata={"seed": 0}, recipe=recipe)
        for name, losses, recipe in (("a", base, DYNAMIC), ("b", own, DELAYED))
    ]
    found = compare_runs(paths)
    (parting,) = found.differences[0].partings
    usual = float(np.median(np.abs(np.diff(base))))
    gaps = np.abs(np.subtract(own, base))
    assert parting.usual_change == pytest.approx(usual)
    assert (parting.beyond, parting.first_beyond) == (int(np.sum(gaps > usual)), 150) == (3, 150)
    assert parting.furthest == int(np.argmax(gaps))
    assert parting.furthest_by == pytest.approx(3.0)
    assert (parting.own_spikes, parting.other_spikes) == ([150], [])
    assert "in b alone at step 150" in verdict(found)
    assert found.verdict[0] == (
        "Against a, the loss at the end is not to be judged for b (one pair of runs). "
        "Spikes of the loss that a does not have at the same steps: b (1)."
    )
    assert not any("differs from" in line for line in found.verdict)
    assert found.differences[0].interval is None


def test_pairs_whose_losses_do_not_move_together_are_doubted(tmp_path: Path) -> None:
    base, alike = noisy(0, steps=300), noisy(0, steps=300, jitter=0.005)
    other = [base[0], *noisy(1, steps=300)[1:]]
    paths = [
        write_side(tmp_path / name, losses, metadata={"seed": 0, "lr": name})
        for name, losses in (("a", base), ("b", alike), ("c", other))
    ]
    found = compare_runs(paths)
    for difference, losses in zip(found.differences, (alike, other), strict=True):
        want = spearman(np.diff(losses), np.diff(base))
        assert difference.partings[0].together == pytest.approx(want)
    assert "The losses of c and a do not rise and fall together" in limits(found)
    assert "The losses of b and a do not" not in limits(found)


def test_a_label_that_keeps_seeds_apart_is_said(tmp_path: Path) -> None:
    paths = [
        write_side(tmp_path / name, noisy(n), metadata={"seed": n, "label": name})
        for n, name in enumerate("ab")
    ]
    assert "b and a differ in their seeds and in metadata label alone" in limits(
        compare_runs(paths)
    )


def test_equal_losses_are_called_so(tmp_path: Path) -> None:
    paths = [
        write_side(tmp_path / name, noisy(0), metadata={"seed": 0}, recipe=recipe)
        for name, recipe in (("a", DYNAMIC), ("b", DELAYED))
    ]
    assert "The losses of b and a are equal in every digit at all 100 common steps." in verdict(
        compare_runs(paths)
    )


def test_a_loss_that_is_not_finite_is_said_and_is_null(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", (0, 1)) + seeds(tmp_path, "b", (0,), recipe=DYNAMIC)
    broken = [*noisy(1)[:95], math.nan, math.inf, *noisy(1)[97:]]
    paths.append(
        write_side(tmp_path / "b" / "seed-1", broken, metadata={"seed": 1}, recipe=DYNAMIC)
    )
    found = compare_runs(paths, baseline="a")
    assert "The loss of b/seed-1 is NaN or Inf at 2 steps, first at 95." in found.verdict
    assert "of 2 seeds the loss is not finite, that of b with 1" in verdict(found)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["differences"][0]["paired"]["mean"] is None
    assert data["nonfinite"]["b"] == [95, 96]
    assert data["differences"][0]["curve"]["mean"][95] is None
    assert data["curves"]["b"]["mean"][95] is None


def test_only_common_steps_are_compared(tmp_path: Path) -> None:
    dense = write_side(tmp_path / "dense", noisy(0), metadata={"seed": 0})
    losses = noisy(0, shift=0.1)
    sparse = write_side(
        tmp_path / "sparse", losses[:60:10], steps=range(0, 60, 10), metadata={"seed": 0},
        recipe=DYNAMIC, status="interrupted",
    )  # fmt: skip
    found = compare_runs([dense, sparse])
    (difference,) = found.differences
    assert (difference.steps, difference.first, difference.last) == (6, 0, 50)
    assert difference.curve.step == [0, 10, 20, 30, 40, 50]
    assert difference.paired is not None
    assert difference.paired.mean == pytest.approx(losses[50] - noisy(0)[50])
    said = limits(found)
    assert "dense to step 99 and sparse to step 50" in said
    assert "sparse and dense recorded losses at different steps: compared are the 6" in said
    assert "sparse: The run was interrupted." in said


def test_planted_steps_do_not_count_as_the_end(tmp_path: Path) -> None:
    losses = noisy(0)
    losses[95] = 50.0
    paths = [
        write_side(tmp_path / name, values, metadata={"seed": 0}, recipe=recipe, planted=planted)
        for name, values, recipe, planted in (
            ("a", noisy(0), DYNAMIC, ()), ("b", losses, DELAYED, [95]))
    ]  # fmt: skip
    assert compare_runs(paths).differences[0].own_loss == pytest.approx(
        np.mean(np.delete(losses, 95)[-10:])
    )


def test_runs_without_losses_or_common_steps_are_not_compared(tmp_path: Path) -> None:
    with_loss = write_side(tmp_path / "a", noisy(0), metadata={"seed": 0})
    without = write_side(tmp_path / "b", [None] * 5, metadata={"seed": 0}, recipe=DYNAMIC)
    later = write_side(tmp_path / "c", noisy(0)[:5], steps=range(500, 505))
    begun = write_side(tmp_path / "d", [], status="running")
    found = compare_runs([with_loss, without, later, begun])
    for name in "bcd":
        said = f"{name} and a recorded no loss at any common step: losses are not compared."
        assert said in found.verdict
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_differs_is_listed_leaf_by_leaf_and_nothing_else(tmp_path: Path) -> None:
    override = {"match": "mlp.down_proj", "input": {"scaling": "delayed"}}
    switched = {"match": "mlp.down_proj", "input": {"scaling": "dynamic"}}
    first = write_side(
        tmp_path / "a", noisy(0), recipe={**DELAYED, "override": [override]},
        metadata={"seed": 0, "lr": 1e-3, "model": {"layers": 2, "width": 64}},
        environment=TORCH, cadence=Cadence(casts=Every(1)),
    )  # fmt: skip
    second = write_side(
        tmp_path / "b", noisy(0), recipe={**DELAYED, "override": [switched]},
        metadata={"seed": 0, "lr": 1e-3, "model": {"layers": 4, "width": 64}},
        environment={**TORCH, "torch": "2.12"}, cadence=Cadence(casts=Every(10)), world_size=2,
    )  # fmt: skip
    found = compare_runs([first, second])
    assert {(s.where, s.name): tuple(s.values.values()) for s in found.settings} == {
        ("recipe", "override mlp.down_proj input"): ("delayed", "dynamic"),
        ("metadata", "model.layers"): ("2", "4"),
        ("environment", "torch"): ("2.13", "2.12"),
        ("run", "ranks"): ("1", "2"),
        ("run", "recorded steps"): ("each", "every 10"),
    }
    assert "recipe override mlp.down_proj input: delayed → dynamic" in verdict(found)
    assert "b and a differ in more than one thing" in limits(found)


def test_roles_that_change_alike_are_one_line_with_what_one_kind_alone_has(tmp_path: Path) -> None:
    paths = [
        write_side(tmp_path / name, noisy(0), metadata={"seed": 0}, recipe=recipe)
        for name, recipe in (("a", DYNAMIC), ("b", DELAYED))
    ]
    (setting,) = compare_runs(paths).settings
    assert setting.change("b", "a") == "recipe input, weight: dynamic → delayed (history_len 16)"


@pytest.mark.parametrize("plain", [True, False])
def test_no_recipe_is_one_difference(tmp_path: Path, plain: bool) -> None:
    hp = write_side(tmp_path / "hp", noisy(0), recipe=None, casts={}, metadata={"seed": 0})
    header = json.loads((hp / "run.json").read_text())
    (hp / "run.json").write_text(json.dumps(header | {"plain": plain}))
    found = compare_runs([hp, *seeds(tmp_path, "delayed", (0,))])
    said = "seed-0 against hp: recipe: none in the log → FP8, delayed scaling."
    assert found.verdict[1] == said
    unknown = "hp: no cast and no recipe is in the log; whether FP8 was used is not in it either."
    assert ("hp: without FP8, by design." in found.limits) == plain
    assert (unknown in found.limits) == (not plain)


def test_a_recipe_that_cast_nothing_is_a_warning(tmp_path: Path) -> None:
    paths = [
        write_side(tmp_path / "a", noisy(0), metadata={"seed": 0}),
        write_side(tmp_path / "b", noisy(0), casts={}, recipe=DYNAMIC, metadata={"seed": 0}),
    ]
    assert "b: no FP8, although there is a recipe" in limits(compare_runs(paths))


def test_sites_are_those_of_the_casts_and_ranked_by_difference(tmp_path: Path) -> None:
    clamped = {DOWN: {3: (5, 0.5), 7: (2, 0.1)}, UP: {4: (1, 0.01)}}
    paths = [
        write_side(tmp_path / "a", noisy(0), casts=clamped, metadata={"seed": 0}),
        write_side(
            tmp_path / "b", noisy(0), casts={DOWN: {}, UP: {4: (9, 0.9)}, "head": {}},
            recipe=DYNAMIC, metadata={"seed": 0},
        ),
    ]  # fmt: skip
    found = compare_runs(paths)
    assert [row.fqn for row in found.sites] == [UP, DOWN, "head"]
    down = found.sites[1].arms["a"]
    assert down is not None
    assert (down.casts, down.clamped_casts, down.saturated) == (100, 2, 7)
    assert down.clamp_error == pytest.approx(0.3)
    assert down.clamp_error_a_cast == pytest.approx(0.6 / 100)
    assert down.overshoot == 2.0
    assert down.underflow_share == pytest.approx(0.01)
    other = found.sites[1].arms["b"]
    assert other is not None
    assert (other.clamp_error, other.overshoot) == (None, None)
    assert found.sites[0].difference == pytest.approx((0.9 - 0.01) / 100)
    assert found.sites[2].arms["a"] is None
    assert "1 site is only in b (head input): another model, or left out by a recipe." in (
        found.limits
    )
    assert "a 8 elements, in 1.5 % of its recorded casts; b 9 elements, in 0.333 %" in verdict(
        found
    )
    assert any("does not show" in line for line in found.limits)


def test_counts_of_several_seeds_are_means_a_run(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", (0, 1), casts={DOWN: {3: (5, 0.5)}})
    paths += seeds(tmp_path, "b", (0,), casts={DOWN: {}}, recipe=DYNAMIC)
    paths += seeds(tmp_path, "b", (1,), casts={DOWN: {8: (4, 0.2)}}, recipe=DYNAMIC)
    (row,) = compare_runs(paths).sites
    assert row.arms["b"] is not None
    assert (row.arms["b"].saturated, row.arms["b"].clamped_casts) == (2, 0.5)
    assert row.arms["b"].clamp_error == pytest.approx(0.2)


def test_nothing_clamped_is_one_sentence_without_a_caution(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", (0,)) + seeds(tmp_path, "b", (0,), recipe=DYNAMIC)
    found = compare_runs(paths)
    assert "Nothing was clamped in any run." in found.verdict
    assert not any("does not show" in line for line in found.limits)


def test_nothing_clamped_is_of_the_recorded_casts_where_not_all_were(tmp_path: Path) -> None:
    cadence = Cadence(casts=Every(10))
    paths = seeds(tmp_path, "a", (0,)) + seeds(tmp_path, "b", (0,), recipe=DYNAMIC, cadence=cadence)
    said = compare_runs(paths).verdict
    assert "Nothing was clamped in the recorded casts of any run." in said
    assert not any("in any run" in line for line in said)


def test_of_several_arms_none_is_called_higher_that_may_be_chance(tmp_path: Path) -> None:
    """The same three pairs, alone and among three arms."""
    gaps = [0.010, 0.013, 0.008]
    p = ttest_rel(gaps, np.zeros(3)).pvalue
    assert 0.05 / 3 < p < 0.05
    base = seeds(tmp_path, "m0", range(3))
    higher = [
        write_side(tmp_path / "m1" / f"seed-{n}", noisy(n, shift=gaps[n]),
                   metadata={"seed": n, "margin": 1})
        for n in range(3)
    ]  # fmt: skip
    said = verdict(compare_runs([*base, *higher], baseline="m0"))
    assert "the loss at the end is higher for m1." in said
    assert "m1 differs from m0, as far as 3 seeds can show" in said
    others = [
        path
        for n in (2, 3)
        for path in seeds(tmp_path, f"m{n}", range(3), jitter=0.01 * n, metadata={"margin": n})
    ]
    said = verdict(compare_runs([*base, *higher, *others], baseline="m0"))
    assert "higher for m1 (which among 3 comparisons may be chance)" in said
    assert "differs from m0" not in said


def test_long_values_that_differ_late_differ_and_show_where(tmp_path: Path) -> None:
    folder = "/cluster/projects/language-models/data/english/cleaned/deduplicated/shards/" * 3
    assert len(folder) > 200
    paths = [
        write_side(tmp_path / name, noisy(0), metadata={"seed": 0, "data": f"{folder}part-{name}"})
        for name in "ab"
    ]
    (setting,) = compare_runs(paths).settings
    assert setting.values == {"a": f"{folder}part-a", "b": f"{folder}part-b"}
    before, after = setting.change("b", "a").split(" → ")
    assert before.endswith("shards/part-a")
    assert after.endswith("shards/part-b")
    assert max(map(len, setting.shown.values())) <= 80


def test_arms_of_many_values_that_differ_in_the_last_one_differ(tmp_path: Path) -> None:
    paths = [
        write_side(tmp_path / arm / f"seed-{n}", noisy(n), recipe=recipe,
                   metadata={"seed": n, "host": f"node-{n}-{arm if n == 8 else ''}"})
        for arm, recipe in (("a", DYNAMIC), ("b", DELAYED))
        for n in range(9)
    ]  # fmt: skip
    assert any(s.name == "host" for s in compare_runs(paths).settings)


def test_limits_of_the_runs_are_said(tmp_path: Path) -> None:
    paths = [
        write_side(tmp_path / "whole", noisy(0), metadata={"seed": 0}),
        write_side(
            tmp_path / "seen", noisy(0), metadata={"seed": 0}, observed=True, world_size=8,
            notes=["The override 'nope' matched no layer."], cadence=Cadence(casts=Every(10)),
        ),
    ]  # fmt: skip
    said = limits(compare_runs(paths))
    assert "seen: This run was only observed" in said
    assert "seen: The override 'nope' matched no layer." in said
    assert "Counts of sites are of recorded casts only: whole at each step and seen at" in said
    assert "different numbers of ranks (whole 1 and seen 8)" in said


def test_a_single_arm_has_a_spread_and_no_comparison(tmp_path: Path) -> None:
    found = compare_runs(seeds(tmp_path, "a", range(3)))
    assert found.differences == []
    assert found.verdict[0].startswith("All 3 runs are seeds of one arm (0, 1, 2)")
    assert list(found.curves) == [row.name for row in found.runs]


def test_several_arms_say_how_many_were_compared(tmp_path: Path) -> None:
    paths = [
        path
        for margin in range(4)
        for path in seeds(
            tmp_path, f"m{margin}", range(3), jitter=0.01 * margin, metadata={"margin": margin}
        )
    ]
    found = compare_runs(paths, baseline="m0")
    assert "3 comparisons with m0 were made" in limits(found)


def test_the_baseline_is_an_arm_or_a_run_of_it(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "a", (0, 1)) + seeds(tmp_path, "b", (0, 1), recipe=DYNAMIC)
    for name in ("b", "b/seed-1", str(paths[3])):
        assert compare_runs(paths, baseline=name).baseline == "b"
    with pytest.raises(UnclampError, match="'nope'; the arms are 'a', 'b'"):
        compare_runs(paths, baseline="nope")


def test_a_run_that_cannot_be_read_is_named_and_the_rest_is_compared(tmp_path: Path) -> None:
    paths = [write_planted(tmp_path / name, steps=20) for name in "abc"]
    (paths[1] / "run.json").write_bytes(b"damaged")
    found = compare_runs(paths)
    assert list(found.arms) == ["a", "c"]
    assert found.limits[0].startswith("b cannot be read: ")
    with pytest.raises(RunLogError, match="nothing to compare, only a can be read: b cannot be"):
        compare_runs(paths[:2])


def test_a_run_with_a_damaged_part_is_compared_without_it(tmp_path: Path) -> None:
    paths = [write_planted(tmp_path / name, steps=20) for name in "ab"]
    (part,) = (paths[1] / "casts").glob("*.parquet")
    part.write_bytes(b"damaged")
    with pytest.warns(UnclampWarning, match="is damaged and left out"):
        found = compare_runs(paths)
    assert list(found.arms) == ["a", "b"]
    assert any("b: casts/" in limit and "damaged" in limit for limit in found.limits)
