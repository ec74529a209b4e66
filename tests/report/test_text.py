"""The terminal's tables at 80 columns: whole numbers, whole or middle-shortened names."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from truths.runs import write_large, write_planted
from unclamp.cli import app
from unclamp.errors import UnclampWarning
from unclamp.formats import FORMATS
from unclamp.report import build_view
from unclamp.report.text import print_view, table_of
from unclamp.report.words import shortened
from unclamp.study.config import StudyConfig, default_toml, write_study


def printed(path: Path, *, width: int = 80) -> str:
    buffer = io.StringIO()
    print_view(build_view(path), Console(file=buffer, width=width, force_terminal=False))
    return buffer.getvalue()


def write_small_study(path: Path, *, status: str = "finished") -> Path:
    """Write a study of two arms and two seeds whose runs are planted ones."""
    data = StudyConfig.from_toml(default_toml()).to_dict()
    arms = {name: data["arms"][name] for name in ("dynamic", "delayed")}
    config = StudyConfig.from_dict({**data, "scenarios": ["text", "outlier"], "seeds": [0, 1],
                                    "steps": 20, "arms": arms})  # fmt: skip
    path.mkdir()
    write_study(path, config, status=status)
    return path


@pytest.mark.parametrize("seed", range(5))
def test_shortened_names_keep_both_ends(seed: int) -> None:
    name = "model.layers.0.self_attn.q_proj"[: 12 + 4 * seed]
    for width in range(8, 40):
        short = shortened(name, width)
        assert len(short) == min(len(name), width)
        assert short[:2] == name[:2]
        assert short[-3:] == name[-3:]


def test_a_run_fits_80_columns_and_cuts_no_number(tmp_path: Path) -> None:
    text = printed(write_large(tmp_path / "run"))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "67,200 elements were clamped" in " ".join(text.split())
    assert re.search(r"^ +40 +40 +1\.00x +0\.1 % +- +0 % +0$", text, re.MULTILINE)


def test_long_names_are_cut_in_the_middle_and_their_numbers_are_not(tmp_path: Path) -> None:
    view = build_view(write_planted(tmp_path / "run"))
    assert view.run is not None
    name = "model." + "very_long_block_name." * 6 + "down_proj"
    view.run.sites[0] = replace(view.run.sites[0], fqn=name, saturated=123_456_789_012)
    buffer = io.StringIO()
    print_view(view, Console(file=buffer, width=80))
    text = buffer.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" in text
    assert "down_proj input, delayed e4m3fn" in text
    assert "123,456,789,012" in text


def test_an_interrupted_study_says_what_is_missing_and_averages_finished_runs_only(
    tmp_path: Path,
) -> None:
    study = write_small_study(tmp_path / "study", status="running")
    for arm in ("dynamic", "delayed"):
        write_planted(study / "text" / arm / "seed-0", steps=20)
    write_planted(study / "text" / "delayed" / "seed-1", steps=5, status="interrupted")
    view = build_view(study)
    text = " ".join(printed(study).split())
    assert "The study is not finished: 2 of 8 runs are." in text
    assert "Unfinished: text/delayed/seed-1." in text
    assert "text/dynamic/seed-1" in text
    assert [scenario.name for scenario in view.scenarios] == ["text"]
    arms = {arm.name: arm for arm in view.scenarios[0].arms}
    assert (arms["delayed"].seeds, arms["delayed"].unfinished) == (2, 1)
    assert arms["delayed"].final_loss == arms["dynamic"].final_loss
    assert arms["delayed"].final_gap is not None
    assert arms["delayed"].final_gap.pairs == 1
    assert arms["delayed"].casts == 60
    assert max(map(len, printed(study).splitlines())) <= 80


def test_a_study_that_has_not_begun_has_no_tables(tmp_path: Path) -> None:
    text = printed(write_small_study(tmp_path / "study", status="running"))
    assert "No run of this study has recorded anything yet." in text
    assert "final loss" not in text


def test_a_damaged_run_is_named_and_does_not_hide_the_others(tmp_path: Path) -> None:
    study = write_small_study(tmp_path / "study")
    for scenario in ("text", "outlier"):
        for arm in ("dynamic", "delayed"):
            for seed in (0, 1):
                write_planted(study / scenario / arm / f"seed-{seed}", steps=20)
    (part,) = (study / "text" / "delayed" / "seed-1" / "casts").glob("*.parquet")
    part.write_bytes(b"damaged")
    with pytest.warns(UnclampWarning, match="is damaged and left out"):
        view = build_view(study)
    (note,) = view.notes
    assert note.startswith(f"text/delayed/seed-1: casts/{part.name} is damaged and left out: rows")
    arms = {arm.name: arm for arm in view.scenarios[0].arms}
    assert (arms["delayed"].seeds, arms["dynamic"].seeds) == (2, 2)


def test_a_run_whose_header_is_damaged_is_named_and_does_not_hide_the_others(
    tmp_path: Path,
) -> None:
    study = write_small_study(tmp_path / "study")
    for arm in ("dynamic", "delayed"):
        for seed in (0, 1):
            write_planted(study / "text" / arm / f"seed-{seed}", steps=20)
            write_planted(study / "outlier" / arm / f"seed-{seed}", steps=20)
    header = study / "text" / "delayed" / "seed-1" / "run.json"
    header.write_text(header.read_text().replace('"status": "finished"', '"status": "odd"'))
    view = build_view(study)
    (note,) = view.notes
    assert note.startswith("text/delayed/seed-1 cannot be read:")
    arms = {arm.name: arm for arm in view.scenarios[0].arms}
    assert (arms["delayed"].seeds, arms["dynamic"].seeds) == (1, 2)


def test_formats_fit_80_columns_with_every_number_whole() -> None:
    done = CliRunner().invoke(app, ["formats"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    for fmt in FORMATS.values():
        assert f"{fmt.min_subnormal:.10g}" in done.stdout
        assert fmt.standard in " ".join(done.stdout.split())


@pytest.mark.parametrize("width", range(60, 141, 4))
def test_every_cell_of_the_tables_of_arms_is_drawn_whole(width: int) -> None:
    """Widths at which a plan that is off by little cuts a number or leaves a column out."""
    columns = ["arm", "final loss", "difference from dynamic", "loss at planted steps vs dynamic",
               "spikes, all seeds: planted + other", "clamped elements", "re-cast"]  # fmt: skip
    rows = [
        ["a", "3.1", "-", "1.00x", "2 + 0", "7", "-"],
        ["delayed", "3.1331", "+0.00546 (-0.0491 to +0.0599)", "2.33x (2.28 to 2.39)", "2 + 0",
         "123,456,789", "0.125 %"],
        ["an arm of a long name *", "12.1331", "-0.00546 (-0.0491 to -0.0199) may be chance",
         "12.33x (12.28 to 122.39)", "12 + 110", "1,123,456,789", "12.5 %"],
    ]  # fmt: skip
    for shown in (rows, rows[:2], rows[:1], [row[:3] for row in rows]):
        buffer = io.StringIO()
        console = Console(file=buffer, width=width)
        console.print(table_of(columns[: len(shown[0])], shown, width, longest_name=24))
        text = buffer.getvalue()
        assert max(map(len, text.splitlines())) <= width
        drawn = {cell for line in text.splitlines() for cell in re.split(r"  +", line.strip())}
        for cell in (cell for row in shown for cell in row[1:]):
            assert cell in drawn
