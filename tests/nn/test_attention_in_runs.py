"""Products of attention in a run's log, under `switch`, and in an explanation."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp
from truths.trainings import SPIKE, STEPS, explain, record
from unclamp import Delayed, Recipe, RecipeError, RunLog, SiteName, Training
from unclamp.nn import find_ledgers, products_of

KEYS, WIDTH = 16, 8
Batch = tuple[Tensor, Tensor]


class Retrieval(nn.Module):
    """An attention to keys that stay, with values that are learnt."""

    k: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.attn = unclamp.Attention()
        self.register_buffer("k", torch.randn(1, 1, KEYS, WIDTH, generator=generator))
        self.v = nn.Parameter(torch.randn(1, 1, KEYS, WIDTH, generator=generator))

    def forward(self, q: Tensor) -> Tensor:
        """Return what queries `[B, 1, T, WIDTH]` find."""
        return self.attn(q, *(t.expand(len(q), -1, -1, -1) for t in (self.k, self.v)))


class Planted:
    """At the spike's step half of the queries are large, and so sure of one key.

    Clamped they are as unsure as the others, and find something else.
    """

    recipe = Recipe().override("*.[qp][kv]", scaling="delayed")
    scaling = Delayed()
    spike = SPIKE
    culprits = (SiteName("attn.qk", "input"),)

    def build(self, recipe: Recipe | None = None) -> Training:
        """Return the training, converted."""
        model = Retrieval()
        unclamp.convert(model, recipe or self.recipe)
        return Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))

    def step(self, training: Training, batch: Batch) -> Tensor:
        """Make a step; return its loss."""
        q, target = batch
        training.optimizer.zero_grad()
        loss = (training.model(q) - target).square().mean()
        loss.backward()
        training.optimizer.step()
        return loss

    def batches(self) -> Iterator[Batch]:
        """Yield queries, and what a plain attention finds, with noise."""
        teacher = Retrieval()
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            q = torch.randn(4, 1, 16, WIDTH, generator=generator)
            if step == SPIKE:
                q[:, :, ::2] *= 30
            with torch.no_grad():
                k, v = (t.expand(4, -1, -1, -1) for t in (teacher.k, teacher.v))
                found = F.scaled_dot_product_attention(q, k, v)
            yield q, found + 0.3 * torch.randn(found.shape, generator=generator)


def test_an_explanation_names_the_queries_that_were_clamped(tmp_path: Path) -> None:
    case = Planted()
    losses = record(case, tmp_path / "run")  # pyright: ignore[reportArgumentType]
    assert losses[SPIKE] > 3 * max(losses[:SPIKE])
    found = explain(case, tmp_path / "run")  # pyright: ignore[reportArgumentType]
    assert found.verdict == "clamping"
    assert found.named == list(case.culprits)
    assert found.clamping_share is not None
    assert found.clamping_share > 0.9


class Counted(Planted):
    """The same with no rule for the attention, a layer that clamps nothing, and another loss.

    The spike comes of the step's targets: large queries beside it are only counted as clamped.
    """

    recipe = Recipe().override("1", scaling="dynamic")
    scaling = unclamp.Dynamic()
    culprits = ()

    def build(self, recipe: Recipe | None = None) -> Training:
        """Return the training, converted."""
        torch.manual_seed(0)
        model = nn.Sequential(Retrieval(), nn.Linear(WIDTH, WIDTH))
        unclamp.convert(model, recipe or self.recipe)
        return Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))

    def batches(self) -> Iterator[Batch]:
        """Yield queries and targets, at the spike's step larger ones."""
        for step, (q, target) in enumerate(super().batches()):
            yield q, target * (5 if step == SPIKE else 1)


def test_an_explanation_never_unclamps_what_is_only_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unclamp.nn.counting.COUNTED_EVERY", 1)  # in a replay too
    case, run = Counted(), tmp_path / "run"
    losses = record(case, run)  # pyright: ignore[reportArgumentType]
    assert losses[SPIKE] > 3 * max(losses[:SPIKE])
    found = explain(case, run)  # pyright: ignore[reportArgumentType]
    assert found.verdict == "not clamping"
    assert (found.clamped_sites, found.sites) == (0, ())


class Block(nn.Module):
    """An attention between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attn = unclamp.Attention()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output `[B, T, 8]`."""
        q, kv = self.q(x)[:, None], x[:, None]
        return self.out(self.attn(q, kv, kv, is_causal=True).squeeze(1))


def train(model: nn.Module, recorder: unclamp.Recorder, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in steps:
        x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss=loss)


def steps_with(log: RunLog, site: str) -> list[int]:
    fqn, role = site.split()
    rows = log.casts(SiteName(fqn, role))  # pyright: ignore[reportArgumentType]
    return sorted(set(rows["step"].to_pylist()))


def test_a_log_has_what_is_only_counted_at_inspected_steps(tmp_path: Path) -> None:
    model = Block()
    unclamp.convert(model, Recipe())
    with unclamp.Recorder(model, tmp_path / "run", inspect=5) as recorder:
        train(model, recorder, range(21))
    with RunLog.open(tmp_path / "run") as log:
        assert steps_with(log, "out input") == list(range(21))
        assert steps_with(log, "attn.pv input") == [0, 5, 10, 15, 20]
        looks = log.casts(SiteName("attn.pv", "input"))
        assert None not in looks["sqnr_db"].to_pylist()
        kinds = log.events()["kind"].to_pylist()
        assert "uncast" not in kinds  # they are not to cast in every step


def test_a_switch_reaches_a_product_of_attention(tmp_path: Path) -> None:
    model = Block()
    unclamp.convert(model, Recipe().override("*.qk", scaling="delayed"))
    with unclamp.Recorder(model, tmp_path / "run") as recorder:
        train(model, recorder, range(3))
        report = unclamp.switch(model, "*.qk", input="dynamic")
        assert list(report.switched) == ["attn.qk"]
        train(model, recorder, range(3, 5))
        unclamp.switch(model, "*.qk", scaling="high_precision")
        own = {fqn: operands for fqn, operands, _ in products_of(model)}
        assert own["attn.qk"].is_plain
        train(model, recorder, range(5, 7))
    with RunLog.open(tmp_path / "run") as log:
        assert steps_with(log, "attn.qk input") == [0, 1, 2, 3, 4]
        assert len(log.switches()) == 4


def test_what_is_only_counted_stays_so_under_a_switch() -> None:
    model = Block()
    unclamp.convert(model, Recipe())
    x = torch.randn(2, 6, 8)
    before = model(x)
    unclamp.switch(model, "*.[qp][kv]", scaling="dynamic")
    assert torch.equal(model(x), before)
    (ledger,) = find_ledgers(model)
    assert ledger.sites[-1].operand.scaling.kind == "dynamic"


def test_a_switch_of_all_layers_to_rows_leaves_products_of_attention_one_scale() -> None:
    """Their rows are other tokens at every step: a step after it runs, and is the plain one."""
    model = Block()
    unclamp.convert(model, Recipe().override("*.pv", scaling="delayed"))
    report = unclamp.switch(model, "*", input=unclamp.Dynamic(granularity=unclamp.PerRow()))
    given = {
        own.fqn: str(own.operand("input").scaling.granularity) for _, own, _ in products_of(model)
    }
    assert given.pop("attn.qk") == given.pop("attn.pv") == "tensor"
    assert set(given.values()) == {"row"}
    assert report.only_counted == ("attn.qk",)
    assert "attn.qk (only counted): input delayed -> dynamic\n" in f"{report}\n"
    model(torch.randn(2, 6, 8)).sum().backward()


@pytest.mark.parametrize("glob", ["*.qk", "*.[qp][kv]"])
def test_a_switch_that_names_products_of_attention_refuses_rows(glob: str) -> None:
    model = Block()
    unclamp.convert(model, Recipe().override("*.qk", scaling="delayed"))
    with pytest.raises(RecipeError, match=r"attn\.qk: expected a scale a tensor for input"):
        unclamp.switch(model, glob, input=unclamp.Dynamic(granularity=unclamp.PerRow()))
    own = {fqn: operands for fqn, operands, _ in products_of(model)}
    assert own["attn.qk"].operand("input").scaling == Delayed()
