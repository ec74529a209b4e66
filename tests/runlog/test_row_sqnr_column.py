"""Logs that were written before there was a ratio by row are read, with nothing in its place."""

from pathlib import Path

from unclamp.report.recorded import read_run
from unclamp.runlog import RunLog

OLD = Path(__file__).parent / "data" / "schema-1" / "stages"


def test_an_old_log_has_no_ratio_by_row() -> None:
    with RunLog.open(OLD) as log:
        assert set(log.casts()["sqnr_row_median_db"].to_pylist()) == {None}
        record, _ = read_run(log)
    assert record.sites
    assert {site.sqnr_row_db_min for site in record.sites} == {None}
