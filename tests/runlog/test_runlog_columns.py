"""What the reader tells about columns, types and itself."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from truths.rows import cast_row, columns, step
from unclamp.runlog import SUMMARY_STEPS, TABLES, VIEWS, Header, RunLog, RunLogWriter

PAGE = Path(__file__).parents[2] / "docs" / "runlog.md"
HEADER = Header(unclamp_version="0.1.0", world_size=2)


def tables_of_columns() -> str:
    """Return the part of the page that the schema decides."""
    text = ""
    for name in (*TABLES, *VIEWS):
        rows = [row for row in RunLog.columns().to_pylist() if row["table"] == name]
        lines = [f"| `{row['column']}` | {row['type']} | {row['meaning']} |" for row in rows]
        text += "\n".join(
            [f"### `{name}`", "", "| column | type | meaning |", "|---|---|---|", *lines]
        )
        text += "\n\n"
    return text.replace("|x|", "abs(x)").strip()  # a bar would end the cell


def test_the_page_lists_every_column_with_its_meaning():
    found = re.search(r"## Columns\n\n(.*)", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1].strip() == tables_of_columns()


def test_columns_are_described_by_table_type_and_meaning():
    described = RunLog.columns().to_pylist()
    assert len(described) == sum(map(len, {**TABLES, **VIEWS}.values()))
    assert described[0] == {
        "table": "steps",
        "column": "step",
        "type": "int64",
        "meaning": "optimizer step, from the recorder's count",
    }
    types = {(row["table"], row["column"]): row["type"] for row in described}
    assert types["steps", "loss"] == "double, may be null"
    assert SUMMARY_STEPS == 100


def test_a_log_says_what_it_holds_and_never_raises(tmp_path: Path):
    with (
        RunLogWriter(tmp_path / "run", header=HEADER, rank=1) as other,
        RunLogWriter(tmp_path / "run", header=HEADER) as writer,
    ):
        log = RunLog.open(tmp_path / "run")
        assert (
            repr(log) == f"RunLog({str(tmp_path / 'run')!r}: running, 0 steps, 0 sites, ranks none)"
        )
        for each in (other, writer):
            each.add("steps", step(0))
            each.flush()
    assert repr(log).endswith(": finished, 1 step, 0 sites, ranks 0-1)")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "is gone" in repr(log)
    log.close()
    assert "is gone" in repr(log)


def test_sums_of_counts_are_integers_where_they_fit(tmp_path: Path):
    rows = [cast_row(number, 0, elements=2**62, saturated=3) for number in range(2)]
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        writer.add("casts", columns(rows))
    with RunLog.open(tmp_path) as log:
        sums = log.sql("SELECT sum(saturated) AS fits, sum(elements) AS does_not FROM casts")
        assert sums.schema.field("fits").type == pa.int64()
        assert sums["fits"].to_pylist() == [6]
        assert pa.types.is_decimal(sums.schema.field("does_not").type)
        assert int(sums["does_not"][0].as_py()) == 2**63
        assert log.sql("SELECT sum(saturated) AS none FROM casts WHERE step > 9")[
            "none"
        ].to_pylist() == [None]
        fraction = log.sql("SELECT 1.5::DECIMAL(3, 1) AS x")
        assert pa.types.is_decimal(fraction.schema.field("x").type)


@pytest.mark.parametrize(
    "data",
    ["{}", "not json", '{"sites": 7}', '{"sites": [1, null, {"fqn": "a"}]}', '{"sites": {}}'],
)
def test_events_that_are_no_switch_of_a_site_are_no_row(tmp_path: Path, data: str):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        writer.add("events", {"step": [0], "kind": ["switch"], "data": [data]})
    with RunLog.open(tmp_path) as log:
        assert (log.switches().num_rows, log.switches().schema) == (0, VIEWS["switches"])
