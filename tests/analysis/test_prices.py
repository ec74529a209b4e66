"""What casts cost by site, against sums over planted rows in plain Python."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from unclamp.analysis import SitePrice, cast_prices
from unclamp.names import SiteName
from unclamp.runlog import Header, RunLog, RunLogWriter

SITES = [SiteName("up", "input"), SiteName("up", "weight"), SiteName("up", "grad_output")]
INPUT, WEIGHT, GRADIENT = SITES


def write(path: Path, rows: Sequence[dict], *, ranks: int = 1) -> Path:
    header = Header(unclamp_version="test", world_size=ranks)
    for rank in range(ranks):
        with RunLogWriter(path, header=header, rank=rank) as writer:
            ids = [rank + ranks * number for number in range(3)]
            writer.add("sites", {"site": ids, "fqn": [s.fqn for s in SITES],
                                 "role": [s.role for s in SITES], "format": ["e4m3fn"] * 3,
                                 "scaling": ["delayed"] * 3,
                                 "format_max": [448.0] * 3})  # fmt: skip
            for step in range(10):
                writer.add("steps", {"step": [step], "loss": [2.0], "time_s": [float(step)]})
            for row in rows:
                if row.get("rank", 0) == rank:
                    site = rank + ranks * row["site"]
                    shifted = row | {"site": site, "rank": rank}
                    writer.add("casts", {name: [value] for name, value in shifted.items()})
    return path


def cast(step: int, site: SiteName, price: float | None, *, clamped: int = 1, **more) -> dict:
    return {
        "step": step, "site": SITES.index(site), "amax": 1.0, "scale": 1.0, "elements": 100,
        "saturated": clamped, "underflowed": 0, "nonfinite": 0, "recast": 0,
        "saturated_error": 0.1 if clamped else 0.0, "microsteps": 1, "price_clamp": price, **more,
    }  # fmt: skip


def found(path: Path, **settings) -> dict[SiteName, SitePrice]:
    with RunLog.open(path) as log:
        return cast_prices(log, **settings).by_name


ROWS = [
    cast(1, INPUT, 0.25),
    cast(1, WEIGHT, -0.5),
    cast(2, INPUT, 0.75),
    cast(2, GRADIENT, None),
    cast(3, INPUT, None),
    cast(4, INPUT, 0.75, price_rounding=-0.125),
    cast(5, INPUT, 0.0, clamped=0, price_rounding=0.5),
    cast(6, INPUT, None, clamped=0),
]


def test_each_site_has_its_sum_its_worst_step_and_what_is_not_known(tmp_path: Path):
    sites = found(write(tmp_path / "run", ROWS))
    assert list(sites) == [INPUT, WEIGHT]
    assert sites[INPUT] == SitePrice(
        name=INPUT, steps=3, unknown=1, low=1, clamp=1.75, worst=0.75, worst_step=2,
        rounding_steps=2, rounding=0.375,
    )  # fmt: skip
    assert sites[WEIGHT] == SitePrice(name=WEIGHT, steps=1, clamp=-0.5, worst=-0.5, worst_step=1)


def test_some_steps_are_told_apart(tmp_path: Path):
    sites = found(write(tmp_path / "run", ROWS), steps=[1, 3])
    assert sites[INPUT] == SitePrice(
        name=INPUT, steps=1, unknown=1, clamp=0.25, worst=0.25, worst_step=1
    )


def test_a_price_is_the_mean_over_ranks_and_unknown_where_one_is(tmp_path: Path):
    rows = [
        cast(1, INPUT, 0.5), cast(1, INPUT, None, clamped=0, rank=1),
        cast(2, INPUT, 0.5), cast(2, INPUT, 1.0, rank=1),
        cast(3, INPUT, 9.0), cast(3, INPUT, None, rank=1),
    ]  # fmt: skip
    site = found(write(tmp_path / "run", rows, ranks=2))[INPUT]
    assert (site.clamp, site.worst, site.worst_step) == (1.0, 0.75, 2)
    assert (site.steps, site.unknown) == (2, 1)


def test_sentences_name_the_costliest_and_say_what_is_not_known(tmp_path: Path):
    with RunLog.open(write(tmp_path / "run", ROWS)) as log:
        first, second = cast_prices(log).words()
    assert "up input: 0.75 at step 2, 1.75 in 3 steps" in first
    assert "weight" not in first
    assert second == (
        "In 1 of these 4 steps of sites some gradient clamped as well, so that their prices are "
        "too small; 1 step of a site that clamped has no price."
    )


@pytest.mark.parametrize("rows", [ROWS, []])
def test_a_log_from_before_there_were_prices_has_none(tmp_path: Path, rows: list[dict]):
    path = write(tmp_path / "run", rows)
    for part in (path / "casts").rglob("*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["price_clamp", "price_rounding"]), part)
    with RunLog.open(path) as log:
        prices = cast_prices(log)
    assert all(site.worst is None and site.rounding_steps == 0 for site in prices.sites)
    assert prices.words() == []
