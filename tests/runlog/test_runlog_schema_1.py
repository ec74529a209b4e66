"""Logs of schema 1 are read: one rank, ranks alike, and ranks whose ids stand for other modules.

What they must say is added up here from their Parquet files, each with the rank of its name.
"""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from truths.rows import assert_summaries_are_those_of_casts
from unclamp.analysis import associate
from unclamp.names import SiteName
from unclamp.report import build_view
from unclamp.runlog import TABLES, Cadence, Every, RunLog

LOGS = Path(__file__).parent / "data" / "schema-1"


def rows_of(run: Path, table: str) -> list[dict]:
    """Return the rows of a table, each with the rank that its file is named for."""
    rows = []
    for part in sorted((run / table).glob("*.parquet")):
        rank = int(re.findall(r"part-r(\d+)", part.name)[0])
        rows += [row | {"rank": rank} for row in pq.ParquetFile(part).read().to_pylist()]
    return rows


def saturated_by_name(run: Path) -> dict[tuple[str, str], int]:
    """Return the saturated elements of each fqn and role."""
    names = {(s["rank"], s["site"]): (s["fqn"], s["role"]) for s in rows_of(run, "sites")}
    total: dict[tuple[str, str], int] = defaultdict(int)
    for cast in rows_of(run, "casts"):
        total[names[cast["rank"], cast["site"]]] += cast["saturated"]
    return dict(total)


@pytest.mark.parametrize("name", ["observed", "alike", "stages"])
@pytest.mark.parametrize("join", ["site", "rank, site"])
def test_casts_and_sites_join_by_id_whatever_the_ranks(name: str, join: str) -> None:
    query = f"""SELECT fqn, role, sum(saturated) AS saturated FROM casts JOIN sites USING ({join})
        GROUP BY ALL"""
    with RunLog.open(LOGS / name) as log:
        rows = log.sql(query).to_pylist()
        assert log.sites().schema == TABLES["sites"]
    found = {(row["fqn"], row["role"]): row["saturated"] for row in rows}
    assert found == saturated_by_name(LOGS / name)
    assert sum(found.values()) > 0


@pytest.mark.parametrize("name", ["observed", "alike", "stages"])
@pytest.mark.parametrize("is_summed", [True, False])
def test_summaries_and_windows_are_those_of_the_casts(
    tmp_path: Path, name: str, is_summed: bool
) -> None:
    run = shutil.copytree(LOGS / name, tmp_path / "run")
    if not is_summed:
        shutil.rmtree(run / "summaries")
    with RunLog.open(run) as log:
        unknown = ("sqnr_row_median_db_min", "sqnr_row_steps") if is_summed else ()
        assert_summaries_are_those_of_casts(log, unknown=unknown)
        windows = log.windows()
        for (fqn, role), saturated in saturated_by_name(run).items():
            rows = log.casts(SiteName(fqn, role))  # type: ignore[arg-type]
            assert sum(rows["saturated"].to_pylist()) == saturated
    found = defaultdict(int)
    for row in windows.rows.to_pylist():
        site = windows.sites[row["place"]]
        found[site.fqn, site.role] += row["saturated"]
    assert found == saturated_by_name(run)


def test_what_a_recorder_knew_becomes_fields_and_leaves_the_users_metadata() -> None:
    with RunLog.open(LOGS / "observed") as log:
        header = log.header
    assert header.cadence == Cadence(casts=Every(2, or_clamped=True), inspect=Every(4))
    assert header.observed
    assert header.metadata == {"note": "mine"}


def test_metadata_that_no_recorder_wrote_stay(tmp_path: Path) -> None:
    run = shutil.copytree(LOGS / "alike", tmp_path / "run")
    given = {"cadence": "allegro", "observed": "by night"}
    header = json.loads((run / "run.json").read_text()) | {"metadata": given}
    (run / "run.json").write_text(json.dumps(header))
    with RunLog.open(run) as log:
        assert (log.header.cadence, log.header.observed) == (None, False)
        assert log.header.metadata == given


def test_a_part_of_another_name_holds_for_all_ranks(tmp_path: Path) -> None:
    run = shutil.copytree(LOGS / "alike", tmp_path / "run")
    (run / "sites" / "part-r1-000000-000000.parquet").unlink()
    (run / "sites" / "part-r0-000000-000000.parquet").rename(run / "sites" / "all.parquet")
    with RunLog.open(run) as log:
        assert log.sites()["rank"].to_pylist() == [0, 1, 0, 1]
        assert log.sql("FROM casts JOIN sites USING (site)").num_rows == log.casts().num_rows


def test_stages_of_a_pipeline_have_a_page_and_an_association() -> None:
    view = build_view(LOGS / "stages")
    assert view.run is not None
    by_name = {(site.fqn, site.role): site.saturated for site in view.run.sites}
    assert by_name == saturated_by_name(LOGS / "stages")
    with RunLog.open(LOGS / "stages") as log:
        assert {site.fqn for site in associate(log).sites} == {"first", "third"}
