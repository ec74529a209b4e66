"""A module called 12 times a step, as an ALBERT's layer: what each column holds, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unclamp
from unclamp.report.recorded import read_run
from unclamp.runlog import RunLog

CALLS = 12
FIRST = [[4.0, 2.0], [1.0, -1.0], [0.5, 0.0]]
"""The input of the first call; that of each later one is half of the one before."""


class Shared(nn.Module):
    """One layer in place of twelve."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(0.5 * torch.eye(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(CALLS):
            x = self.layer(x)
        return x


def rows(tmp_path: Path, scaling: Any, factors: list[float]) -> list[dict[str, dict[str, Any]]]:
    """Train with inputs so many times `FIRST`; return the rows of each step by role."""
    model = Shared()
    unclamp.convert(model, unclamp.Recipe(input=scaling, weight=scaling, grad_output=scaling))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with unclamp.Recorder(model, tmp_path / "run", inspect=1) as recorder:
        for n, factor in enumerate(factors):
            model(factor * torch.tensor(FIRST)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(n, loss=1.0)
    with RunLog.open(tmp_path / "run") as log:
        found = log.sql("SELECT * FROM casts JOIN sites USING (site) ORDER BY step").to_pylist()
    return [{r["role"]: r for r in found if r["step"] == n} for n in range(len(factors))]


def test_with_a_scale_of_its_own_each_the_row_has_the_smallest(tmp_path: Path) -> None:
    (step,) = rows(tmp_path, unclamp.Dynamic(power_of_two=True), [1.0])
    seen, grad = step["input"], step["grad_output"]
    assert (seen["microsteps"], seen["elements"]) == (CALLS, CALLS * 6)
    # 4 in the first call; 64 is the power of two below 448 / 4. The last call had 64 * 2**11.
    assert (seen["amax"], seen["scale"]) == (4.0, 64.0)
    # The last call's output has a gradient of ones, and the one before of halves. 2**15 < 57344.
    assert (grad["microsteps"], grad["amax"], grad["scale"]) == (CALLS, 1.0, 32768.0)
    assert (seen["saturated"], seen["saturated_error"], seen["recast"]) == (0, 0.0, 0)
    counts = dict(seen["exponents"])
    # 4, 2, two ones and a half: 2 ** 2 is in the first call only, 2 ** 1 in the first two.
    assert counts == {2 - n: k for n, k in enumerate([1, 2, 4, 5, *[5] * 8, 4, 3, 1])}


def test_with_one_scale_for_all_counts_and_error_are_of_all_calls(tmp_path: Path) -> None:
    """The second step's inputs are twice as large: its first call clamps 8 to 448 / 64 = 7."""
    first, second = rows(tmp_path, unclamp.Delayed(history_len=4, power_of_two=True), [1.0, 2.0])
    assert first["input"]["scale"] == second["input"]["scale"] == 64.0
    seen = second["input"]
    assert (seen["amax"], seen["saturated"], seen["elements"]) == (8.0, 1, CALLS * 6)
    # The second call's input is half of what the first made of it: of 7, not of 8.
    first_call, second_call = 64 + 16 + 4 + 4 + 1, 3.5**2 + 4 + 1 + 1 + 0.25
    squares = first_call + second_call * sum(0.25**n for n in range(CALLS - 1))
    assert seen["saturated_error"] == pytest.approx(1 / squares, rel=1e-6)


def test_a_report_counts_a_row_once_and_its_elements_all(tmp_path: Path) -> None:
    rows(tmp_path, unclamp.Delayed(history_len=4, power_of_two=True), [1.0, 2.0])
    with RunLog.open(tmp_path / "run") as log:
        record, _ = read_run(log)
    (site,) = (site for site in record.sites if site.name.role == "input")
    assert (site.totals.rows, site.totals.casts) == (2, 2 * CALLS)
    assert (site.totals.clamped_rows, site.totals.saturated) == (1, 1)
    assert site.sqnr_row_db_min is not None


def test_observe_counts_every_call(tmp_path: Path) -> None:
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unclamp.observe(model, unclamp.Recipe()) as observation:
        model(torch.tensor(FIRST)).sum().backward()
        optimizer.step()
    (seen,) = (site for site in observation.sites() if site.role == "input")
    assert (seen.casts, seen.elements) == (CALLS, CALLS * 6)
