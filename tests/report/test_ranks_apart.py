"""What a report says of a run of several ranks: the rank that is broken, or ended early."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from truths.several_ranks import write_rank
from unclamp.analysis import read_curve
from unclamp.report.html import write_page
from unclamp.report.status import attempt_notes, rank_notes
from unclamp.report.text import print_view
from unclamp.report.view import build_view
from unclamp.runlog import RunLog

X, W = ("a", "input"), ("a", "weight")
FITS = {"amax": 200.0, "saturated": 0}
CLAMPS = {"amax": 2240.0, "saturated": 3, "saturated_error": 0.1}


def plant(path: Path, ends: list[int | None], *, bad: int | None = None, **more: Any) -> None:
    for rank, end in enumerate(ends):
        if end is not None:
            casts = {X: CLAMPS if rank == bad else FITS, W: FITS}
            steps = range(end + 1)
            write_rank(path, rank, steps, world_size=len(ends), casts=casts, **more)


def notes_on(path: Path) -> list[str]:
    with RunLog.open(path) as log:
        return [*attempt_notes(log), *rank_notes(log)]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([4, 4], []),
        ([4], []),
        ([4, 2], ["Rank 1 ends at step 2, the other at 4."]),
        ([4, 2, 4, 2], ["Ranks 1, 3 end at step 2, the others at 4."]),
        ([1, 3, 4, 4], ["Rank 0 ends at step 1, rank 1 ends at step 3, the others at 4."]),
        ([4, None], ["Rank 1 recorded nothing: the figures are of rank 0 alone."]),
        (
            [4, None, None, None],
            ["Ranks 1-3 recorded nothing: the figures are of rank 0 alone."],
        ),
    ],
    ids=str,
)
def test_ranks_that_ended_early_or_wrote_nothing_are_named(
    tmp_path: Path, ends: list[int | None], said: list[str]
):
    plant(tmp_path, ends)
    assert notes_on(tmp_path) == said
    assert [note for note in build_view(tmp_path).notes if "ank" in note] == said


def test_a_rank_that_never_closed_is_named(tmp_path: Path):
    write_rank(tmp_path, 0, range(3), casts={X: FITS})
    writer = write_rank(tmp_path, 1, range(3), casts={X: FITS}, close=False)
    assert notes_on(tmp_path) == ["Rank 1 never closed its log: the last seconds may be missing."]
    writer.close()
    assert notes_on(tmp_path) == []


def test_ranks_of_a_run_that_goes_on_may_be_steps_apart(tmp_path: Path):
    writers = [
        write_rank(tmp_path, rank, range(5 - rank), casts={X: FITS}, close=False)
        for rank in range(2)
    ]
    assert build_view(tmp_path).notes[1:] == []
    writers[1].close()
    assert build_view(tmp_path).notes[1:] == ["Rank 1 ends at step 3, the other at 4."]
    writers[0].close()


def test_attempts_are_told_of_with_where_they_began(tmp_path: Path):
    plant(tmp_path, [9, 9])
    for rank in range(4):
        write_rank(tmp_path, rank, range(6, 12), world_size=4, run_id="b", resume=True,
                   casts={X: FITS})  # fmt: skip
    (note,) = notes_on(tmp_path)
    assert note.startswith(
        "The run finished, and was begun again at step 6 on 4 ranks in place of 2"
    )


def test_the_bad_rank_is_named_first_and_drawn(tmp_path: Path):
    plant(tmp_path, [9] * 4, bad=2)
    view = build_view(tmp_path)
    assert view.run is not None
    assert view.run.ranks.sentences == [
        "Rank 2 stands out of 4 ranks: an overshoot of up to 10.00x (a input), where the median "
        "rank has 0.89x."
    ]
    assert view.run.ranks.sentences[0] in view.run.sentences
    first = view.run.ranks.listed[0]
    assert (first.rank, first.overshoot, first.saturated) == (2, 10.0, 30)
    assert first.cells == [10.0] * 10
    page = write_page(view, tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="heat-ranks"' in page
    said = Console(file=StringIO(), width=100)
    print_view(view, said)
    assert "ranks, by largest overshoot" in said.file.getvalue()  # type: ignore[attr-defined]
    rows = view.to_dict()["run"]["ranks"]["rows"]
    assert [row["overshoot"] for row in rows] == pytest.approx([0.89286, 0.89286, 10.0, 0.89286])
    assert "cells" not in rows[0]


def test_ranks_that_did_the_same_are_no_table(tmp_path: Path):
    plant(tmp_path, [9] * 2)
    view = build_view(tmp_path)
    assert view.run is not None
    assert view.run.ranks.rows == []
    page = write_page(view, tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="ranks"' not in page


def test_losses_are_means_over_ranks_and_tokens_per_second_sums(tmp_path: Path):
    for rank, tokens in enumerate((1000.0, 3000.0)):
        write_rank(
            tmp_path, rank, range(4), casts={X: FITS}, step_ms=10.0,
            loss=lambda n, rank=rank: n + 2.0 * rank, grad_norm=5.0, lr=0.25,
            scalars=[("tokens", tokens)],
        )  # fmt: skip
    curve = read_curve(tmp_path)
    assert curve.series["loss"] == [1.0, 2.0, 3.0, 4.0]
    assert curve.series["grad_norm"] == [5.0] * 4
    assert build_view(tmp_path).facts["tokens/s"] == "400,000"


def test_a_loss_that_only_the_last_stage_knows_is_the_runs(tmp_path: Path):
    write_rank(tmp_path, 0, range(3), casts={X: FITS})
    write_rank(tmp_path, 1, range(3), casts={("b", "input"): FITS}, loss=float)
    assert read_curve(tmp_path).series["loss"] == [0.0, 1.0, 2.0]
    view = build_view(tmp_path)
    assert view.run is not None
    assert {site.fqn for site in view.run.sites} == {"a", "b"}
    assert not math.isnan(view.run.curves["loss"].value[0] or 0)
