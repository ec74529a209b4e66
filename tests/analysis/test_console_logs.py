"""Logs of other people's tools: each shape is printed here, with one spike at record 200."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from unclamp.analysis import find_spikes, read_curve
from unclamp.analysis.curve_files import is_csv
from unclamp.cli import app
from unclamp.errors import AnalysisError

RECORDS, ONSET = 300, 200


def losses() -> list[float]:
    noise = np.random.default_rng(5).standard_normal(RECORDS)
    loss = (2 + 7 * np.exp(-np.arange(RECORDS) / 30)) * (1 + 0.01 * noise)
    loss[ONSET : ONSET + 3] *= [1.5, 1.9, 1.4]
    return loss.tolist()


def megatron(loss: float, i: int) -> str:
    return (
        f" [2024-03-01 10:00:00] iteration {i + 1:8d}/{RECORDS:8d} | consumed samples: "
        f"{64 * (i + 1):12d} | elapsed time per iteration (ms): 812.3 | learning rate: "
        f"1.000000E-04 | global batch size:    64 | lm loss: {loss:.6E} | mtp_1 loss: 9.9E+00 | "
        f"loss scale: 1.0 | grad norm: {loss / 4:.3f} | number of nan iterations:   0 |"
    )


def torchtitan(loss: float, i: int) -> str:
    return (
        f"[rank0]:[titan] 2025-06-23 13:13:00,153 - root - INFO - \x1b[31mstep: {i + 1:2d}  "
        f"\x1b[32mloss: {loss:7.4f}  \x1b[38;2;180;60;0mgrad_norm: {loss / 4:7.4f}  "
        "\x1b[36mmemory:  0.51GiB(0.54%)  tps: 21,234  mfu: 0.03%\x1b[39m"
    )


def trainer(loss: float, i: int) -> str:
    bar = f"\r {i}%|##  | {i}/300 [00:01<00:09, 1.2it/s]" if i % 7 == 3 else ""
    record = {"loss": round(loss, 4), "grad_norm": loss / 4, "learning_rate": 1e-4, "epoch": 0.1}
    return bar + str(record)


def trainer_of_strings(loss: float, i: int) -> str:
    return str({"loss": f"{loss:.4g}", "grad_norm": "1.5", "epoch": f"{i / 100:.2f}"})


def nanogpt(loss: float, i: int) -> str:
    evaluation = f"step {i}: train loss {loss:.4f}, val loss {loss + 5:.4f}\n" if not i % 50 else ""
    return f"{evaluation}iter {i}: loss {loss:.4f}, time 312.20ms, mfu 40.12%"


def llmc(loss: float, i: int) -> str:
    return (
        f"step {i + 1:4d}/{RECORDS} | loss {loss:.6f} (+0.21z)| norm {loss / 4:.4f} (-0.32z)| "
        "lr 6.00e-04 | 322.10 ms | 52.1% bf16 MFU | 1627000 tok/s"
    )


def write(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "first", "has_norm"),
    [(megatron, 1, True), (torchtitan, 1, True), (trainer, 0, True),
     (trainer_of_strings, 0, True), (nanogpt, 0, False), (llmc, 1, True)],
)  # fmt: skip
def test_a_console_log_has_its_spike(
    tmp_path: Path, line: Callable[[float, int], str], first: int, has_norm: bool
) -> None:
    header = ["using world size: 8, data-parallel size: 8", "> building tokenizer ...", ""]
    path = write(tmp_path / "log", header + [line(x, i) for i, x in enumerate(losses())])
    curve = read_curve(path)
    assert curve.steps.tolist() == list(range(first, first + RECORDS))
    assert curve.series["loss"] == pytest.approx(losses(), rel=1e-3)
    assert ("grad_norm" in curve.series) is has_norm
    (spike,) = find_spikes(curve.series["loss"], steps=curve.steps)
    assert (spike.onset, spike.peak) == (first + ONSET, first + ONSET + 1)


def test_lines_of_evaluations_are_left_out_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [nanogpt(x, i) for i, x in enumerate(losses())])
    assert read_curve(path).notes == ["6 lines of evaluations were left out."]
    assert (
        "6 lines of evaluations were left out."
        in CliRunner().invoke(app, ["spikes", str(path)]).stdout
    )
    only = write(tmp_path / "only", ["step 0: train loss 3.5, val loss 4.5"])
    assert read_curve(only).series == {"loss": [3.5]}


@pytest.mark.parametrize(
    "line",
    ["Test: [0/3] Loss 9.0", "Validation | step 49 | loss 9.0", "[val] step 2 loss 9.0",
     "| valid | epoch 001 | valid on 'valid' subset | loss 9.0 | ppl 8", "Eval step 2 loss 9.0",
     "Evaluating: step 2: loss=9.0", "dev epoch 1 loss 9.0", "Validation {'loss': 9.0}"],
)  # fmt: skip
def test_a_word_before_the_numbers_says_that_a_line_evaluates(tmp_path: Path, line: str) -> None:
    lines = [f"step {i} loss {x:.3f}" for i, x in enumerate([2.0, 1.9, 1.8])]
    curve = read_curve(write(tmp_path / "log", [lines[0], line, *lines[1:], line]))
    assert curve.series["loss"] == [2.0, 1.9, 1.8]
    assert curve.notes == ["2 lines of evaluations were left out."]


@pytest.mark.parametrize(
    "prefix",
    ["/data/test/train.log:", "test.py:12 -", "my-test-run |", "[latest]", "INFO validate-me"],
)
def test_a_part_of_a_name_says_nothing_of_evaluations(tmp_path: Path, prefix: str) -> None:
    lines = [f"{prefix} step {i} loss 2.5" for i in range(3)]
    curve = read_curve(write(tmp_path / "log", ["step 7 loss 2.5", *lines]))
    assert curve.steps.tolist() == [0, 1, 2]
    went_back = "The step went back 1 time (from step 7 to 0): 1 record was dropped"
    assert [note.partition(",")[0] for note in curve.notes] == [went_back]  # of no evaluation


@pytest.mark.parametrize(
    "first",
    ["lr 1e-4, optimizer adamw, cross-entropy loss", "Using MSE loss", "Starting from, step",
     "the loss, the step", '{"config": 1}', "{'loss': 'mse'}", "hello"],
)  # fmt: skip
def test_the_first_line_of_a_console_is_no_header(tmp_path: Path, first: str) -> None:
    # The body has as many cells as some of the first lines: cells are not numbers.
    body = [f"step {i}, lr 1e-4, loss {3 - i / 100:.2f}" for i in range(40)]
    for lines in (body, [line.replace(", lr 1e-4", "") for line in body]):
        curve = read_curve(write(tmp_path / "log", [first, "", *lines]))
        assert curve.source == "console log log"
        assert curve.steps.tolist() == list(range(40))
        assert curve.series["loss"] == [round(3 - i / 100, 2) for i in range(40)]


@pytest.mark.parametrize("row", ["0,2.5,", "0,NA,1", ",,", "nan,inf,x"])
def test_a_header_with_numbers_below_is_csv(row: str) -> None:
    assert is_csv(f"step,loss,note\n\n{row}\n")
    assert is_csv("step,loss\n")
    assert not is_csv("step,loss\n0\n")


def test_json_lines_that_are_cut_off_are_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ['{"step": 5, "loss": 2.5}', '{"step": 6, "loss": 2'])
    curve = read_curve(path)
    assert (curve.source, curve.series["loss"]) == ("JSON file a.jsonl", [2.5])


def test_a_loss_without_a_value_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ["step,loss,grad_norm", "0,,1", "1,NA,2"])
    with pytest.raises(AnalysisError, match=r"column 'loss' of .*CSV file a.csv, has no value"):
        read_curve(path)
    assert read_curve(path, column="grad_norm").series == {"loss": [1.0, 2.0]}


def test_nan_and_words_on_a_console(tmp_path: Path) -> None:
    lines = ["INFO step: 1 loss: 2.5 max valid tokens: 7", "the loss is nan now", "step 2 loss NaN",
             "{'loss': nan, 'step': 3}", "{'loss': broken}", "train step 4: loss -inf"]  # fmt: skip
    curve = read_curve(write(tmp_path / "log", lines))
    assert curve.steps.tolist() == [1, 2, 3, 4]
    assert [str(value) for value in curve.series["loss"]] == ["2.5", "nan", "nan", "-inf"]


def epochs_csv(path: Path) -> Path:
    rows = [f"{i // 60},{i % 60},{loss:.5f}" for i, loss in enumerate(losses())]
    return write(path, ["epoch,step,loss", *rows])


def mmdet(path: Path) -> Path:
    lines = [json.dumps({"env_info": "sys.platform: linux", "seed": 0})]
    for i, loss in enumerate(losses()):
        epoch, iteration = i // 60 + 1, 50 * (i % 60 + 1)
        lines.append(json.dumps({"mode": "train", "epoch": epoch, "iter": iteration,
                                 "loss_cls": loss / 2, "loss": round(loss, 5)}))  # fmt: skip
        if iteration == 3000:
            lines.append(json.dumps({"mode": "val", "epoch": epoch, "iter": 640, "mAP": 0.3}))
    return write(path, lines)


@pytest.mark.parametrize(
    ("make", "place"), [(epochs_csv, "epoch 3, step 20"), (mmdet, "epoch 4, iter 1050")]
)
def test_steps_counted_anew_in_each_epoch_are_all_used(
    tmp_path: Path, make: Callable[[Path], Path], place: str
) -> None:
    curve = read_curve(make(tmp_path / "log"))
    assert curve.steps.tolist() == list(range(RECORDS))
    (spike,) = find_spikes(curve.series["loss"], steps=curve.steps)
    assert (spike.onset, spike.peak) == (ONSET, ONSET + 1)
    assert curve.places[ONSET] == place
    left_out = ["5 records of evaluations were left out."] if make is mmdet else []
    assert list(curve.notes) == left_out
    arguments = ["spikes", str(tmp_path / "log")]
    done = CliRunner().invoke(app, arguments)
    assert place in done.stdout
    assert all(note in done.stdout for note in left_out)
    (record,) = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (record["onset"], record["place"]) == (ONSET, place)


def test_a_resumed_run_with_epochs_still_went_back(tmp_path: Path) -> None:
    """Within an epoch, steps that go back are those of a resumed run, counted anew or not."""
    through = ["0,0,9", "0,1,8", "1,2,7", "1,3,6", "0,1,5", "1,2,4"]
    curve = read_curve(write(tmp_path / "through.csv", ["epoch,step,loss", *through]))
    assert curve.steps.tolist() == [0, 1, 2]
    assert curve.series["loss"] == [9, 5, 4]
    anew = ["0,0,9", "0,1,8", "1,0,7", "1,1,6", "1,0,5", "2,0,4"]
    curve = read_curve(write(tmp_path / "anew.csv", ["epoch,step,loss", *anew]))
    assert curve.series["loss"] == [9, 8, 5, 4]
    assert curve.places[2:] == ["epoch 1, step 0", "epoch 2, step 0"]


def test_two_columns_of_one_name_are_refused_with_both(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", ["step,loss,loss", "0,9,2", "1,8,3"])
    with pytest.raises(AnalysisError, match=r"'loss \(column 2\)', 'loss \(column 3\)'"):
        read_curve(path)
    assert read_curve(path, column="loss (column 3)").series == {"loss": [2, 3]}
    spelled = write(tmp_path / "two.csv", ["step,train/loss,train_loss", "0,9,2"])
    with pytest.raises(AnalysisError, match=r"'train/loss', 'train_loss'"):
        read_curve(spelled)


def test_two_runs_in_one_export_are_refused_with_the_choices(tmp_path: Path) -> None:
    header = '"Step","bf16 - train/loss","bf16 - train/loss__MIN","fp8 - train/loss"'
    path = write(tmp_path / "log.csv", [header, '"0","9.97","9.97",""', '"1","","","9.5"'])
    with pytest.raises(AnalysisError, match=r"\['bf16 - train/loss', 'fp8 - train/loss'\]"):
        read_curve(path)
