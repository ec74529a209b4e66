"""Which records of a file count: of one split, one run, one rank; and that all others are said."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from truths.printed import ONSET, RECORDS, ends_epoch, losses
from unclamp.analysis import find_spikes, read_curve
from unclamp.cli import app
from unclamp.errors import AnalysisError

LOSS = losses()
PLAIN = "".join(f"step {i} loss {x:.4f}\n" for i, x in enumerate(LOSS))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(header: str, record: Callable[[float, int], str]) -> str:
    return f"{header}\n" + "\n".join(record(x, i) for i, x in enumerate(LOSS)) + "\n"


def check(path: Path, **asked: str) -> list[str]:
    """Read all the records with their spike, and return what was said of others."""
    curve = read_curve(path, **asked)
    assert curve.series["loss"] == pytest.approx(LOSS, rel=1e-3)
    assert curve.steps.tolist() == list(range(RECORDS))
    (spike,) = find_spikes(curve.series["loss"], steps=curve.steps)
    assert (spike.onset, spike.peak) == (ONSET, ONSET + 1)
    return list(curve.notes)


@pytest.mark.parametrize(
    ("header", "train", "other"),
    [("step,split,loss", "{i},train,{x}", "{i},val,{y}"),
     ("step,what,loss", "{i},training,{x}", "{i},validation,{y}"),
     ("step,is_validation,loss", "{i},False,{x}", "{i},True,{y}"),
     ("step,training,loss", "{i},1,{x}", "{i},0,{y}"),
     ("step,phase,loss", "{i},fit,{x}", "{i},test,{y}"),
     ("epoch,step,loss,val_loss", "0,{i},{x},", "0,{i},,{y}"),
     ("run_id,key,value,step,timestamp", "r,loss,{x},{i},1700000000000",
      "r,eval_loss,{y},{i}0000,1700000000001")],
)  # fmt: skip
def test_records_of_evaluations_never_count(
    tmp_path: Path, header: str, train: str, other: str
) -> None:
    def record(x: float, i: int) -> str:
        both = [train, other] if i % 50 == 49 else [train]
        return "\n".join(one.format(i=i, x=x, y=x + 3) for one in both)

    notes = check(write(tmp_path / "log.csv", table(header, record)))
    assert notes == ["6 records of evaluations were left out."]


def test_json_lines_with_a_mode_and_a_loss_in_validation(tmp_path: Path) -> None:
    rows = [{"mode": "train", "step": i, "loss": x} for i, x in enumerate(LOSS)]
    rows.insert(100, {"mode": "val", "step": 99, "loss": 99.0})
    text = "\n".join(map(json.dumps, rows))
    assert check(write(tmp_path / "a", text)) == ["1 record of an evaluation was left out."]


def test_splits_that_are_not_called_training_are_a_choice(tmp_path: Path) -> None:
    text = table("step,split,loss", lambda x, i: f"{i},code,{x}\n{i},math,{x + 3}")
    path = write(tmp_path / "log.csv", text)
    with pytest.raises(AnalysisError, match=r"--split: 'code' and 'math'"):
        read_curve(path)
    assert check(path, split="code") == ["300 records were left out, whose 'split' is 'math'."]
    with pytest.raises(AnalysisError, match="did you mean 'math'"):
        read_curve(path, split="maths")
    parts = table("step,phase,loss", lambda x, i: f"{i},{'warmup' if i < 9 else 'main'},{x}")
    assert check(write(tmp_path / "parts.csv", parts)) == []
    known = table("step,split,loss", lambda x, i: f"{i},train,{x}\n{i},web,{x + 3}")
    notes = check(write(tmp_path / "known.csv", known))
    assert notes == ["300 records were left out, whose 'split' is 'web'."]
    with pytest.raises(AnalysisError, match="tells splits apart"):
        read_curve(write(tmp_path / "no.csv", "step,loss\n1,2\n"), split="val")


def test_the_validation_of_a_console_can_be_asked_for(tmp_path: Path) -> None:
    text = PLAIN.replace("step 100 ", "Epoch 3 | val | loss 9.0\nstep 100 ")
    path = write(tmp_path / "log", text)
    assert check(path) == ["1 line of an evaluation was left out."]
    curve = read_curve(path, split="val")
    assert (curve.series, curve.notes) == (
        {"loss": [9.0]},
        ["300 lines of training were left out."],
    )
    named = write(tmp_path / "named", PLAIN + "step 300: val loss 4.5\n")
    assert read_curve(named, split="val").series == {"loss": [4.5]}


@pytest.mark.parametrize(
    ("header", "record"),
    [("run,step,loss", "fp8,{i},{x}\nbf16,{i},{y}"), ("precision,step,loss",
     "fp8,{i},{x}\nbf16,{i},{y}"), ("run_id,key,value,step", "fp8,loss,{x},{i}\nbf16,loss,{y},{i}"),
     ("Step,fp8 - train/loss,fp8 - train/loss__MIN,bf16 - train/loss", "{i},{x},{x},{y}")],
)  # fmt: skip
def test_several_runs_are_a_choice(tmp_path: Path, header: str, record: str) -> None:
    text = table(header, lambda x, i: record.format(i=i, x=x, y=x + 1))
    path = write(tmp_path / "log.csv", text)
    with pytest.raises(AnalysisError, match=r"--run: \[?'fp8'.*'bf16'"):
        read_curve(path)
    wide = "Step" in header
    notes = check(path, run="fp8")
    assert notes == ([] if wide else ["300 records of other runs left out."])
    with pytest.raises(AnalysisError, match=r"no run 'fp'.*did you mean 'fp8'"):
        read_curve(path, run="fp")


def test_runs_one_behind_the_other_and_numbers_for_names(tmp_path: Path) -> None:
    rows = [f"{seed},{i},{x + seed}" for seed in (0, 1) for i, x in enumerate(LOSS)]
    path = write(tmp_path / "log.csv", "seed,step,loss\n" + "\n".join(rows))
    with pytest.raises(AnalysisError, match=r"column 'seed'; choose one with --run: '0' and '1'"):
        read_curve(path)
    check(path, run="seed=0")
    resumed = [f"{'a' if i < 100 else 'b'},{i},{x}" for i, x in enumerate(LOSS)]
    assert check(write(tmp_path / "b.csv", "run_id,step,loss\n" + "\n".join(resumed))) == []


def test_columns_that_could_be_the_loss_are_a_choice(tmp_path: Path) -> None:
    text = table("step,loss,train_loss", lambda x, i: f"{i},{x},{x / 2}")
    path = write(tmp_path / "log.csv", text)
    with pytest.raises(AnalysisError, match=r"--column: \['loss', 'train_loss'\]"):
        read_curve(path)
    assert check(path, column="loss") == []
    parts = table("step,loss,lm_loss,aux_loss", lambda x, i: f"{i},{x},{x - 1},1")
    notes = check(write(tmp_path / "parts.csv", parts))
    assert notes == ["'loss' is taken for the loss, not 'lm_loss' or 'aux_loss'."]


def test_losses_of_several_models_are_a_choice(tmp_path: Path) -> None:
    text = "".join(f"[{i // 60}/5][{i % 60}/60] Loss_D: 0.5 Loss_G: {x:.4f}\n"
                   for i, x in enumerate(LOSS))  # fmt: skip
    path = write(tmp_path / "log", text)
    with pytest.raises(AnalysisError, match=r"--column: \['Loss_D', 'Loss_G'\]"):
        read_curve(path)
    check(path, column="Loss_G")


def test_runs_with_labels_on_one_console_are_a_choice(tmp_path: Path) -> None:
    text = "".join(f"[fp8] step {i} loss {x:.4f}\n[bf16] step {i} loss 9.0\n"
                   for i, x in enumerate(LOSS))  # fmt: skip
    path = write(tmp_path / "log", text)
    with pytest.raises(AnalysisError, match=r"--run: 'fp8' and 'bf16'"):
        read_curve(path)
    check(path, run="fp8")


@pytest.mark.parametrize("label", ["[rank{}]: ", "{}: ", "[default{}]:", "rank {} "])
def test_the_mean_counts_of_what_several_ranks_printed(tmp_path: Path, label: str) -> None:
    lines = [f"{label.format(r)}step {i} loss {x + 2 * r - 1:.4f}"
             for i, x in enumerate(LOSS) for r in (0, 1)]  # fmt: skip
    lines[5], lines[6] = lines[6], lines[5]  # one rank is ahead
    assert check(write(tmp_path / "log", "\n".join(lines) + "\n")) == [
        "Of 2 ranks that wrote, the mean counts."
    ]


def test_ranks_without_a_name_print_the_same(tmp_path: Path) -> None:
    text = "".join(line * 4 for line in PLAIN.splitlines(keepends=True))
    assert check(write(tmp_path / "log", text)) == [
        "900 records were dropped whose step was recorded again: the last counts."
    ]


def test_a_resumed_run_says_what_it_dropped(tmp_path: Path) -> None:
    lines = PLAIN.splitlines(keepends=True)
    wrong = [f"step {i} loss 77.0\n" for i in range(250, 280)]
    (note,) = check(write(tmp_path / "log", "".join([*lines[:250], *wrong, *lines[250:]])))
    assert note.startswith("The step went back 1 time (from step 279 to 250): 30 records were")


def test_steps_counted_anew_without_an_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", table("step,loss", lambda x, i: f"{i % 60},{x}"))
    (note,) = check(path)
    assert note.startswith("Steps are counted anew 4 times with no epoch told, each time from 0")
    assert read_curve(path).places[ONSET] == "epoch 3, step 20"


@pytest.mark.parametrize(
    ("name", "content"),
    [("utf16.log", PLAIN.encode("utf-16")), ("utf16le.log", PLAIN.encode("utf-16-le")),
     ("mark.log", PLAIN.encode("utf-8-sig")), ("console.log", b"\xdb\xdb\n" + PLAIN.encode()),
     ("log.gz", gzip.compress(PLAIN.encode())), ("open.gz", gzip.compress(PLAIN.encode())[:-8]),
     ("metrics/loss", "".join(f"{1700000000000 + i} {x} {i}\n" for i, x in enumerate(LOSS))),
     ("twice.csv", table("step,loss", lambda x, i: f"{i},{x}" if i != 150 else
                         f"step,loss\n{i},{x}")),
     ("blanks.txt", table("# made by hand\nstep loss", lambda x, i: f"{i} {x}")),
     ("tag.csv", table("Wall time,Step,Value", lambda x, i: f"1.7e9,{i},{x}")),
     ("docker.json", table("", lambda x, i: json.dumps({"log": f"step {i} loss {x}\n"})))],
)  # fmt: skip
def test_other_ways_to_write_the_same(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert check(write(tmp_path / name, content)) == []


def test_tables_of_trainers(tmp_path: Path) -> None:
    def lightning(x: float, i: int) -> str:
        end = f"\n{i // 60},{i},{x + 1},,{x + 2}" if ends_epoch(i) else ""
        return f"{i // 60},{i},,{x},{end}"

    header = "epoch,step,train_loss_epoch,train_loss_step,val_loss"
    notes = check(write(tmp_path / "metrics.csv", table(header, lightning)))
    assert notes == ["5 records of evaluations were left out."]
    keras = table("epoch,accuracy,loss,val_loss", lambda x, i: f"{i},0.5,{x},{x + 1}")
    assert check(write(tmp_path / "keras.csv", keras)) == []


def test_numbers_that_are_not_finite_stay(tmp_path: Path) -> None:
    for text in ("nan", "-nan", "NaN", "1.#QNAN", "-nan(ind)"):
        lines = PLAIN.replace(f"step 150 loss {LOSS[150]:.4f}", f"step 150 loss {text}")
        curve = read_curve(write(tmp_path / "log", lines))
        kinds = [spike.kind for spike in find_spikes(curve.series["loss"], steps=curve.steps)]
        assert kinds == ["nonfinite", "rise"], text


def test_a_pattern_reads_the_rest(tmp_path: Path) -> None:
    text = "".join(f"@{i} :: {x:.4f} / {x / 4:.3f}\n" for i, x in enumerate(LOSS))
    path = write(tmp_path / "log", f"hello\n{text}")
    pattern = r"@(?P<step>\d+) :: (?P<loss>\S+) / (?P<grad_norm>\S+)"
    assert check(path, pattern=pattern) == []
    assert read_curve(path, pattern=pattern).series["grad_norm"][0] == round(LOSS[0] / 4, 3)
    for wrong, words in [
        ("(?P<loss>[", "no regular expression"),
        (r"(\d+)", "no group called loss"),
        ("x(?P<loss>y)", "no line of"),
        (r"(?P<loss>::)", "expected a number"),
    ]:
        with pytest.raises(AnalysisError, match=words):  # fmt: skip
            read_curve(path, pattern=wrong)


def test_decimal_commas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match=r"decimal point .*'loss 8,92'"):
        read_curve(write(tmp_path / "log", "step 1 loss 8,92\nstep 2 loss 8,91\n"))


def test_the_options_on_the_command_line_and_a_pipe() -> None:
    arguments = ["spikes", "-", "--run", "b", "--split", "train", "--json"]
    text = table("run,split,step,loss", lambda x, i: f"b,train,{i},{x}\na,train,{i},9\nb,val,{i},9")
    done = CliRunner().invoke(app, arguments, input=text)
    assert [spike["onset"] for spike in json.loads(done.stdout)] == [ONSET]
    assert "300 records of other runs left out." in done.stderr
    done = CliRunner().invoke(app, ["spikes", "-", "--pattern", "loss (?P<loss>.*)"], input=PLAIN)
    assert "1 spike in 300 steps" in done.stdout
