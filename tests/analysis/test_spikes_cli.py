"""`unclamp spikes` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from unclamp.cli import app
from unclamp.errors import UnclampError


def write(path: Path, *, spiked: bool, broken: bool = False) -> Path:
    loss = 2 + 3 * np.exp(-np.arange(300) / 40)
    loss *= 1 + 0.02 * np.random.default_rng(0).standard_normal(300)
    if spiked:
        loss[200:203] *= 1.6
    cells = [f"{x:.5f}" for x in loss]
    if broken:
        cells[-1] = "nan"
    path.write_text("step,loss\n" + "".join(f"{10 * i},{x}\n" for i, x in enumerate(cells)))
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["spikes", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_json_is_a_list_of_spikes(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", spiked=True, broken=True)
    rise, broken = json.loads(run(path, "--json"))
    assert (rise["onset"], rise["end"], rise["recovery"], rise["kind"]) == (
        2000,
        2020,
        2030,
        "rise",
    )
    assert rise["height"] == pytest.approx(1.6, rel=0.1)
    assert rise["onset"] <= rise["peak"] <= rise["end"]
    assert (broken["onset"], broken["height"], broken["kind"]) == (2990, None, "nonfinite")
    assert json.loads(run(write(tmp_path / "calm.csv", spiked=False), "--json")) == []


def test_table_and_words(tmp_path: Path) -> None:
    lines = run(write(tmp_path / "log.csv", spiked=True)).splitlines()
    cells = lines[1].split()
    assert (cells[0], cells[1]) == ("1", "loss")  # the number that `unclamp explain` takes
    assert (cells[2], cells[4], cells[5]) == ("2000", "2020", "2030")
    assert cells[6].startswith("1.")
    assert "1 spike in 300 steps" in lines[-1]
    assert all(len(line.rstrip()) <= 80 for line in lines[:-1])


def test_no_spikes_is_said_with_what_could_be_missed(tmp_path: Path) -> None:
    text = run(write(tmp_path / "log.csv", spiked=False))
    assert "no spikes in 300 steps" in text
    assert "x the level or more would show" in text
    few = tmp_path / "few.csv"
    few.write_text("loss\n3\n2\n1\n")
    assert "too few steps for this method to judge any." in run(few)
    few.write_text("loss\n1\nnan\n2\n")
    text = run(few)
    assert "1 spike in 3 steps" in text
    assert "judge a finite value: only NaN and Inf count" in text
    few.write_text("loss\n1\n")
    assert "no spikes in 1 step (" in run(few)


def test_a_chosen_column_goes_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", spiked=True)
    path.write_text(path.read_text().replace("loss", "grad_norm"))
    lines = run(path, "--column", "grad_norm").splitlines()
    assert sum("2000" in line for line in lines) == 1
    assert lines[-1].startswith("grad_norm: 1 spike")
    assert json.loads(run(path, "--column", "grad_norm", "--json"))[0]["series"] == "grad_norm"


def test_great_heights_are_short(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("loss\n" + "2\n2.01\n" * 50 + "2e9\n" + "2\n2.01\n" * 5)
    assert "1.0e9x" in run(path)


@pytest.mark.parametrize("method", ["robust", "olmo", "olmo-core", "zclip", "megatron"])
def test_every_method_runs(tmp_path: Path, method: str) -> None:
    path = write(tmp_path / "log.csv", spiked=True)
    assert f"method {method}" in run(path, "--method", method)
    assert run(path, "--method", method, "--threshold", 1e9, "--json").strip() == "[]"


def test_series_and_column_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", spiked=False)
    for option in (["--series", "grad_norm"], ["--column", "nonsense"], ["--threshold", "-1"]):
        with pytest.raises(UnclampError):
            run(path, *option)


def test_only_spikes_of_the_loss_by_the_default_definition_have_the_number_of_explain(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log.csv"
    noise = np.random.default_rng(0).standard_normal((300, 2))
    columns = 2 * (1 + 0.01 * noise)
    columns[[100, 200], 0] *= 2
    columns[[50, 150], 1] *= 3
    rows = "".join(f"{i},{a:.5f},{b:.5f}\n" for i, (a, b) in enumerate(columns.tolist()))
    path.write_text("step,loss,grad_norm\n" + rows)

    def numbers(*options: str) -> list[tuple[str, int, int | None]]:
        found = json.loads(run(path, "--json", *options))
        return [(spike["series"], spike["onset"], spike["number"]) for spike in found]

    assert numbers() == [
        ("grad_norm", 50, None),
        ("loss", 100, 1),
        ("grad_norm", 150, None),
        ("loss", 200, 2),
    ]
    assert numbers("--series", "loss", "--method", "zclip", "--threshold", "20") == [
        ("loss", 100, None),
        ("loss", 200, None),
    ]
    assert {number for _, _, number in numbers("--threshold", "6")} == {None}
    assert [number for _, _, number in numbers("--threshold", "5", "--series", "loss")] == [1, 2]
    lines = run(path).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["grad_norm", "1", "grad_norm", "2"]
