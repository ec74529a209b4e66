import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unclamp.errors import RunLogError, UnclampWarning
from unclamp.runlog import TABLES, Header, RunLog, RunLogWriter, find_runs, is_run

HEADER = Header(unclamp_version="0.1.0", world_size=2, metadata={"seed": 1})


def step(number: int) -> dict[str, list]:
    return {"step": [number], "time_s": [float(number)]}


def site(number: int) -> dict[str, list]:
    return {
        "site": [number],
        "fqn": [f"layers.{number}"],
        "role": ["input"],
        "format": ["e4m3fn"],
        "scaling": ["dynamic"],
        "format_max": [448.0],
    }


def cast(number: int, site: int) -> dict[str, list]:
    floats = {"amax": [1.5], "scale": [2.0], "saturated_error": [0.0]}
    counts = ("elements", "saturated", "underflowed", "nonfinite", "recast", "microsteps")
    return {"step": [number], "site": [site]} | floats | {count: [1] for count in counts}


def write_run(path: Path, *steps: int) -> Path:
    with RunLogWriter(path, header=HEADER) as writer:
        for number in steps:
            writer.add("steps", step(number))
    return path


def values(dtype: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_map(dtype):
        return st.dictionaries(values(dtype.key_type), values(dtype.item_type), max_size=3)
    if pa.types.is_struct(dtype):
        return st.fixed_dictionaries({field.name: values(field.type) for field in dtype})
    if pa.types.is_floating(dtype):
        return st.floats(width=dtype.bit_width, allow_nan=False)  # type: ignore[arg-type]
    if pa.types.is_boolean(dtype):
        return st.booleans()
    if pa.types.is_integer(dtype):
        return st.integers(-(2 ** (dtype.bit_width - 1)), 2 ** (dtype.bit_width - 1) - 1)
    return st.text()


def row_of(table: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            c.name: values(c.type) | st.none() if c.nullable else values(c.type)
            for c in TABLES[table]
        }
    )


batches = st.sampled_from(list(TABLES)).flatmap(
    lambda table: st.tuples(st.just(table), st.lists(row_of(table), max_size=4), st.booleans())
)


def order_of(table: str, row: dict[str, Any]) -> tuple:
    names = {"sites": ["site"], "casts": ["step", "rank", "site"]}.get(table, ["step", "rank"])
    return tuple(row[name] for name in names)


def flags_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, bool]:
    same = [other for other in rows if all(other[key] == row[key] for key in ("rank", "site"))]
    return {flag: any(other[flag] for other in same) for flag in ("replicated", "only_counted")}


TWO_NAMES = [
    {"site": 0, "rank": 0, "fqn": fqn, "role": "input", "format": "e4m3fn", "scaling": "delayed",
     "history_len": None, "granularity": None, "format_max": 448.0, "replicated": said,
     "only_counted": None}
    for fqn, said in (("a", True), ("b", None))
]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(batches, max_size=6))
@example([("sites", TWO_NAMES, False)])
def test_what_was_written_is_read_back(batches: list[tuple[str, list[dict], bool]]):
    written: dict[str, list[dict]] = {table: [] for table in TABLES}
    with TemporaryDirectory() as folder:
        with RunLogWriter(folder, header=HEADER) as writer:
            for table, rows, is_flushed in batches:
                columns = {name: [row[name] for row in rows] for name in TABLES[table].names}
                writer.add(table, columns)
                written[table] += rows
                if is_flushed:
                    writer.flush()
        with RunLog.open(folder) as log:
            read = {table: getattr(log, table)() for table in TABLES}
    for table, rows in written.items():
        assert read[table].schema == TABLES[table]
        found = [
            {k: dict(v) if isinstance(v, list) else v for k, v in row.items()}
            for row in read[table].to_pylist()
        ]
        if table == "sites":  # one row each, however often it was recorded
            # Flags are of a rank's id: said once, they hold in all its rows. What nobody said is
            # neither, as in logs from before there were such columns.
            said = [row | flags_of(row, rows) for row in rows]
            distinct = {frozenset(row.items()) for row in said}
            assert {frozenset(row.items()) for row in found} == distinct
            assert [row["site"] for row in found] == sorted(dict(row)["site"] for row in distinct)
        else:
            assert found == sorted(rows, key=lambda row: order_of(table, row))


def test_header_is_read_back_and_follows_the_run(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER):
        log = RunLog.open(tmp_path)
        assert log.header == HEADER
    assert log.header.status == "finished"


def test_an_empty_run_has_empty_tables_with_all_columns(tmp_path: Path):
    with RunLog.open(write_run(tmp_path)) as log:
        for table, schema in TABLES.items():
            rows = getattr(log, table)()
            assert (rows.num_rows, rows.schema) == (0, schema)
            assert log.sql(f"FROM {table}").column_names == schema.names


def test_new_parts_show_up_while_the_run_goes_on(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer, RunLog.open(tmp_path) as log:
        for number in range(3):
            assert log.steps().num_rows == number
            writer.add("steps", step(number))
            writer.flush()
        assert log.sql("SELECT max(step) AS last FROM steps").to_pylist() == [{"last": 2}]


def test_two_ranks_read_as_one_run(tmp_path: Path):
    with (
        RunLogWriter(tmp_path, header=HEADER, rank=1) as other,  # it may well be the first
        RunLogWriter(tmp_path, header=HEADER, rank=0) as writer,
    ):
        for each in (other, writer):
            each.add("sites", site(7))
            each.add("casts", cast(0, 7))
        other.flush()
    with RunLog.open(tmp_path) as log:
        assert log.casts()["rank"].to_pylist() == [0, 1]
        assert log.sites()["rank"].to_pylist() == [0, 1]
        assert [info.site for info in log.named_sites()] == [7]
        assert log.sql("FROM casts JOIN sites USING (rank, site)").num_rows == 2


def test_another_rank_may_write_before_rank_0_creates_the_run(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER, rank=1) as other:
        other.add("steps", step(0))
        other.flush()
        write_run(tmp_path, 0)
    assert RunLog.open(tmp_path).steps().num_rows == 2


def test_tables_are_ordered_by_step_and_rows_of_a_step_stay_in_order(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        for number in (2, 1, 0):
            for kind in "zyx":
                writer.add("events", {"step": [number], "kind": [kind], "data": ["{}"]})
                writer.flush()
    rows = RunLog.open(tmp_path).events()
    assert rows["step"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert "".join(rows["kind"].to_pylist()) == "zyx" * 3


def test_casts_of_one_site(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        for number in (1, 0):
            for each in (0, 3):
                writer.add("casts", cast(number, each))
    log = RunLog.open(tmp_path)
    assert log.casts()["site"].to_pylist() == [0, 3, 0, 3]
    assert log.casts(site=3)["step"].to_pylist() == [0, 1]
    assert log.casts(site=9).num_rows == 0


def test_sql_takes_parameters_and_sees_nan_as_duckdb_does(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        for number, loss in enumerate([1.0, float("nan"), 9.0]):
            writer.add("steps", step(number) | {"loss": [loss], "scalars": [{"tokens": loss}]})
    log = RunLog.open(tmp_path)
    rows = log.sql("SELECT step FROM steps WHERE loss > $above ORDER BY step", above=5)
    assert rows["step"].to_pylist() == [1, 2]
    assert log.sql("SELECT step FROM steps WHERE isnan(loss)")["step"].to_pylist() == [1]
    assert log.sql("FROM steps WHERE scalars['tokens'] = 9").num_rows == 1


@pytest.mark.parametrize("query", ["SELEC", "FROM nope", "FROM query", "SELECT $x"])
def test_a_query_that_fails_says_so(tmp_path: Path, query: str):
    log = RunLog.open(write_run(tmp_path))
    with pytest.raises(RunLogError, match=r"the query on .* failed"):
        log.sql(query)


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'a"b', "[0-9]", "a*b?", "{a,b}", "$x", "100%", "été", "-x", "a;b"]
)
def test_odd_path_names_work(tmp_path: Path, name: str):
    path = write_run(tmp_path / name / "run", 0, 1)
    with RunLog.open(path) as log:
        assert log.steps().num_rows == 2
    assert find_runs(tmp_path / name) == [path]


def test_a_part_that_disappears_under_the_query_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        for number in range(2):
            writer.add("steps", step(number))
            writer.flush()
        log = RunLog.open(tmp_path)
        listed = log._list_parts()
        answers = [listed]
        list_parts = log._list_parts
        monkeypatch.setattr(log, "_list_parts", lambda: answers.pop() if answers else list_parts())
        listed["steps"][0].unlink()
        assert log.steps()["step"].to_pylist() == [1]
        writer.close("interrupted")  # without a merge, which would miss the part


def test_a_damaged_part_is_named_and_left_out(tmp_path: Path):
    write_run(tmp_path, 0)
    (tmp_path / "steps" / "part-r0-000000-000000.parquet").write_bytes(b"not parquet")
    with pytest.warns(UnclampWarning, match="part-r0-000000"):
        assert RunLog.open(tmp_path).steps().num_rows == 0


def test_a_closed_log_refuses_queries_and_closes_again(tmp_path: Path):
    log = RunLog.open(write_run(tmp_path))
    log.close()
    log.close()
    with pytest.raises(RunLogError, match="closed"):
        log.steps()


def test_a_run_that_is_gone_is_an_error_and_not_an_empty_table(tmp_path: Path):
    log = RunLog.open(write_run(tmp_path / "run", 0))
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(RunLogError, match="gone"):
        log.steps()


# What is refused


def refusal(path: Path) -> str:
    with pytest.raises(RunLogError) as caught:
        RunLog.open(path)
    return str(caught.value)


def test_no_folder_or_no_run_is_refused_with_what_is_there(tmp_path: Path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "it holds nothing" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "is a file" in refusal(tmp_path / "notes.txt")
    assert "it holds notes.txt" in refusal(tmp_path)
    run = write_run(tmp_path / "runs" / "a")
    assert str(run) in refusal(tmp_path)


def test_a_study_is_refused_with_how_to_open_it(tmp_path: Path):
    (tmp_path / "study.json").write_text("{}")
    assert "is a study" in refusal(tmp_path)
    run = write_run(tmp_path / "arm")
    assert "`unclamp report`" in refusal(tmp_path)
    assert str(run) in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff", '{"kind": "other"}', "{}"])
def test_a_foreign_run_json_is_refused(tmp_path: Path, text: str):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    assert "run.json" in refusal(tmp_path)
    assert not is_run(tmp_path)


def test_another_schema_version_is_refused_with_who_wrote_it(tmp_path: Path):
    data = HEADER.to_dict() | {"schema_version": 3, "unclamp_version": "9.9.9"}
    (tmp_path / "run.json").write_text(json.dumps(data))
    message = refusal(tmp_path)
    assert "unclamp 9.9.9" in message
    assert "install" in message
    assert is_run(tmp_path)


def test_find_runs_lists_runs_at_and_below_a_folder_sorted(tmp_path: Path):
    runs = [write_run(tmp_path / name) for name in ("b", "a/z", "a/c")]
    assert find_runs(tmp_path) == sorted(runs)
    assert find_runs(runs[0]) == [runs[0]]
    assert find_runs(tmp_path / "nowhere") == []


def test_a_part_that_links_to_nothing_is_named(tmp_path: Path):
    run = write_run(tmp_path / "run", 1, 2)
    part = run / "steps" / "part-r0-000099.parquet"
    part.symlink_to(tmp_path / "gone.parquet")
    with RunLog.open(run) as log:
        with pytest.raises(RunLogError, match="part-r0-000099"):
            log.steps()
        part.unlink()
        assert log.steps().num_rows == 2
        assert log.summaries().num_rows == 0  # its views were made although the start failed
