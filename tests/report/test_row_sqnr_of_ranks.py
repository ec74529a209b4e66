"""Ranks may number their sites differently: figures of a site are joined by rank and id."""

from pathlib import Path

from unclamp.names import SiteName
from unclamp.report.recorded import read_run
from unclamp.runlog import Header, RunLog, RunLogWriter

UP, DOWN = SiteName("up", "input"), SiteName("down", "input")
DECIBEL = {(0, UP): 30.0, (0, DOWN): 11.5, (1, UP): 27.25, (1, DOWN): 14.0}


def test_the_ratio_by_row_goes_to_the_site_of_its_rank(tmp_path: Path) -> None:
    for rank, order in enumerate(([UP, DOWN], [DOWN, UP])):
        header = Header(unclamp_version="test", world_size=2)
        with RunLogWriter(tmp_path / "run", header=header, rank=rank) as writer:
            writer.add("sites", {"site": [0, 1], "fqn": [name.fqn for name in order],
                                 "role": ["input"] * 2, "format": ["e4m3fn"] * 2,
                                 "scaling": ["delayed"] * 2,
                                 "format_max": [448.0] * 2})  # fmt: skip
            writer.add("casts", {
                "step": [0, 0], "site": [0, 1], "amax": [1.0] * 2, "scale": [1.0] * 2,
                "elements": [10] * 2, "saturated": [0] * 2, "underflowed": [0] * 2,
                "nonfinite": [0] * 2, "recast": [0] * 2, "microsteps": [1] * 2,
                "saturated_error": [0.0] * 2,
                "sqnr_row_median_db": [DECIBEL[rank, name] for name in order],
            })  # fmt: skip
    with RunLog.open(tmp_path / "run") as log:
        record, _ = read_run(log)
    assert {site.name: site.sqnr_row_db_min for site in record.sites} == {UP: 27.25, DOWN: 11.5}
