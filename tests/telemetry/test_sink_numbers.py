"""The numbers that sinks send, against what the rows say."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp.runlog import Columns
from unclamp.telemetry.sinks import (
    Histogram,
    SiteInfo,
    histograms,
    per_site,
    site_infos,
    summarise,
)
from unclamp.telemetry.sinks.numbers import choose

ROLES = ["input", "weight", "grad_output"]
SITES = site_infos(
    {
        "site": [0, 1, 2, 3],
        "fqn": ["layers.0.up", "layers.0.up", "layers.0.up", "head"],
        "role": [*ROLES, "input"],
        "format": ["e4m3fn", "e4m3fn", "e5m2", "e4m3fn"],
        "scaling": ["delayed"] * 4,
        "format_max": [448.0, 448.0, 57344.0, 448.0],
    }
)
CASTS: Columns = {
    "step": np.full(4, 7),
    "site": np.arange(4, dtype=np.int32),
    "amax": np.array([2, 1, 4, 8], dtype=np.float32),
    "scale": np.array([448, 448, 14336, 28], dtype=np.float32),
    "elements": np.array([100, 50, 100, 10]),
    "saturated": np.array([3, 0, 0, 2]),
    "underflowed": np.array([10, 0, 20, 9]),
    "nonfinite": np.array([0, 0, 1, 0]),
    "recast": np.array([0, 1, 0, 0]),
    "saturated_error": np.array([0.25, 0.0, 0.0, 0.5]),
    "microsteps": np.ones(4, dtype=np.int32),
}
STEPS: Columns = {
    "step": [7],
    "loss": [2.5],
    "grad_norm": [None],
    "lr": [0.1],
    "time_s": [1.0],
    "step_ms": [20.0],
    "scalars": [[("accuracy", 0.5)]],
}


def test_the_step_gives_its_known_numbers_and_the_users() -> None:
    numbers = summarise(SITES, STEPS, None)
    assert numbers == {"loss": 2.5, "lr": 0.1, "step_ms": 20.0, "accuracy": 0.5}


def test_what_is_only_counted_is_in_no_number_of_the_model() -> None:
    """They are those without its rows; its own numbers are sent where a glob asks for them."""
    sites = SITES | {3: replace(SITES[3], only_counted=True)}
    without = {name: column[:3] for name, column in CASTS.items()}
    assert summarise(sites, STEPS, CASTS) == summarise(SITES, STEPS, without)
    assert summarise(sites, STEPS, CASTS) != summarise(SITES, STEPS, CASTS)
    alone = {name: column[3:] for name, column in CASTS.items()}
    assert summarise(sites, STEPS, alone) == summarise(sites, STEPS, None)
    assert per_site(sites, CASTS, {3}) == per_site(SITES, CASTS, {3})


def test_a_nan_loss_stays_a_nan_loss() -> None:
    numbers = summarise({}, {"step": [0], "loss": [math.nan]}, None)
    assert list(numbers) == ["loss"]
    assert math.isnan(numbers["loss"])


def test_the_casts_give_the_models_numbers() -> None:
    numbers = summarise(SITES, {"step": [7]}, CASTS)
    whole = {name: value for name, value in numbers.items() if name.count("/") == 1}
    assert whole == {
        "unclamp/saturated": 5,
        "unclamp/clamped_casts": 2,
        "unclamp/recast": 1,
        "unclamp/nonfinite": 1,
        "unclamp/underflow_share": 39 / 260,
        "unclamp/clamp_error_max": 0.5,
        "unclamp/overshoot_max": 2.0,
    }


def test_each_role_has_its_own_numbers() -> None:
    numbers = summarise(SITES, {"step": [7]}, CASTS)
    assert numbers["unclamp/input/saturated"] == 5
    assert numbers["unclamp/input/underflow_share"] == 19 / 110
    assert numbers["unclamp/weight/recast"] == 1
    assert numbers["unclamp/weight/clamp_error_max"] == 0
    assert numbers["unclamp/grad_output/nonfinite"] == 1
    assert numbers["unclamp/grad_output/overshoot_max"] == 1.0


def test_a_role_that_was_not_cast_has_no_numbers() -> None:
    inputs = {name: values[:1] for name, values in CASTS.items()}
    numbers = summarise(SITES, {"step": [7]}, inputs)
    assert "unclamp/input/saturated" in numbers
    assert not any("weight" in name for name in numbers)


def test_no_rows_of_casts_give_no_numbers_of_casts() -> None:
    assert summarise(SITES, {"step": [0]}, {"step": [], "site": []}) == {}
    assert summarise({}, {"step": [0]}, {}) == {}


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ([None, 30.0, 20.0, None], 20.0),
        ([None, math.inf, None, None], math.inf),
        ([math.nan, 30.0, math.inf, None], 30.0),
        ([None] * 4, None),
    ],
)
def test_the_least_sqnr_leaves_out_what_was_not_inspected(recorded, expected) -> None:
    numbers = summarise(SITES, {"step": [7]}, {**CASTS, "sqnr_db": recorded})
    assert numbers.get("unclamp/sqnr_db_min") == expected


@pytest.mark.parametrize(
    ("recorded", "expected"), [([None, None, 0.4, None], 0.4), ([None] * 4, None)]
)
def test_the_largest_change_of_a_weights_gradient_is_sent_where_it_was_measured(
    recorded, expected
) -> None:
    numbers = summarise(SITES, {"step": [7]}, {**CASTS, "grad_error": recorded})
    assert numbers.get("unclamp/grad_error_max") == expected
    assert numbers.get("unclamp/grad_output/grad_error_max") == expected
    assert "unclamp/weight/grad_error_max" not in numbers


def test_an_infinite_scale_of_an_all_zero_tensor_has_no_overshoot() -> None:
    one = {name: values[:1] for name, values in CASTS.items()}
    numbers = summarise(SITES, {"step": [7]}, {**one, "amax": [0.0], "scale": [math.inf]})
    assert "unclamp/overshoot_max" not in numbers


def test_empty_tensors_have_no_underflow_share() -> None:
    one = {name: values[:1] for name, values in CASTS.items()}
    numbers = summarise(SITES, {"step": [7]}, {**one, "elements": [0], "underflowed": [0]})
    assert "unclamp/underflow_share" not in numbers
    assert per_site(SITES, {**one, "elements": [0]}, {0}).keys() == {
        "unclamp/sites/layers.0.up/input/clamp_error",
        "unclamp/sites/layers.0.up/input/overshoot",
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), min_size=1, max_size=12))
def test_the_roles_add_up_to_the_model(rows: list[tuple[int, int]]) -> None:
    sites, counts = zip(*rows, strict=True)
    zeros = [0.0] * len(rows)
    known = dict.fromkeys(("amax", "scale", "saturated_error", "recast", "nonfinite"), zeros)
    casts = {
        **known,
        "site": sites,
        "saturated": counts,
        "underflowed": counts,
        "elements": [100] * len(rows),
    }
    numbers = summarise(SITES, {"step": [0]}, casts)
    for name in ("saturated", "clamped_casts"):
        parts = [numbers.get(f"unclamp/{role}/{name}", 0) for role in ROLES]
        assert sum(parts) == numbers[f"unclamp/{name}"]
    assert numbers["unclamp/saturated"] == sum(counts)


def test_chosen_sites_have_series_of_their_own() -> None:
    chosen = choose(SITES, ["layers.*"])
    assert chosen == {0, 1, 2}
    numbers = per_site(SITES, CASTS, chosen)
    assert numbers["unclamp/sites/layers.0.up/input/clamp_error"] == 0.25
    assert numbers["unclamp/sites/layers.0.up/input/overshoot"] == 2.0
    assert numbers["unclamp/sites/layers.0.up/grad_output/underflow_share"] == 0.2
    assert len(numbers) == 9
    assert per_site(SITES, CASTS, set()) == per_site(SITES, None, chosen) == {}


def test_a_root_modules_site_is_named_by_its_role() -> None:
    root = SiteInfo(
        site=0, fqn="", role="input", format="e4m3fn", scaling="dynamic", format_max=448.0
    )
    one = {name: values[:1] for name, values in CASTS.items()}
    assert "unclamp/sites/input/overshoot" in per_site({0: root}, one, {0})


@pytest.mark.parametrize("entry", [{-3: 5, 0: 7}, [(-3, 5), (0, 7)]])
def test_exponents_become_a_histogram_between_powers_of_two(entry) -> None:
    casts = {**CASTS, "exponents": [None, entry, None, entry]}
    found = histograms(SITES, casts, {0, 1})
    assert list(found) == ["unclamp/sites/layers.0.up/weight/exponents"]
    (histogram,) = found.values()
    assert isinstance(histogram, Histogram)
    assert histogram.counts.tolist() == [5, 0, 0, 7]
    assert histogram.edges.tolist() == [-3, -2, -1, 0, 1]


def test_casts_without_exponents_have_no_histograms() -> None:
    assert histograms(SITES, CASTS, {0}) == histograms(SITES, None, {0}) == {}
    assert histograms(SITES, {**CASTS, "exponents": [{}, None, None, None]}, {0}) == {}


def test_sites_come_in_pieces_or_not_at_all() -> None:
    piece = {
        "site": [9],
        "fqn": ["x"],
        "role": ["input"],
        "format": ["e5m2"],
        "scaling": ["dynamic"],
        "format_max": [57344.0],
        "granularity": ["tensor"],
    }
    assert site_infos() == site_infos({}) == {}
    assert [site.fqn for site in site_infos({**piece, "site": [8]}, piece).values()] == ["x", "x"]
