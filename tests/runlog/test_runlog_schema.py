import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp.errors import RunLogError
from unclamp.runlog import TABLES, Cadence, Every, Header, Status
from unclamp.runlog.schema import to_arrow

STEP = {"step": [1, 2], "time_s": [0.5, 1.0]}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=3)
statuses: st.SearchStrategy[Status] = st.sampled_from(
    ["running", "finished", "interrupted", "failed"]
)

everies = st.builds(Every, st.integers(1, 1000), or_clamped=st.booleans())
cadences = st.builds(Cadence, casts=everies, inspect=st.none() | everies)


@given(
    header=st.builds(
        Header,
        unclamp_version=st.text(),
        status=statuses,
        world_size=st.integers(1, 4096),
        recipe=st.none() | json_objects,
        environment=json_objects,
        git_commit=st.none() | st.text(),
        metadata=json_objects,
        kind=st.just("unclamp-run"),
        cadence=st.none() | cadences,
        observed=st.booleans(),
        schema_version=st.just(2),
    )
)
def test_header_survives_json(header: Header):
    assert Header.from_dict(json.loads(json.dumps(header.to_dict()))) == header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "not a run"),
        ({"schema_version": 3, "unclamp_version": "9.9"}, r"unclamp 9\.9 with schema version 3"),
        ({"status": "tired"}, "status must be one of"),
    ],
)
def test_header_of_something_else_is_refused(change: dict[str, object], message: str):
    with pytest.raises(RunLogError, match=message):
        Header.from_dict(Header(unclamp_version="0.1").to_dict() | change)


def test_header_with_a_key_missing_is_refused():
    data = Header(unclamp_version="0.1").to_dict()
    del data["world_size"]
    with pytest.raises(RunLogError, match="lacks \\['world_size'\\]"):
        Header.from_dict(data)


def test_a_users_metadata_of_the_same_name_stay_the_users():
    given = {"cadence": {"casts": {"steps": 20}}, "observed": True}
    header = Header(unclamp_version="0.1", metadata=given)
    read = Header.from_dict(json.loads(json.dumps(header.to_dict())))
    assert (read.metadata, read.cadence, read.observed) == (given, None, False)


@pytest.mark.parametrize("cadence", [3, "x", {"casts": None}, {"casts": {"steps": "x"}}])
def test_a_cadence_that_is_none_is_not_known(cadence: object):
    data = Header(unclamp_version="0.1").to_dict() | {"cadence": cadence}
    assert Header.from_dict(data).cadence is None


def test_header_ignores_unknown_keys():
    header = Header(unclamp_version="0.1")
    assert Header.from_dict(header.to_dict() | {"later": 1}) == header


def test_every_column_says_what_it_means():
    for schema in TABLES.values():
        assert all(column.metadata[b"meaning"] for column in schema)


def test_missing_nullable_columns_are_null_and_a_missing_rank_is_the_writers():
    rows = to_arrow("steps", STEP, rank=3)
    assert rows["rank"].to_pylist() == [3, 3]
    assert rows["loss"].to_pylist() == rows["scalars"].to_pylist() == [None, None]


def test_nan_stays_nan():
    rows = to_arrow("steps", STEP | {"loss": np.array([np.nan, np.inf])}, rank=0)
    assert repr(rows["loss"].to_pylist()) == "[nan, inf]"


def test_no_columns_are_no_rows():
    assert to_arrow("casts", {}, rank=0).num_rows == 0


def test_rows_share_no_memory_with_the_caller():
    step = np.array([1, 2], dtype=np.int64)
    rows = to_arrow("steps", STEP | {"step": step}, rank=0)
    step[:] = 9
    assert rows["step"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (STEP | {"los": [1.0, 2.0]}, r"no column \['los'\]"),
        (STEP | {"loss": [1.0]}, "equal lengths"),
        ({"step": [1]}, "'time_s' of 'steps' needs a value"),
        (STEP | {"step": [1, None]}, "'step' of 'steps' needs a value"),
        (STEP | {"step": np.array([1.0, 2.5])}, "'step' of 'steps' must hold int64"),
        (STEP | {"loss": ["a", "b"]}, "'loss' of 'steps' must hold double"),
        ({"step": 1, "time_s": 0.5}, "must be sequences"),
        ({"step": np.array(1), "time_s": np.array(0.5)}, "must be sequences"),
    ],
)
def test_rows_that_do_not_fit_are_refused(columns: dict, message: str):
    with pytest.raises(RunLogError, match=message):
        to_arrow("steps", columns, rank=0)


def test_runlog_does_not_import_torch():
    code = "import sys, unclamp.runlog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
