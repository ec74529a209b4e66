"""What FP8 would do to an attention that is computed without it, against counts by brute force."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp
from unclamp import Dynamic, Guarded, Recipe, Static
from unclamp.nn import find_ledgers, scores
from unclamp.nn.scores import MOST_SCORES, Shape, parts
from unclamp.numerics import Stat
from unclamp.numerics.inspection import EXPONENTS, INSPECTED, LOWEST_EXPONENT

HIDDEN = ~torch.ones(7, 9, dtype=torch.bool).tril()


class Model(nn.Module):
    """An attention, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = unclamp.Attention()
        self.layer = nn.Linear(6, 6)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        """Return the layer's output."""
        return self.layer(self.attn(q, k, v, **settings))


def drawn(*, keys: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 7, 8), (2, keys, 9, 8), (2, keys, 9, 6)]
    return [torch.randn(*s, generator=generator).mul_(3).requires_grad_() for s in shapes]


def operands_by_hand(
    model: Model, tensors: list[Tensor], *, hidden: Tensor | None = HIDDEN, dropout: float = 0.0
) -> dict[str, Tensor]:
    """Return every operand of both products in a step of a loss, by autograd, without FP8."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors)
    each = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.repeat_interleave(each, 1) for t in (k, v))
    products = q @ wide_k.mT
    products.retain_grad()
    scaled = products * 8**-0.5
    scaled = scaled if hidden is None else scaled.masked_fill(hidden, -math.inf)
    p = scaled.softmax(-1) / (1 - dropout)
    output = p @ wide_v
    output.retain_grad()
    model.layer(output).square().sum().backward()
    model.zero_grad()
    assert products.grad is not None
    assert output.grad is not None
    made = {
        "attn.qk input": q, "attn.qk weight": k, "attn.qk grad_output": products.grad,
        "attn.pv input": p, "attn.pv weight": v, "attn.pv grad_output": output.grad,
    }  # fmt: skip
    return {name: x.detach() for name, x in made.items()}


def step(model: nn.Module, tensors: list[Tensor], **settings: Any) -> None:
    model(*tensors, **settings).square().sum().backward()


def counted(model: nn.Module, stat: Stat) -> dict[str, float]:
    (ledger,) = find_ledgers(model)
    return {
        str(site.name): float(value)
        for site, value in zip(ledger.sites, ledger.pending[:, stat], strict=True)
        if site.fqn.startswith("attn")
    }


LIMITS = {torch.float8_e4m3fn: (448.0, 464.0), torch.float8_e5m2: (57344.0, 61440.0)}


def lost(x: Tensor, scale: float, role: str) -> tuple[int, int]:
    """Return how many elements torch's own cast would clamp, and how many it turns into zero."""
    dtype = torch.float8_e5m2 if role == "grad_output" else torch.float8_e4m3fn
    largest, limit = LIMITS[dtype]
    scaled = x.detach().float() * scale
    codes = scaled.clamp(-largest, largest).to(dtype).float()
    return int((scaled.abs() > limit).sum()), int(((codes == 0) & (scaled != 0)).sum())


@pytest.mark.parametrize("most", [MOST_SCORES, 100, 20], ids=["whole", "heads", "rows"])
def test_counts_are_those_of_the_operands_themselves(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "MOST_SCORES", most)
    model, tensors = Model(), drawn()
    unclamp.convert(model, Recipe.uniform(Static(scale=300.0)))
    by_hand = operands_by_hand(model, tensors)
    step(model, tensors, is_causal=True)
    found = {stat: counted(model, stat) for stat in Stat}
    assert set(found[Stat.CASTS].values()) == {1}
    for name, x in by_hand.items():
        saturated, underflowed = lost(x, 300.0, name.split()[1])
        assert found[Stat.ELEMENTS][name] == x.numel()
        assert found[Stat.AMAX][name] == pytest.approx(float(x.abs().max()), rel=1e-5)
        assert found[Stat.SQUARE][name] == pytest.approx(float(x.double().square().sum()), rel=1e-4)
        assert found[Stat.SATURATED][name] == pytest.approx(saturated, abs=1)
        assert found[Stat.UNDERFLOWED][name] == pytest.approx(underflowed, abs=1)
    assert found[Stat.UNDERFLOWED]["attn.pv input"] > 0
    assert found[Stat.SATURATED]["attn.qk input"] > 0


@pytest.mark.parametrize("scaling", [Dynamic(), Guarded()], ids=["dynamic", "guarded"])
def test_parts_share_the_scale_of_the_whole(scaling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, found = drawn(), []
    layer = Model().state_dict()
    for most in (MOST_SCORES, 30):
        monkeypatch.setattr(scores, "MOST_SCORES", most)
        model = Model()
        model.load_state_dict(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        unclamp.convert(model, Recipe.uniform(scaling))
        step(model, [tensors[0] * 0.01, *tensors[1:]], is_causal=True)
        (ledger,) = find_ledgers(model)
        ledger.updates = 9  # the next one is counted again
        optimizer.step()
        step(model, tensors, is_causal=True)
        found.append({stat: counted(model, stat) for stat in Stat})
    for stat in Stat:
        assert found[0][stat] == pytest.approx(found[1][stat], rel=1e-5)
    assert set(found[0][Stat.SATURATED].values()) == {0}
    assert found[0][Stat.RECAST]["attn.qk input"] == (scaling.kind == "guarded")


def test_grouped_queries_count_their_keys_once() -> None:
    model, tensors = Model(), drawn(keys=2)
    unclamp.convert(model, Recipe())
    by_hand = operands_by_hand(model, tensors, hidden=None)
    step(model, tensors, enable_gqa=True)
    for name, x in by_hand.items():
        assert counted(model, Stat.ELEMENTS)[name] == x.numel()
        amax = counted(model, Stat.AMAX)[name]
        assert amax == pytest.approx(float(x.abs().max()), rel=1e-5)


def test_with_dropout_nothing_is_dropped_and_all_is_as_large_as_what_stays() -> None:
    model, tensors = Model(), drawn()
    unclamp.convert(model, Recipe())
    by_hand = operands_by_hand(model, tensors, hidden=None, dropout=0.5)
    step(model, tensors, dropout_p=0.5)
    p = by_hand["attn.pv input"]
    amax = counted(model, Stat.AMAX)["attn.pv input"]
    assert amax == pytest.approx(float(p.abs().max()), rel=1e-5)
    assert counted(model, Stat.ELEMENTS)["attn.pv input"] == p.numel()


def test_the_closer_look_has_the_exponents_of_probabilities() -> None:
    model, tensors = Model(), drawn()
    unclamp.convert(model, Recipe())
    p = operands_by_hand(model, tensors)["attn.pv input"]
    (ledger,) = find_ledgers(model)
    ledger.inspect("always")
    step(model, tensors, is_causal=True)
    index = next(i for i, s in enumerate(ledger.sites) if str(s.name) == "attn.pv input")
    assert ledger.details is not None
    look = ledger.details[index]
    assert look[INSPECTED] == 1
    exponents = torch.floor(torch.log2(p[p > 0])).to(torch.int64) - LOWEST_EXPONENT
    want = torch.bincount(exponents, minlength=EXPONENTS.stop - EXPONENTS.start)
    assert (look[EXPONENTS] - want).abs().sum() <= 2


def test_a_query_that_sees_nothing_has_zeros() -> None:
    model, tensors = Model(), drawn()
    unclamp.convert(model, Recipe())
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[3] = False
    step(model, tensors, attn_mask=mask)
    assert set(counted(model, Stat.NONFINITE).values()) == {0}


def test_parts_cover_an_attention_once() -> None:
    shapes = ((3, 4, 5, 6), (2, 3, 4000, 5000), (1, 1, 3, 10**7), (0, 2, 3, 4), (2, 5, 1500, 1))
    for shape in shapes:
        batch, heads, queries, keys = shape
        one = Shape(batch=batch, heads=heads, queries=queries, keys=keys, key_heads=heads)
        seen = torch.zeros(batch, heads, queries, dtype=torch.int64)
        for part in parts(one):
            view = seen[part.batch, part.heads, part.queries]
            view += 1
            assert view.numel() * keys <= max(MOST_SCORES, keys)
        assert (seen == 1).all()


def test_only_inspected_steps_are_counted(tmp_path: Path) -> None:
    def casts(step_of: Any, model: Model, steps: int) -> list[int]:
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.0), []
        (ledger,) = find_ledgers(model)
        row = next(i for i, s in enumerate(ledger.sites) if str(s.name) == "attn.pv input")
        ledger.subscribe(lambda update: seen.append(int(update.stats[row, Stat.CASTS])))
        for _ in range(steps):
            step(model, drawn())
            optimizer.step()
            step_of()
        return seen

    alone, recorded, named = Model(), Model(), Model()
    unclamp.convert(alone, Recipe())
    assert casts(lambda: None, alone, 21) == [int(i % 10 == 0) for i in range(21)]
    unclamp.convert(recorded, Recipe())
    with unclamp.Recorder(recorded, tmp_path / "run", inspect=4) as recorder:
        assert casts(lambda: recorder.step(loss=1.0), recorded, 9) == [1, 0, 0, 0] * 2 + [1]
    unclamp.observe(named, Recipe().override("*.pv", scaling="dynamic"))
    assert casts(lambda: None, named, 3) == [1, 1, 1]


def test_observing_tells_of_attention_and_recommends_nothing_for_it() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with unclamp.observe(model) as observation:
        assert list(observation.report.observed) == ["attn.qk", "attn.pv"]
        for factor in (*[1.0] * 10, 100.0):
            q, *others = drawn()
            step(model, [q * factor, *others])
            optimizer.step()
        sites = {(s.fqn, s.role): s for s in observation.sites()}
        assert sites["attn.qk", "input"].casts == 2
        assert sites["attn.qk", "input"].saturated > 0
        assert not any("qk" in rule.match for rule in observation.recipe().rules)
    assert type(model.attn) is unclamp.Attention


def test_a_graph_that_is_kept_counts_a_gradient_more() -> None:
    model, tensors = Model(), drawn()
    unclamp.convert(model, Recipe())
    loss = model(*tensors).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    casts = counted(model, Stat.CASTS)
    assert casts["attn.qk grad_output"] == 2
    assert casts["attn.qk input"] == 1


def test_an_output_can_be_written_into_and_derived_twice() -> None:
    model, tensors = Model(), drawn()
    unclamp.convert(model, Recipe())
    output = model.attn(*tensors)
    output.mul_(2)
    output.sum().backward()

    def plain(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, tensors[1], tensors[2])

    def own(q: Tensor) -> Tensor:
        return model.attn(q, *tensors[1:])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = []
        for function in (plain, own):
            q = tensors[0].detach().requires_grad_()
            (first,) = torch.autograd.grad(function(q).square().sum(), q, create_graph=True)
            found.append(torch.autograd.grad(first.sum(), q)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("skip", [[], ["layer"]], ids=["with a layer", "attention alone"])
def test_every_tenth_step_is_counted_without_a_recorder(skip: list[str]) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observation = unclamp.observe(model, skip=skip)
    for _ in range(31):
        step(model, drawn())
        optimizer.step()
    casts = {site.role: site.casts for site in observation.sites() if site.fqn == "attn.qk"}
    assert casts == {"input": 4, "weight": 4, "grad_output": 4}  # steps 0, 10, 20 and 30
