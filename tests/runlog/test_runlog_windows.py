"""Windows equal sums made by hand, by name over ranks, and leave nothing behind."""

from collections import defaultdict
from pathlib import Path

import pytest

from truths.rows import cast_row, columns
from unclamp.runlog import Cut, Header, RunLog, RunLogWriter

NAMES = {(0, 0): "a", (0, 2): "b", (1, 1): "b", (1, 3): "c"}


def write(path: Path, steps: range) -> list[dict]:
    """Write two ranks that share the site b, and return all rows of casts."""
    header = Header(unclamp_version="0", world_size=2, run_id="1")
    written = []
    for rank in range(2):
        ids = {site: fqn for (r, site), fqn in NAMES.items() if r == rank}
        with RunLogWriter(path, header=header, rank=rank) as writer:
            same = {"role": "input", "format": "e4m3fn", "scaling": "delayed", "format_max": 448.0}
            writer.add("sites", columns([{"site": s, "fqn": f, **same} for s, f in ids.items()]))
            for step in steps:
                writer.add("steps", {"step": [step], "time_s": [0.0]})
                rows = [
                    cast_row(step, site, rank=rank, saturated=(step + site) % 3,
                             saturated_error=(step % 7) / 8 if (step + site) % 3 else 0.0,
                             amax=1.0 + step + site, scale=0.5 + rank)
                    for site in ids
                ]  # fmt: skip
                writer.add("casts", columns(rows))
                written += rows
    return written


@pytest.mark.parametrize(
    ("steps", "cut"),
    [
        (range(5, 25), Cut(first=5, size=3, count=7, from_summaries=False)),
        (range(2100), Cut(first=0, size=300, count=7, from_summaries=True)),
    ],
)
def test_windows_add_up_the_ranks_of_a_name(tmp_path: Path, steps: range, cut: Cut) -> None:
    written = write(tmp_path / "run", steps)
    with RunLog.open(tmp_path / "run") as log:
        windows = log.windows(most=7)
    assert windows.cut == cut
    assert [(site.fqn, site.site) for site in windows.sites] == [("a", 0), ("b", 1), ("c", 3)]
    groups = defaultdict(list)
    for row in written:
        fqn = NAMES[row["rank"], row["site"]]
        groups["abc".index(fqn), (row["step"] - cut.first) // cut.size].append(row)
    found = {(row["place"], row["cell"]): row for row in windows.rows.to_pylist()}
    assert found.keys() == groups.keys()
    for key, rows in groups.items():
        errors = [row["saturated_error"] for row in rows]
        worst = [row["step"] for row in rows if row["saturated_error"] == max(errors) > 0]
        expected = {
            "steps": len(rows),
            "clamped": sum(row["saturated"] > 0 for row in rows),
            "saturated": sum(row["saturated"] for row in rows),
            "elements": len(rows),
            "amax_max": max(row["amax"] for row in rows),
            "scaled_amax_max": max(row["amax"] * row["scale"] for row in rows),
            "scale_min": min(row["scale"] for row in rows),
            "scale_max": max(row["scale"] for row in rows),
            "saturated_error_sum": sum(errors),
            "saturated_error_max": max(errors),
            "worst_step": min(worst, default=None),
        }
        assert {name: found[key][name] for name in expected} == expected


def test_windows_leave_no_table_and_a_run_without_casts_has_none(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        writer.flush()
        with RunLog.open(tmp_path / "run") as log:
            before = log.sql("SELECT table_name FROM duckdb_tables()").to_pylist()
            windows = log.windows()
            assert (windows.cut.count, windows.cut.steps, windows.rows.num_rows) == (0, [], 0)
            assert log.sql("SELECT table_name FROM duckdb_tables()").to_pylist() == before == []
