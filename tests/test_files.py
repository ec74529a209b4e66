"""Files: whole or absent, and JSON that every parser reads."""

import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp.files import strict, to_json, write_atomically, write_json

DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


@given(DATA)
def test_what_is_written_is_json_and_says_the_same_but_for_nan_and_inf(data: Any) -> None:
    read = json.loads(to_json(data), parse_constant=refuse)
    # By Python's own dialect, with its words for NaN and Inf read as nothing.
    assert read == json.loads(json.dumps(data), parse_constant=lambda name: None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_null_wherever_it_stands(value: float) -> None:
    assert strict({1: (value, [value]), "a": value}) == {"1": [None, [None]], "a": None}


@pytest.mark.parametrize("data", [{"a": object()}, {1, 2}, b"bytes", [1j]])
def test_what_json_cannot_hold_is_refused(data: object) -> None:
    with pytest.raises(TypeError, match="expected data that JSON can hold"):
        to_json(data)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": math.nan})
    assert path.read_text() == '{\n "b": null\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def write_often(path: Path, letter: str) -> None:
    for _ in range(50):
        write_atomically(path, 100_000 * letter.encode())


def test_processes_that_write_one_file_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    spawned = multiprocessing.get_context("spawn")
    writers = [spawned.Process(target=write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert path.read_bytes() in (100_000 * b"a", 100_000 * b"b")
    assert list(tmp_path.iterdir()) == [path]
