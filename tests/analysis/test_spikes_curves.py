"""Curves from every format: the right column, missing values, rewinds, and clear errors."""

import builtins
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from unclamp.analysis import read_curve
from unclamp.errors import AnalysisError, RunLogError
from unclamp.runlog import Header, RunLogWriter


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_run(path: Path, rows: Sequence[tuple[int, int, float | None, float | None]]) -> Path:
    """Write a run log with (step, rank, loss, grad_norm) and a scalar `reward`."""
    step, rank, loss, norm = (list(column) for column in zip(*rows, strict=True))
    count = len(rows)
    with RunLogWriter(path, header=Header(unclamp_version="0")) as writer:
        writer.add("steps", {"step": step, "rank": rank, "loss": loss, "grad_norm": norm,
                             "lr": [None] * count, "time_s": [float(i) for i in range(count)],
                             "step_ms": [None] * count,
                             "scalars": [[("reward", -1.0)]] * count})  # fmt: skip
    return path


@pytest.mark.parametrize(
    "text",
    ["step,loss\n5,2.5\n6,\n7,nan\n", "Step\tTrain/Loss\n5\t2.5\n6\tnull\n7\tNaN\n",
     "\ufefflr;global_step;train_loss;eval_loss\n1;5;2.5;9\n1;6;NA;9\n1;7;nan;9\n"],
)  # fmt: skip
def test_csv(tmp_path: Path, text: str) -> None:
    curve = read_curve(write(tmp_path / "log.csv", text))
    assert curve.steps.tolist() == [5, 7]
    first, second = curve.series["loss"]
    assert first == 2.5
    assert second is not None
    assert math.isnan(second)


def test_csv_without_steps_counts_rows(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path / "log.csv", "loss,grad_norm\n3,1\n2,\n1,4\n"))
    assert curve.steps.tolist() == [0, 1, 2]
    assert curve.series == {"loss": [3, 2, 1], "grad_norm": [1, None, 4]}


def test_column_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "step,reward,loss\n0,-1,9\n1,-2,9\n")
    curve = read_curve(path, column="reward")
    assert curve.series == {"loss": [-1, -2]}
    assert curve.columns == {"loss": "reward"}


def test_the_gradient_norm_chosen_for_the_loss_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "step,loss,grad_norm\n0,1,9\n1,2,8\n")
    assert read_curve(path, column="grad_norm").series == {"loss": [9, 8]}


def test_json_lines_nested_and_cut_off(tmp_path: Path) -> None:
    text = (
        '{"step": 1, "train": {"loss": 3.0, "grad-norm": 1.5}}\n'
        '{"step": 2, "eval": {"loss": 7.0}}\n\n'
        '{"step": 3, "train": {"loss": Infinity}}\n{"step": 4, "tra'
    )
    curve = read_curve(write(tmp_path / "log.jsonl", text))
    assert curve.steps.tolist() == [1, 3]
    assert curve.series == {"loss": [3.0, math.inf], "grad_norm": [1.5, None]}
    assert curve.columns == {"loss": "train/loss", "grad_norm": "train/grad-norm"}


@pytest.mark.parametrize("where", ["trainer_state.json", "checkpoint-20/trainer_state.json"])
def test_trainer_state_of_hugging_face(tmp_path: Path, where: str) -> None:
    history = [
        {"loss": 4.0, "grad_norm": 2.0, "step": 10},
        {"eval_loss": 3.5, "step": 10},
        {"loss": 3.0, "grad_norm": 1.0, "step": 20},
        {"train_loss": 3.6, "step": 20},
    ]
    for name in ("checkpoint-10/trainer_state.json", where):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = history[:1] if "10" in name else history
        write(tmp_path / name, json.dumps({"log_history": rows, "global_step": 20}))
    for path in (tmp_path, tmp_path / where):
        curve = read_curve(path)
        assert curve.steps.tolist() == [10, 20]
        assert curve.series == {"loss": [4.0, 3.0], "grad_norm": [2.0, 1.0]}


@pytest.mark.parametrize(
    "document", [[{"step": 1, "loss": 2}, {"step": 2, "loss": 1}], {"step": [1, 2], "loss": [2, 1]},
                 {"history": 1, "step": [1, 2], "loss": [2, 1]}]
)  # fmt: skip
def test_json_of_records_or_columns(tmp_path: Path, document: object) -> None:
    curve = read_curve(write(tmp_path / "log.json", json.dumps(document)))
    assert (curve.steps.tolist(), curve.series) == ([1, 2], {"loss": [2.0, 1.0]})


@pytest.mark.parametrize(
    ("steps", "kept"),
    [([0, 1, 2, 3, 1, 2], [(0, 0), (1, 4), (2, 5)]), ([0, 0, 1], [(0, 1), (1, 2)]),
     ([3, 2, 1], [(1, 2), (2, 1), (3, 0)]), ([0, 1, 2, 3, 2], [(0, 0), (1, 1), (2, 4)])],
)  # fmt: skip
def test_rewound_run_counts_as_recorded_last(tmp_path: Path, steps, kept) -> None:
    rows = "".join(f"{step},{i}\n" for i, step in enumerate(steps))
    curve = read_curve(write(tmp_path / "log.csv", "step,loss\n" + rows))
    assert list(zip(curve.steps.tolist(), curve.series["loss"], strict=True)) == kept


def test_run_log_is_the_mean_over_ranks_and_nan_of_one_is_nan(tmp_path: Path) -> None:
    rows = [(0, 0, 1.0, None), (0, 1, 3.0, None), (1, 0, 5.0, None), (1, 1, None, None),
            (2, 0, 1.0, 2.0), (2, 1, math.nan, 2.0)]  # fmt: skip
    curve = read_curve(write_run(tmp_path / "run", rows))
    assert curve.steps.tolist() == [0, 1, 2]
    assert curve.series["loss"][:2] == [2.0, 5.0]
    assert np.isnan(np.array(curve.series["loss"], dtype=float)).tolist() == [False, False, True]
    assert curve.series["grad_norm"] == [None, None, 2.0]


def test_rewound_run_log_counts_as_recorded_last(tmp_path: Path) -> None:
    rows = [(step, 0, loss, None) for step, loss in [(0, 9.0), (1, 8.0), (2, 7.0), (1, 5.0)]]
    curve = read_curve(write_run(tmp_path / "run", rows))
    assert (curve.steps.tolist(), curve.series) == ([0, 1], {"loss": [9.0, 5.0]})


def test_scalar_of_a_run_log_can_be_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [(0, 0, 1.0, 2.0)])
    assert read_curve(run, column="reward").series == {"loss": [-1.0], "grad_norm": [2.0]}
    assert read_curve(run, column="grad_norm").series == {"loss": [2.0]}
    with pytest.raises(AnalysisError, match="'reward'"):
        read_curve(run, column="nonsense")


def write_events(folder: Path, tag: str, values: list[float]) -> None:
    event_class = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
    summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
    writer_module = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    writer = writer_module.EventFileWriter(str(folder))
    for step, value in enumerate(values):
        summary = summaries(value=[summaries.Value(tag=tag, simple_value=value)])
        writer.add_event(event_class(step=step, wall_time=float(step), summary=summary))
    writer.close()


@pytest.mark.filterwarnings("default")  # of tensorboard, while the test writes
def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write_events(tmp_path / "one", "train/loss", [3.0, 2.0, math.nan])
    (file,) = (tmp_path / "one").iterdir()
    for path in (tmp_path, tmp_path / "one", file):
        curve = read_curve(path)
        assert curve.steps.tolist() == [0, 1, 2]
        assert curve.series["loss"][:2] == [3.0, 2.0]
        assert curve.columns == {"loss": "train/loss"}
    with pytest.raises(AnalysisError, match="train/loss"):
        read_curve(file, column="loss")
    write_events(tmp_path / "two", "loss", [1.0])
    with pytest.raises(AnalysisError, match="several runs"):
        read_curve(tmp_path)


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "events.out.tfevents.1", "")
    original = builtins.__import__

    def without(name: str, *arguments, **keywords):
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AnalysisError, match=r"unclamp\[tensorboard\]"):
        read_curve(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("1,2\n3,4\n", "name the columns"), ("", "name the columns"),
     ("step,lr\n1,2\n", "'lr'"), ("step,a_loss,b_loss\n1,2,3\n", "several columns"),
     ("step,loss\n1,abc\n", "'abc'"), ("step,loss\n1.5,2\n", "a whole step"),
     ('{"step": 1}\n{"step": 2}\n', "none"), ('{"loss": 1}\n{bad\n{"loss": 2}\n', "line 2"),
     ("[1, 2]", "found none")],
)  # fmt: skip
def test_file_without_a_curve_says_why(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(AnalysisError, match=words):
        read_curve(write(tmp_path / "log", text))


@pytest.mark.parametrize(
    ("text", "place"),
    [("step,loss\n1,2\n\n2,oops\n", "column 'loss', line 4 of"),
     ("step,loss\n,1\n2,oops\n", "column 'loss', line 3 of"),
     ("step;loss\n1;2,5\n", "line 2 of .*; decimals need a point"),
     ("step,loss\nx,2\n", "column 'step', line 2 of"),
     ('{"loss": 1}\n{"loss": "oops"}\n', "column 'loss', record 2 of")],
)  # fmt: skip
def test_a_cell_that_is_no_number_is_placed(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(AnalysisError, match=place) as caught:
        read_curve(write(tmp_path / "log", text))
    assert str(tmp_path / "log") in str(caught.value)


def test_path_without_a_curve_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="is not there"):
        read_curve(tmp_path / "nothing")
    with pytest.raises(AnalysisError, match="holds no run log"):
        read_curve(tmp_path)
    write(tmp_path / "study.json", "{}")
    with pytest.raises(RunLogError, match="is a study"):
        read_curve(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(AnalysisError, match="no text"):
        read_curve(tmp_path / "binary")
    with pytest.raises(AnalysisError, match="neither loss nor gradient norm"):
        read_curve(write_run(tmp_path / "run", [(0, 0, None, None)]))
