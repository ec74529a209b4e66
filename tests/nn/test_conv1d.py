"""Transformers' Conv1D as a product: the numbers of a linear layer with the weight turned."""

import pytest
import torch
from torch import nn

from unclamp import Dynamic, Guarded, PerRow, Recipe, convert, revert
from unclamp.nn import find_ledgers

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

RECIPES = [
    Recipe(),
    Recipe.uniform(Guarded()),
    Recipe(weight=Dynamic(granularity=PerRow()), input=Dynamic(granularity=PerRow())),
]


def pair() -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(0)
    conv, linear = Conv1D(6, 10), nn.Linear(10, 6)
    with torch.no_grad():
        conv.bias.copy_(torch.randn(6))
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    return conv, linear


@pytest.mark.parametrize("recipe", RECIPES, ids=["delayed", "guarded", "rows"])
def test_it_computes_and_learns_as_the_linear_layer_with_its_weight_turned(recipe: Recipe) -> None:
    conv, linear = pair()
    assert list(convert(conv, recipe).converted) == [""]
    convert(linear, recipe)
    for step in range(3):
        x = torch.randn(2, 5, 10) * (step + 1)
        grad = torch.randn(2, 5, 6)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = conv(ours), linear(theirs)
        assert torch.equal(*outputs)
        for output in outputs:
            output.backward(grad)
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(conv.weight.grad.t(), linear.weight.grad)  # pyright: ignore
        assert torch.equal(conv.bias.grad, linear.bias.grad)  # pyright: ignore
        for layer in (conv, linear):
            (ledger,) = find_ledgers(layer)
            ledger.update()
            layer.zero_grad()
    states = [layer.state_dict() for layer in (conv, linear)]
    for key, value in states[0].items():
        if key.startswith("unclamp_"):
            assert torch.equal(value, states[1][key]), key


def test_it_becomes_the_plain_one_again() -> None:
    conv, _ = pair()
    x = torch.randn(3, 10)
    before = conv(x)
    convert(conv, Recipe())
    assert not torch.equal(conv(x), before)
    assert "Conv1D(nf=6, nx=10, input=delayed:e4m3fn" in repr(conv)
    revert(conv)
    assert type(conv) is Conv1D
    assert torch.equal(conv(x), before)


def test_gpt2_is_converted_whole_and_trains() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    report = convert(model, Recipe(), skip=["lm_head"])
    assert len(report.converted) == 2 * 4
    tokens = torch.randint(0, 32, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    (ledger,) = find_ledgers(model)
    assert ledger.count() == 8
    assert all(float(ledger.scale_of(i)) > 0 for i in range(len(ledger.sites)))
