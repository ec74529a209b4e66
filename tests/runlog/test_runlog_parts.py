"""Names of parts, and which of them count."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp.runlog.parts import ROW_GROUP_ROWS, PartName, parts_that_count, write_part
from unclamp.runlog.schema import to_arrow

numbers = st.integers(0, 10**9)


@given(rank=numbers, first=numbers, more=numbers, is_merged=st.booleans())
def test_a_name_says_what_it_was_made_of(rank: int, first: int, more: int, is_merged: bool):
    last = first + more if is_merged else first
    name = PartName(rank=rank, first=first, last=last, is_merged=is_merged)
    assert PartName.parse(str(name)) == name


@pytest.mark.parametrize(
    "name", ["x.parquet", ".part-r0-000000.parquet.tmp", "part-r0-1-2-3.parquet"]
)
def test_other_files_are_no_parts(name: str):
    assert PartName.parse(name) is None


@pytest.mark.parametrize(
    ("held", "counted"),
    [
        ([], []),
        (["r0-000001", "r0-000000", "r1-000000"], ["r0-000000", "r0-000001", "r1-000000"]),
        (["r0-000000", "r0-000001", "r0-000000-000001"], ["r0-000000-000001"]),
        (["r0-000000", "r0-000000-000000"], ["r0-000000-000000"]),
        (["r0-000000-000003", "r0-000002-000003", "r0-000003"], ["r0-000000-000003"]),
        (["r1-000002", "r0-000000-000003"], ["r0-000000-000003", "r1-000002"]),
        (["r0-1000000", "r0-999999"], ["r0-999999", "r0-1000000"]),
        (["r10-000000", "r9-000000"], ["r9-000000", "r10-000000"]),
    ],
)
def test_a_part_inside_another_does_not_count(tmp_path: Path, held: list[str], counted: list[str]):
    for name in held:
        (tmp_path / f"part-{name}.parquet").touch()
    (tmp_path / ".part-r0-000000.parquet.tmp").touch()
    assert [p.name for p in parts_that_count(tmp_path)] == [f"part-{n}.parquet" for n in counted]


def test_a_parquet_file_of_another_name_counts(tmp_path: Path):
    for name in ("a.parquet", "part-r0-000000.parquet"):
        (tmp_path / name).touch()
    assert [p.name for p in parts_that_count(tmp_path)] == ["part-r0-000000.parquet", "a.parquet"]


def test_a_folder_that_does_not_exist_has_no_parts(tmp_path: Path):
    assert parts_that_count(tmp_path / "nowhere") == []


def test_a_listing_that_missed_a_merge_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "part-r0-000000-000001.parquet").touch()
    listings = iter([set(), {tmp_path / "part-r0-000000-000001.parquet"}])  # the first is torn
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: next(listings, glob(self, pattern)))
    assert [p.name for p in parts_that_count(tmp_path)] == ["part-r0-000000-000001.parquet"]


def test_long_parts_have_row_groups_with_bounds_of_integers_only(tmp_path: Path):
    rows = ROW_GROUP_ROWS + 1
    part = to_arrow("steps", {"step": range(rows), "time_s": [0.0] * rows}, rank=0)
    write_part(tmp_path / "part.parquet", part)
    metadata = pq.ParquetFile(tmp_path / "part.parquet").metadata
    assert metadata.num_row_groups == 2
    step, time_s = metadata.row_group(1).column(0), metadata.row_group(1).column(5)
    assert (step.path_in_schema, step.statistics.min) == ("step", ROW_GROUP_ROWS)
    assert (time_s.path_in_schema, time_s.statistics) == ("time_s", None)
