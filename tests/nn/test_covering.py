"""`convert` and `observe` with an example: the share of the FLOPs, in reports and in a run's log.

Expected FLOPs are counted by hand.
"""

import copy
import gc
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp.covered import CoverageReport
from unclamp.nn import cover, find_ledgers
from unclamp.nn.attach import attach
from unclamp.nn.uncollected import uncollected
from unclamp.telemetry import Recorder

TOKENS, WIDTH, HIDDEN, OUT = 6, 8, 16, 4
FIRST = 2 * 2 * TOKENS * WIDTH * HIDDEN  # two GEMMs: nobody wants the gradient of a batch
LAST = 3 * 2 * TOKENS * HIDDEN * OUT


class Pair(nn.Module):
    """Two layers, of two inputs one of which may stay away, and a branch for large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.last = nn.Linear(HIDDEN, OUT)
        self.late = nn.Linear(OUT, OUT)

    def forward(self, x: Tensor, y: Tensor | None = None, *, late: bool = False) -> Tensor:
        out = self.last(self.first(x if y is None else x + y).relu())
        return self.late(out) if late else out


def batch() -> Tensor:
    return torch.randn(TOKENS, WIDTH)


def coverage_of(report: unclamp.ConvertReport) -> CoverageReport:
    assert report.coverage is not None
    return report.coverage


@pytest.mark.parametrize(
    "example",
    [batch(), (batch(), batch()), [batch()], {"x": batch(), "y": batch()}],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_a_report_says_what_share_of_the_flops_is_converted(example: Any) -> None:
    report = unclamp.convert(Pair(), unclamp.Recipe(), skip=["last"], example=example)
    coverage = coverage_of(report)
    assert {p.fqn: (p.flops, p.state, p.why) for p in coverage.products} == {
        "first": (FIRST, "converted", ""),
        "last": (LAST, "left out", "matches skip 'last'"),
    }
    assert coverage.share == FIRST / (FIRST + LAST)
    assert str(report).splitlines()[0] == (
        "converted 2 layers, skipped 1: converted 57.1 % of the FLOPs; left out: last 42.9 % "
        "(matches skip 'last'); not called: late"
    )


def test_an_observation_says_it_too() -> None:
    with unclamp.observe(Pair(), skip=["last"], example=batch()) as observation:
        states = {p.fqn: p.state for p in coverage_of(observation.report).products}
        assert states == {"first": "observed", "last": "left out"}
        assert (
            str(observation)
            .splitlines()[0]
            .endswith(
                "; observed 57.1 % of the FLOPs; left out: last 42.9 % (matches skip 'last'); "
                "not called: late"
            )
        )


def test_without_an_example_nothing_is_said_of_flops() -> None:
    report = unclamp.convert(Pair(), unclamp.Recipe())
    assert report.coverage is None
    assert str(report).splitlines()[0] == "converted 3 layers, skipped 0"


def test_it_is_what_coverage_says_of_the_converted_model() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 5, 16)
    recipe = unclamp.Recipe().override("linear2", scaling=unclamp.HighPrecision())
    recipe = recipe.override("*.qk", scaling=unclamp.Dynamic())
    report = unclamp.convert(model, recipe, skip=["linear1"], example=x)
    found = {p.fqn: (p.flops, p.state) for p in coverage_of(report).products}
    assert found == {p.fqn: (p.flops, p.state) for p in unclamp.coverage(model, x).products}
    assert found["self_attn.qk"][1] == "converted"
    assert {state for _, state in found.values()} == {"converted", "observed", "left out"}


def test_layers_where_fp8_does_not_pay_are_left_out_with_that_reason() -> None:
    report = unclamp.convert(
        Pair(),
        unclamp.Recipe(),
        where_it_pays=True,
        tokens=TOKENS,
        timer=_pays_for_many_outputs,
        example=batch(),
    )
    (left,) = coverage_of(report).left_out().items()
    assert left[0] == "last"
    assert left[1][0] == LAST / (FIRST + LAST)
    assert left[1][1].startswith("FP8 does not pay: 0.50x the speed of float32 at 6 tokens")


def _pays_for_many_outputs(layer: nn.Module, case: Any) -> float:
    is_plain = type(layer) is nn.Linear
    return 1.0 if is_plain else 0.5 if case.out_features == HIDDEN else 2.0


class ByData(nn.Module):
    """Chooses its layer by what it is given, of which shapes say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.other = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x.sum().item() > 0 else self.other(x)


def test_a_model_whose_way_depends_on_data_runs_with_them() -> None:
    report = unclamp.convert(ByData(), unclamp.Recipe(), example=torch.ones(TOKENS, WIDTH))
    coverage = coverage_of(report)
    assert (coverage.how, coverage.idle) == ("real", ("other",))
    assert [(p.fqn, p.state) for p in coverage.products] == [("up", "converted")]


# ---- a step that cannot be run -----------------------------------------------------------------


def converts(model: nn.Module, example: Any) -> object:
    return unclamp.convert(model, unclamp.Recipe(), example=example)


def observes(model: nn.Module, example: Any) -> object:
    return unclamp.observe(model, example=example)


@pytest.mark.parametrize("ask", [converts, observes])
@pytest.mark.parametrize(
    ("example", "said"),
    [
        (torch.randn(TOKENS, WIDTH + 1), "mat1 and mat2 shapes cannot be multiplied"),
        ({"z": torch.randn(1)}, "unexpected keyword argument 'z'"),
        ((), "missing 1 required positional argument: 'x'"),
        ("a batch", "got str"),
    ],
    ids=["shape", "name", "nothing", "text"],
)
def test_an_example_that_does_not_fit_leaves_the_model_as_it_was(
    ask: Callable[[nn.Module, Any], object], example: Any, said: str
) -> None:
    model = Pair()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(unclamp.ConvertError, match="a mapping of named ones") as caught:
        ask(model, example)
    assert said in str(caught.value)
    assert [type(m) for m in model.modules()] == classes
    assert find_ledgers(model) == []
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_was_converted_before_stays_too() -> None:
    model = Pair()
    unclamp.convert(model, unclamp.Recipe.uniform("dynamic"), skip=["last", "late"])
    (ledger,) = find_ledgers(model)
    with pytest.raises(unclamp.ConvertError, match="the model is not converted"):
        unclamp.convert(model, unclamp.Recipe(warmup_steps=3), example=torch.randn(2, 3))
    assert find_ledgers(model) == [ledger]
    assert type(model.last) is nn.Linear
    assert ledger.recipe == unclamp.Recipe.uniform("dynamic")
    assert len(ledger.sites) == 3


def test_the_rest_of_a_model_is_converted_with_an_example() -> None:
    model = Pair()
    unclamp.convert(model, unclamp.Recipe(), skip=["last", "late"])
    report = unclamp.convert(model, unclamp.Recipe(), example=batch())
    assert {p.fqn: p.state for p in coverage_of(report).products} == {
        "first": "converted", "last": "converted"
    }  # fmt: skip


# ---- in a run ----------------------------------------------------------------------------------


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in sorted((path / "events").glob("*.parquet")):
        rows += pq.read_table(file).to_pylist()
    return [json.loads(row["data"]) for row in rows if row["kind"] == kind]


def run(model: nn.Module, path: Path, **named: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, path, **named) as recorder:
        for late in (False, True):
            loss = model(batch(), late=late).sum()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)


@pytest.mark.parametrize("is_observed", [False, True])
def test_a_recorder_takes_the_coverage_of_the_conversion(tmp_path: Path, is_observed: bool) -> None:
    model = Pair()
    if is_observed:
        coverage = coverage_of(unclamp.observe(model, example=batch()).report)
    else:
        coverage = coverage_of(unclamp.convert(model, unclamp.Recipe(), example=batch()))
    with pytest.warns(unclamp.UnclampWarning, match="late: called in the training, and not"):
        run(model, tmp_path / "run")
    assert events(tmp_path / "run", "coverage") == [coverage.summary()]
    assert events(tmp_path / "run", "outside") == [{"modules": ["late"]}]


def test_a_recorder_takes_what_it_is_given_first(tmp_path: Path) -> None:
    model = Pair()
    unclamp.convert(model, unclamp.Recipe(), example=batch())
    given = unclamp.coverage(model, batch(), late=True)
    run(model, tmp_path / "run", coverage=given)
    assert events(tmp_path / "run", "coverage") == [given.summary()]


def test_one_who_converted_already_asks_afterwards(tmp_path: Path) -> None:
    model = Pair()
    unclamp.convert(model, unclamp.Recipe())
    found = cover(model, {"x": batch(), "late": True})
    assert found.idle == ()
    run(model, tmp_path / "run")
    assert events(tmp_path / "run", "coverage") == [found.summary()]
    with pytest.raises(unclamp.ConvertError, match="expected a model that is converted"):
        cover(Pair(), batch())


def test_the_last_conversion_decides(tmp_path: Path) -> None:
    model = Pair()
    unclamp.convert(model, unclamp.Recipe(), skip=["last"], example=batch())
    unclamp.convert(model, unclamp.Recipe())
    run(model, tmp_path / "run")
    assert events(tmp_path / "run", "coverage") == []


def test_the_coverage_of_a_part_is_not_taken_for_that_of_the_whole(tmp_path: Path) -> None:
    model = Pair()
    unclamp.convert(model.first, unclamp.Recipe(), example=batch())
    run(model, tmp_path / "run")
    assert events(tmp_path / "run", "coverage") == []


class Wrapper(nn.Module):
    """As DDP is one: it calls its model by the name that it has in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


def test_a_wrapper_and_a_copy_keep_it(tmp_path: Path) -> None:
    model = Pair()
    unclamp.convert(model, unclamp.Recipe(), example={"x": batch(), "late": True})
    twin = copy.deepcopy(model)
    run(twin, tmp_path / "copy")
    run(Wrapper(model), tmp_path / "wrapped")
    run(pickle.loads(pickle.dumps(model)), tmp_path / "pickled")
    for name in ("copy", "wrapped", "pickled"):
        assert len(events(tmp_path / name, "coverage")) == 1


# ---- many products -----------------------------------------------------------------------------


def test_products_of_one_rule_share_their_plan() -> None:
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    recipe = unclamp.Recipe().override("[012]", scaling=unclamp.Dynamic())
    report = attach(model, recipe, skip=(), strict=False, observes=False)
    assert len({id(plan) for plan in report.converted.values()}) == 2
    assert report.converted == {str(i): recipe.plan(str(i)) for i in range(6)}


def test_garbage_is_collected_again_even_after_an_error() -> None:
    assert gc.isenabled()
    seen: list[bool] = []

    def fail() -> None:
        with uncollected():
            seen.append(gc.isenabled())
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()  # as its user wants it
    finally:
        gc.enable()
