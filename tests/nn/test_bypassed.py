"""Someone else reads the weight of a converted layer: torch's encoder layer, or a nested batch."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import Dynamic, Recipe
from unclamp.names import Role
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

RECIPE = Recipe.uniform(Dynamic())


def encoder(layers: int = 1, *, norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, batch_first=True, dropout=0.0, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first).eval()


def fp8(x: Tensor) -> Tensor:
    """Return a tensor after the cast of dynamic scaling, by torch's own cast."""
    scale = 448 / x.abs().max()
    return (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale


def by_hand(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """Return what an encoder layer is, with all its linear layers in FP8."""
    attention = layer.self_attn
    projected = fp8(x) @ fp8(attention.in_proj_weight).t() + attention.in_proj_bias
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in projected.chunk(3, -1))
    heads = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    last = attention.out_proj
    x = layer.norm1(x + fp8(heads) @ fp8(last.weight).t() + last.bias)
    hidden = (fp8(x) @ fp8(layer.linear1.weight).t() + layer.linear1.bias).relu()
    return layer.norm2(x + fp8(hidden) @ fp8(layer.linear2.weight).t() + layer.linear2.bias)


def test_the_fast_path_of_an_encoder_layer_goes_through_fp8() -> None:
    plain = encoder().layers[0]
    assert isinstance(plain, nn.TransformerEncoderLayer)
    layer = copy.deepcopy(plain)
    unclamp.convert(layer, RECIPE)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        output, in_fp32, expected = layer(x), plain(x), by_hand(plain, x)
    assert not torch.equal(output, in_fp32)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-2)
    assert (output - expected).abs().mean() < (in_fp32 - expected).abs().mean() / 10


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_keeps_off_the_fast_path_and_revert_goes_back_to_it(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    plain = encoder()
    model = copy.deepcopy(plain)
    unclamp.convert(model, RECIPE)
    unclamp.convert(model, RECIPE)
    other = change(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert not torch.equal(other(x), plain(x))
        for each in (other, model):
            unclamp.revert(each)
            assert torch.equal(each(x), plain(x))
            assert not any(m._forward_pre_hooks for m in each.modules())


def test_an_observed_encoder_evaluates_as_the_plain_one_bit_for_bit() -> None:
    plain = encoder()
    model = copy.deepcopy(plain)
    x = torch.randn(2, 5, 16)
    with unclamp.observe(model), torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_nests_its_padded_batch_gives_what_it_gives_sequence_by_sequence() -> None:
    model = encoder(2)
    unclamp.convert(model, Recipe.uniform(unclamp.Static(16.0)))
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        output = model(x, src_key_padding_mask=padding)
        alone = [model(x[:1])[0], model(x[1:, :3])[0]]
    torch.testing.assert_close(output[0], alone[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(output[1, :3], alone[1], rtol=0, atol=2e-2)
    assert not output[1, 3:].any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("recipe", [RECIPE, Recipe(warmup_steps=9)], ids=["fp8", "warm-up"])
def test_a_nested_batch_is_one_product_of_all_its_tokens(
    recipe: Recipe, layout: torch.layout
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    flat = copy.deepcopy(layer)
    for each in (layer, flat):
        unclamp.convert(each, recipe)
    sequences = [torch.randn(3, 8), torch.randn(1, 8), torch.randn(4, 8)]
    nested = torch.nested.nested_tensor(sequences, layout=layout, requires_grad=True)
    output = layer(nested)
    assert output.is_nested
    assert output.layout == layout
    expected = flat(torch.cat(sequences))
    assert torch.equal(torch.cat(list(output.unbind())), expected)
    torch.cat([s * 2 for s in output.unbind()]).sum().backward()
    (expected * 2).sum().backward()
    assert layer.weight.grad is not None
    assert flat.weight.grad is not None
    assert torch.equal(layer.weight.grad, flat.weight.grad)
    if layout == torch.jagged:  # torch must know that both have the same lengths
        assert (nested @ torch.ones(8, 4) + output).is_nested
    (ledger,) = find_ledgers(layer)
    roles: tuple[Role, ...] = ("input", "weight", "grad_output")
    counts = dict(zip(roles, ledger.pending[:, Stat.ELEMENTS].tolist(), strict=True))
    assert counts == {"input": 64, "weight": 32, "grad_output": 32}
