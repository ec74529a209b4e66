import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pipelined import JUNK, SCHEDULES, Case, Outcome, all_on_rank, alone, junk_in_memory, on_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import unclamp
from ranks import Failure, outcomes, run_ranks
from unclamp.nn.convert import find_ledgers
from unclamp.nn.groups import groups_of
from unclamp.nn.rehearsal import rehearses

SPLITS = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""torch 2.11 cannot split the node of a function in Python, and makes shapes out of zeros."""
delayed = unclamp.Recipe()
met_in_updates = unclamp.Recipe(warmup_steps=1)
starts = pytest.mark.parametrize("recipe", [delayed, met_in_updates], ids=["fresh", "warm-up"])
recipes = {
    "guarded": unclamp.Recipe.uniform(unclamp.Guarded()),
    "dynamic": unclamp.Recipe.uniform(unclamp.Dynamic()),
    "blocks": unclamp.Recipe.uniform(unclamp.Dynamic(granularity=unclamp.PerBlock(1, 16))),
    "warm-up": unclamp.Recipe(warmup_steps=2),
}
cases = {
    **{name: Case(schedule=name, recipe=delayed) for name in SCHEDULES},
    **{
        f"{name}, {what}": replace(Case(schedule=name, recipe=delayed), **{flag: True})
        for name in ("1F1B", "InterleavedZeroBubble")
        for what, flag in (
            ("shapes told", "is_static"),
            ("evaluations between", "evaluates"),
            ("checkpointed", "checkpoints"),
        )
    },
    **{
        f"ZBVZeroBubble, {name}": Case(schedule="ZBVZeroBubble", recipe=recipe)
        for name, recipe in recipes.items()
    },
}
cases = {k: case for k, case in cases.items() if not (IS_OLD and case.schedule in SPLITS)}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Outcome]]:
    first, second = run_ranks(2, all_on_rank, list(cases.values()))
    return {name: [first[i], second[i]] for i, name in enumerate(cases)}


def check_is_single(case: Case, ranks: list[Outcome]) -> None:
    """Compare every rank's stages with those of one process, bit for bit."""
    truth = alone(case)
    names = [name for rank in ranks for name in rank.sites]
    assert sorted(names) == sorted(truth.sites)
    for rank in ranks:
        assert rank.updates == truth.updates
        for name, seen in rank.sites.items():
            single = truth.sites[name]
            for field in ("history", "scale"):
                ours, theirs = getattr(seen, field), getattr(single, field)
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{name}: {field}")
            for field in ("updates", "evaluated"):  # sums of errors in float64, in any order
                ours, theirs = getattr(seen, field), getattr(single, field)
                np.testing.assert_allclose(ours, theirs, rtol=1e-14, atol=0, err_msg=name)
        for name, weight in rank.weights.items():
            np.testing.assert_array_equal(weight, truth.weights[name], err_msg=name)
    assert [loss for rank in ranks for loss in rank.losses] == truth.losses


@pytest.mark.parametrize("name", cases)
def test_a_pipeline_sees_what_the_single_process_sees(name: str, trained):
    check_is_single(cases[name], trained[name])
    if not IS_OLD:  # the junk was there where shapes were asked for: only nobody learned of it
        saw_junk = max(rank.inputs for rank in trained[name]) >= JUNK
        assert saw_junk == (not cases[name].is_static)


def test_pipelining_may_be_imported_after_the_conversion():
    case = Case(schedule="1F1B", recipe=delayed, imports_late=True)
    check_is_single(case, run_ranks(2, on_rank, case))


def step_at(place: int, schedule: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """Make a step of the first of two stages, which gets the batch, or of the last."""
    schedule.step(*([x] if place == 0 else []), **({"target": y} if place == 1 else {}))


# ---- what a stage sees, by hand ----------------------------------------------------------------


def _largest_by_hand(rank: int) -> dict[str, list[float]]:
    """Return the newest amaxes of a stage's layer, and the largest elements that hooks saw."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.manual_seed(rank)
    layer = nn.Linear(16, 16)
    unclamp.convert(layer, delayed)
    (ledger,) = find_ledgers(layer)
    shape = torch.zeros(4, 16, requires_grad=True)
    known: dict[str, Any] = {
        "input_args": shape.detach().requires_grad_(rank > 0),
        "output_args": shape,
    }
    stage = PipelineStage(layer, rank, 2, torch.device("cpu"), **known)
    schedule = ScheduleGPipe(stage, 4, loss_fn=lambda output, y: (output - y).square().mean())
    x = torch.randn(16, 16) * torch.arange(1.0, 17.0).unsqueeze(1)
    y = torch.randn(16, 16)
    inputs, gradients = [], []

    def look(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs.append(float(args[0].detach().abs().max()))
        output.register_hook(lambda dy: gradients.append(float(dy.abs().max())))

    layer.register_forward_hook(look)
    weight = float(layer.weight.detach().abs().max())
    step_at(rank, schedule, x, y)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert len(inputs) == len(gradients) == 4
    newest = [float(ledger.history_of(i)[0]) for i in range(3)]
    return {"ours": newest, "by hand": [max(inputs), weight, max(gradients)]}


def test_the_largest_of_all_microbatches_enters_the_history():
    for rank in run_ranks(2, _largest_by_hand):
        assert rank["ours"] == rank["by hand"]


# ---- the frontend that traces ------------------------------------------------------------------


class Chain(nn.Module):
    """Three layers, of which the last ones are another stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.third = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[tokens, 16]`."""
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def _pipe(model: nn.Module) -> Any:
    from torch.distributed.pipelining import SplitPoint, pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own
        split = {"second": SplitPoint.BEGINNING}
        return pipeline(model, mb_args=(torch.zeros(4, 16),), split_spec=split)


def _trace_converted(rank: int) -> None:
    model = Chain()
    unclamp.convert(model, delayed)
    _pipe(model)


def test_a_converted_model_is_refused_on_every_rank_before_it_is_traced():
    for failed in outcomes(2, _trace_converted, collective_s=20):
        assert isinstance(failed, Failure)
        assert failed.kind == "UnsupportedError"
        assert "Convert the stages instead" in failed.text


def _data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 16, generator=g), torch.randn(16, 16, generator=g)


def _error(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (output - y).square().mean()


def _histories(model: nn.Module) -> dict[str, np.ndarray]:
    (ledger,) = find_ledgers(model)
    return {str(s.name): ledger.history_of(i).numpy() for i, s in enumerate(ledger.sites)}


def _train_traced(rank: int) -> dict[str, np.ndarray]:
    from torch.distributed.pipelining import ScheduleGPipe

    torch.manual_seed(0)
    pipe = _pipe(Chain())
    module = pipe.get_stage_module(rank)
    unclamp.convert(module, delayed)
    stage = pipe.build_stage(rank, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 4, loss_fn=_error)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):
        x, y = _data(step)
        step_at(rank, schedule, x, y)
        optimizer.step()
        optimizer.zero_grad()
    found = _histories(module)
    unclamp.revert(module)
    assert not any("unclamp" in key for key in module.state_dict())
    return found


def test_stages_that_were_traced_can_be_converted():
    torch.manual_seed(0)
    model = Chain()
    unclamp.convert(model, delayed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        for x, y in zip(*(t.chunk(4) for t in _data(step)), strict=True):
            _error(model(x), y).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(4)
        optimizer.step()
        optimizer.zero_grad()
    first, second = run_ranks(2, _train_traced)
    truth = _histories(model)
    assert sorted({**first, **second}) == sorted(truth)
    for name, history in {**first, **second}.items():
        np.testing.assert_array_equal(history, truth[name], err_msg=name)


# ---- stages that are sharded -------------------------------------------------------------------


def _sharded(rank: int, halves: bool, recipe: unclamp.Recipe) -> dict[str, Any]:
    """Train a stage over two of four ranks; each half of the batch, or both all of it."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    place, part = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    torch.manual_seed(0)
    model = [_block() for _ in range(2)][place]
    unclamp.convert(model, recipe)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["dp"])
    inputs: dict[str, float] = {}

    def look(name: str, _: nn.Module, args: tuple[torch.Tensor]) -> None:
        if not rehearses():
            inputs[name] = max(inputs.get(name, 0.0), float(args[0].detach().abs().max()))

    for name in ("0", "2"):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(partial(look, name))
    stage = PipelineStage(model, place, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(stage, 4, loss_fn=_error)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    largest = []
    with junk_in_memory():
        for step in range(3):
            inputs.clear()
            x, y = (t.chunk(2)[part] if halves else t for t in _data(step))
            step_at(place, schedule, x, y)
            optimizer.step()
            optimizer.zero_grad()
            largest.append(dict(inputs))
    held = {dist.get_process_group_ranks(g)[0] for g in groups_of(model[0], model)}
    found = {name: h.tolist() for name, h in _histories(model).items()}
    return {"place": place, "largest": largest, "histories": found, "first of group": held}


def _block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def _sharded_alone(recipe: unclamp.Recipe) -> list[dict[str, list[float]]]:
    torch.manual_seed(0)
    model = nn.Sequential(*[_block() for _ in range(2)])
    for block in model:
        unclamp.convert(block, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        for x, y in zip(*(t.chunk(4) for t in _data(step)), strict=True):
            _error(model(x), y).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(4)
        optimizer.step()
        optimizer.zero_grad()
    return [{name: h.tolist() for name, h in _histories(block).items()} for block in model]


@starts
def test_sharded_stages_with_equal_batches_see_what_the_single_process_sees(recipe: unclamp.Recipe):
    truth = _sharded_alone(recipe)
    for rank, found in enumerate(run_ranks(4, _sharded, False, recipe)):
        assert found["histories"] == truth[found["place"]]
        assert found["first of group"] == {2 * found["place"]}, rank  # and not the world's


@starts
@pytest.mark.skipif(find_spec("unclamp.nn.shared") is None, reason="nothing is shared yet")
def test_ranks_of_a_sharded_stage_agree_on_the_largest_of_theirs(recipe: unclamp.Recipe):
    ranks = run_ranks(4, _sharded, True, recipe)
    for place in range(2):
        first, second = (found for found in ranks if found["place"] == place)
        assert first["histories"] == second["histories"]
        for name in ("0", "2"):
            pairs = zip(first["largest"], second["largest"], strict=True)
            by_hand = [max(one[name], two[name]) for one, two in pairs]
            assert first["histories"][f"{name} input"][:3] == by_hand[::-1]
