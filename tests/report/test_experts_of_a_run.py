"""A run's page says which experts got few tokens, and whose scales are old."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp.report.experts import read_experts
from unclamp.report.html import write_page
from unclamp.report.view import build_view
from unclamp.runlog import RunLog

WIDTH, STEPS, STARVED = 8, 12, 4
SIZES = (6, 1, 3)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each row's product."""
        return unclamp.grouped_mm(x, self.up.mT, offs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train: expert 1 has a token in the first steps, and none in the rest."""
    path = tmp_path_factory.mktemp("experts") / "run"
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts()})
    unclamp.convert(model, unclamp.Recipe.uniform(unclamp.Delayed(history_len=4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with unclamp.Recorder(model, path) as recorder:
        for step in range(STEPS):
            sizes = SIZES if step < STARVED else (6, 0, 3)
            offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
            loss = model["experts"](torch.randn(sum(sizes), WIDTH), offs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss=loss.detach())
    return path


def test_the_fewest_tokens_and_the_longest_time_without_are_those_that_were_planted(
    run: Path,
) -> None:
    with RunLog.open(run) as log:
        (row,) = read_experts(log)
    tokens = [6 * STEPS, STARVED, 3 * STEPS]
    assert row.name == "experts.up.*"
    assert row.experts == 3
    assert row.fewest == "experts.up.1"
    assert row.even_share == pytest.approx(STARVED / (sum(tokens) / 3))
    assert row.idle == row.gap == STEPS - STARVED
    assert row.stale == 1


def test_the_page_has_a_table_of_them(run: Path, tmp_path: Path) -> None:
    page = write_page(build_view(run), tmp_path / "page.html").read_text()
    assert '<h2 id="experts">Experts</h2>' in page
    assert "experts.up.1" in page
