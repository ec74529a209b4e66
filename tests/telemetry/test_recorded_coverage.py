"""A run's coverage in its log and on its page; a branch that its step did not take is named."""

import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import unclamp
from unclamp import Recorder, RunLog, UnclampWarning
from unclamp.report.html import write_page
from unclamp.report.text import print_view
from unclamp.report.view import build_view


class Branches(nn.Module):
    """Takes another way from a step on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.late = nn.Linear(8, 8)
        self.never = nn.Bilinear(8, 8, 8)
        self.is_late = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.late(y) if self.is_late else y


def recorded(path: Path, *, late_at: int, wrap: bool = False) -> list[str]:
    """Train four steps; return what was warned of."""
    model = Branches()
    unclamp.convert(model, unclamp.Recipe())
    coverage = unclamp.coverage(model, torch.randn(4, 8))
    whole = nn.Sequential()
    whole.add_module("module", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UnclampWarning)
        with Recorder(whole if wrap else model, path, coverage=coverage) as recorder:
            for step in range(4):
                model.is_late = step >= late_at
                loss = model(torch.randn(4, 8)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step(loss=loss)
    return [str(w.message) for w in warned]


def events(path: Path, kind: str) -> list[tuple[int, dict[str, object]]]:
    with RunLog.open(path) as log:
        rows = log.sql("SELECT step, data FROM events WHERE kind = $kind", kind=kind)
    return [(s, json.loads(d)) for s, d in zip(*(c.to_pylist() for c in rows.columns), strict=True)]


def test_the_log_has_the_coverage_and_the_page_shows_it(tmp_path: Path) -> None:
    assert recorded(tmp_path / "run", late_at=9) == []
    ((step, data),) = events(tmp_path / "run", "coverage")
    assert (step, data["share"]) == (0, 1.0)
    view = build_view(tmp_path / "run")
    assert view.run is not None
    assert view.run.coverage is not None
    assert view.run.coverage.rows == [["first", "4 x 8 x 8", "1.024e-06", "100 %", "converted"]]
    assert not any(event.kind == "coverage" for event in view.run.events)
    page = write_page(view, tmp_path / "page.html").read_text()
    assert "What FP8 covers" in page
    assert "converted 100 % of the FLOPs; not called: late and never" in page
    console = Console(width=100, record=True, file=io.StringIO())
    print_view(view, console)
    assert "converted 100 % of the FLOPs" in console.export_text()


@pytest.mark.parametrize("wrap", [False, True])
def test_a_branch_that_is_taken_later_is_named_once(tmp_path: Path, wrap: bool) -> None:
    (said,) = recorded(tmp_path / "run", late_at=2, wrap=wrap)
    assert said.startswith("late: called in the training, and not in the step")
    assert events(tmp_path / "run", "outside") == [(2, {"modules": ["late"]})]
    (note,) = build_view(tmp_path / "run").notes
    assert note == (
        "Called in the training, and not in the step that the coverage is of: late. The shares "
        "leave them out."
    )


def test_a_recorder_that_is_closed_leaves_no_hook(tmp_path: Path) -> None:
    model = Branches()
    coverage = unclamp.coverage(model, torch.randn(4, 8))
    with Recorder(model, tmp_path / "run", plain=True, coverage=coverage):
        assert model.late._forward_pre_hooks
        assert not model.first._forward_pre_hooks
        with torch.no_grad():  # an evaluation may go any way
            model.late(torch.randn(4, 8))
        assert model.late._forward_pre_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_users_own_event_of_that_kind_is_no_coverage(tmp_path: Path) -> None:
    with Recorder(nn.Linear(2, 2), tmp_path / "run", plain=True) as recorder:
        recorder.event("coverage", lines=0.9)
        recorder.step(loss=1.0)
    view = build_view(tmp_path / "run")
    assert view.run is not None
    assert view.run.coverage is None
