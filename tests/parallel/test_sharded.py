"""What a product of DTensors does beside training: shapes, state, errors, agreed scales."""

import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import unclamp
from ranks import run_ranks
from unclamp import MX, Dynamic, Guarded, PerBlock, PerRow, Recipe, Static
from unclamp.nn.converted import Converted
from unclamp.nn.operands import Operands
from unclamp.numerics import Stat

SHARED = Dynamic(shared=True)


def _layers(*, width: int = 64, bias: bool = True) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, width, bias=bias), nn.Linear(width, 16, bias=bias))


def _split(model: nn.Module, mesh: Any) -> Any:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


def _batch() -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(1))


def _sites(layer: Any) -> Operands:
    assert isinstance(layer, Converted)
    return layer.sites


# ---- rows and blocks ---------------------------------------------------------------------------

ROWS = Recipe(input=SHARED, grad_output=SHARED, weight=Guarded(granularity=PerRow(), history_len=3))


def _rows(rank: int, order: str) -> list[Any]:
    model, mesh = _layers(), init_device_mesh("cpu", (2,))
    if order == "convert first":
        unclamp.convert(model, ROWS)
    _split(model, mesh)
    if order == "convert last":
        unclamp.convert(model, ROWS)
    before = [_sites(m).ledger.sites[_sites(m).indices["weight"]].scales for m in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    amaxes: list[Any] = []
    for _ in range(2):
        parts: list[Any] = [m.weight.to_local().detach().abs() for m in model]
        amaxes.append([torch.cat([p.amax(1), p.amax(0)]).tolist() for p in parts])
        model(_batch().requires_grad_()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    histories = [_history(m)[:, :2].tolist() for m in model]
    state = model.state_dict()
    other = _split(_layers(), mesh) if order == "convert last" else _layers()
    unclamp.convert(other, ROWS)
    other = other if order == "convert last" else _split(other, mesh)
    other.load_state_dict(state)
    loaded = [_history(m) for m in other]
    shapes = [list(state[f"{n}.unclamp_weight_amax_history"].shape) for n in (0, 1)]
    return [before, amaxes, histories, [float(h.abs().max()) for h in loaded], shapes]


def _history(module: nn.Module) -> torch.Tensor:
    sites = _sites(module)
    return sites.ledger.history_of(sites.indices["weight"])


@pytest.mark.parametrize("order", ["convert first", "convert last"])
def test_rows_of_a_history_are_those_of_the_part(order: str) -> None:
    for before, amaxes, histories, loaded, shapes in run_ranks(2, _rows, order):
        assert before == [32 + 32, 16 + 32]  # rows of the part, and columns for grad_input
        for layer in (0, 1):
            newest_first = [
                list(pair) for pair in zip(amaxes[1][layer], amaxes[0][layer], strict=True)
            ]
            torch.testing.assert_close(histories[layer], newest_first, rtol=0, atol=0)
        # Other ranks have other rows, so a state_dict holds none: zeros, as one process has them.
        assert loaded == [0, 0]
        assert shapes == [[64 + 32, 3], [16 + 64, 3]]


def _rows_under_fsdp(rank: int) -> list[int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model: Any = nn.Sequential(*_split(_layers(), mesh["tp"]).children(), nn.ReLU())
    fully_shard(model, mesh=mesh["dp"])
    unclamp.convert(model, ROWS)
    rows = [_sites(m).ledger.sites[_sites(m).indices["weight"]].scales for m in model[:2]]
    model(_batch()).square().mean().backward()
    return [*rows, _sites(model[0]).ledger.layout.rows]


def test_rows_under_fsdp_are_those_of_a_forward() -> None:
    # Four sites with one scale each, and two with those of rows and columns.
    assert run_ranks(4, _rows_under_fsdp) == [[64, 48, 4 + 64 + 48]] * 4


def _uneven(rank: int, width: int) -> tuple[Any, Any]:
    model, mesh = _layers(width=width), init_device_mesh("cpu", (2,))
    unclamp.convert(model, Recipe.uniform(SHARED))
    whole = _layers(width=width)
    unclamp.convert(whole, Recipe.uniform(SHARED), group=())
    found = []
    # A local tensor in between would not say how uneven it is.
    styles = {"0": ColwiseParallel(use_local_output=False), "1": RowwiseParallel()}
    for each in (parallelize_module(model, mesh, styles), whole):
        x = _batch().requires_grad_()
        y = each(x)
        y.square().mean().backward()
        grads: list[Any] = [p.grad for p in each.parameters()]
        wholes = [getattr(grad, "full_tensor", grad.clone)() for grad in grads]
        assert x.grad is not None
        found.append([t.tolist() for t in (y, x.grad, *wholes)])
    return found[0], found[1]


@pytest.mark.parametrize("width", [7, 1])
def test_parts_may_be_uneven_or_empty(width: int) -> None:
    for parts, whole in run_ranks(2, _uneven, width):
        for made, wanted in zip(parts, whole, strict=True):
            torch.testing.assert_close(
                torch.tensor(made), torch.tensor(wanted), rtol=1e-5, atol=1e-6
            )


def _router(rank: int) -> list[Any]:
    """Return what a whole layer makes of tokens that are spread."""
    mesh = init_device_mesh("cpu", (2,))
    layer = nn.Linear(32, 4)
    whole = nn.Linear(32, 4)
    whole.load_state_dict(layer.state_dict())
    for each, group in ((layer, None), (whole, ())):
        unclamp.convert(each, Recipe.uniform(SHARED), group=group)
    for name in ("weight", "bias"):
        spread = distribute_tensor(getattr(layer, name).detach(), mesh, [Replicate()])
        setattr(layer, name, nn.Parameter(spread))
    x: Any = distribute_tensor(_batch(), mesh, [Shard(0)])
    y: Any = layer(x)
    y.square().mean().backward()
    z = whole(_batch())
    z.square().mean().backward()
    w: Any = layer.weight
    b: Any = layer.bias
    return [
        [str(p) for t in (y, w.grad, b.grad) for p in t.placements],
        [t.full_tensor().tolist() for t in (y, w.grad, b.grad)],
        [t.tolist() for t in (z, whole.weight.grad, whole.bias.grad) if t is not None],
    ]


def test_gradients_of_a_whole_layer_are_summed_over_ranks_with_other_tokens() -> None:
    for placements, made, wanted in run_ranks(2, _router):
        assert placements == ["S(0)", "R", "R"]
        for one, other in zip(made, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other))


# ---- where nothing is cast, checkpointing, compile ---------------------------------------------


def _observed(rank: int, how: str) -> tuple[bool, int, int]:
    mesh = init_device_mesh("cpu", (2,))
    model, plain = _split(_layers(), mesh), _split(_layers(), mesh)
    if how == "observe":
        unclamp.observe(model, Recipe.uniform(SHARED))
    else:
        unclamp.convert(model, Recipe(weight=SHARED, warmup_steps=2))
    seen: list[Any] = []
    _sites(model[0]).ledger.subscribe(lambda update: seen.append(update.stats.clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    outputs = []
    for each in (model, plain):
        x = _batch().requires_grad_()
        y = each(x)
        y.square().mean().backward()
        outputs.append([y, x.grad, *(p.grad.to_local() for p in each.parameters())])
    optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    elements = seen[0][:, Stat.ELEMENTS]
    return same, int(elements.sum()), int(seen[0][:, Stat.CASTS].sum())


@pytest.mark.parametrize("how", ["observe", "warm-up"])
def test_where_casts_are_only_counted_the_plain_layer_computes(how: str) -> None:
    # Of each layer the input, its part of the weight, and the gradient.
    elements = (8 * 32 + 32 * 32 + 8 * 32) + (8 * 32 + 16 * 32 + 8 * 16)
    assert run_ranks(2, _observed, how) == [(True, elements, 6)] * 2


def _each_kind(rank: int, how: str) -> list[Any]:
    warnings.simplefilter("ignore")  # torch's compiler warns of what it does itself
    scaling = Dynamic() if how == "compiled" else SHARED
    results = []
    for kind in ("plain", how):
        model = _split(_layers(), init_device_mesh("cpu", (2,)))
        unclamp.convert(model, Recipe.uniform(scaling))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run: Any = torch.compile(model, backend="aot_eager") if "comp" in kind else model
        for _ in range(2):
            if kind == "plain" or "comp" in kind:
                y = run(_batch())
            else:
                y = checkpoint(run, _batch().requires_grad_(), use_reentrant=kind == "reentrant")
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        counts = _sites(model[0]).ledger
        parts: list[Any] = [p.to_local().tolist() for p in model.parameters()]
        results.append([parts, counts.amax_history.tolist(), counts.updates])
    return results


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled", "compiled, shared"])
def test_checkpointed_or_compiled_it_is_the_same(how: str) -> None:
    for plain, other in run_ranks(2, _each_kind, how):
        assert plain == other


# ---- what it refuses ---------------------------------------------------------------------------


def _refused(rank: int, case: str) -> str:
    mesh, layer = init_device_mesh("cpu", (2,)), nn.Sequential(nn.Linear(32, 16))
    scaling = Dynamic(MX(), shared=True) if case == "straddling" else SHARED
    unclamp.convert(layer, Recipe.uniform(scaling))
    x: Any = _batch()
    if case == "straddling":
        parallelize_module(layer, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    else:
        parallelize_module(layer[0], mesh, ColwiseParallel())
        layer[0]._forward_pre_hooks.clear()
    if case == "partial weight":
        part = DTensor.from_local(torch.randn(16, 32), mesh, [Partial()], run_check=False)
        layer[0].weight = nn.Parameter(part)
        x = distribute_tensor(x, mesh, [Replicate()])
    try:
        layer(x)
    except unclamp.UnsupportedError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("plain input", "0: expected DTensors on one mesh.*input no DTensor, weight .*dim=0"),
        ("partial weight", "0: expected DTensors.*weight .*Partial"),
        (
            "straddling",
            "0: expected blocks of input that lie on one rank.*blocks mx of parts of 16",
        ),
    ],
)
def test_what_it_does_not_know_is_one_clear_error_on_every_rank(case: str, words: str) -> None:
    for said in run_ranks(2, _refused, case):
        assert re.search(words, said), said


# ---- agreeing on scales ------------------------------------------------------------------------


def _replicas(rank: int, scaling: Dynamic, wrapper: str) -> tuple[Any, Any]:
    """Return gradients of a model whose tokens are spread over ranks, and those of one process."""
    found = []
    for is_spread in (True, False):
        model: nn.Module = _layers()
        unclamp.convert(model, Recipe.uniform(scaling), group=None if is_spread else ())
        x = _batch() * torch.linspace(1, 9, 8)[:, None]
        if is_spread:
            x = x.chunk(2)[rank].contiguous()
            if wrapper == "ddp":
                model = DistributedDataParallel(model)
            else:
                fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model(x).square().sum().div(2 if is_spread else 4).backward()
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
        found.append([t.tolist() for t in grads])
    return found[0], found[1]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "scaling",
    [SHARED, Dynamic(PerRow(), shared=True), Dynamic(PerBlock(1, 4), shared=True)],
    ids=["tensor", "row", "block"],
)
def test_replicas_agree_on_the_scale_of_the_whole_batch(scaling: Dynamic, wrapper: str) -> None:
    for spread, whole in run_ranks(2, _replicas, scaling, wrapper):
        for made, wanted in zip(spread, whole, strict=True):
            # The mean over ranks halves what each sums: powers of two are exact.
            torch.testing.assert_close(
                torch.tensor(made) * 2, torch.tensor(wanted) * 2, rtol=1e-5, atol=1e-4
            )


def _alone(rank: int) -> bool:
    model: nn.Module = DistributedDataParallel(_layers())
    unclamp.convert(model, Recipe.uniform(SHARED))
    model(_batch()).sum().backward()
    model.eval()
    if rank == 0:
        with torch.no_grad():
            model.module(_batch())
    return True


def test_a_replica_may_evaluate_alone() -> None:
    assert run_ranks(2, _alone) == [True, True]


def _wild(rank: int) -> tuple[bool, bool]:
    model: nn.Module = _layers()
    unclamp.convert(model, Recipe.uniform(SHARED))
    model = DistributedDataParallel(model)
    dy = torch.ones(8, 16)
    if rank == 1:
        dy[0, 0] = torch.inf
    y = model(_batch())
    y.backward(dy)
    return bool(model.module[1].weight.grad.isnan().any()), bool(y.isfinite().all())


def test_an_inf_on_one_rank_makes_no_rank_wait() -> None:
    assert run_ranks(2, _wild) == [(True, True)] * 2


def test_importing_unclamp_loads_no_dtensor() -> None:
    code = "import sys, unclamp, unclamp.nn; sys.exit('torch.distributed.tensor' in sys.modules)"
    plain = "import sys, torch; sys.exit('torch.distributed.tensor' in sys.modules)"
    codes = [
        subprocess.run([sys.executable, "-c", c], check=False).returncode for c in (plain, code)
    ]
    assert codes[1] <= codes[0]


def test_shared_is_written_and_read() -> None:
    recipe = Recipe(input=SHARED, weight=Static(2.0))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert "shared = true" in recipe.to_toml()
    assert unclamp.scaling.describe(Dynamic(PerRow(), shared=True)) == "dynamic shared row"
    with pytest.raises(unclamp.RecipeError, match="expected True or False for shared, got 1"):
        Dynamic(shared=1)  # pyright: ignore[reportArgumentType]


def test_on_one_process_shared_changes_nothing() -> None:
    outputs = []
    for scaling in (SHARED, Dynamic()):
        model = _layers()
        unclamp.convert(model, Recipe.uniform(scaling))
        outputs.append(model(_batch()))
    assert torch.equal(*outputs)
