"""Where FP8 pays: what is left alone, and said; the formats of a device."""

import pytest
import torch
from torch import nn

import unclamp
from unclamp import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, ConvertError, Recipe
from unclamp.nn import Fp8Linear, convert
from unclamp.nn.payoff import Case, step_ms
from unclamp.numerics.gpu.formats import native_format


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(16, 64, bias=False))


def timed_by_size(asked: list[Case]):
    """Return a timer by which FP8 is twice as fast from 64 x 64 on, and half as fast below."""

    def timer(layer: nn.Module, case: Case) -> float:
        asked.append(case)
        if not isinstance(layer, Fp8Linear):
            return 10.0
        return 5.0 if case.in_features * case.out_features >= 64 * 64 else 20.0

    return timer


def test_layers_that_do_not_pay_are_left_and_reported():
    m = model()
    report = convert(m, Recipe(), where_it_pays=True, tokens=128, timer=timed_by_size([]))
    assert list(report.converted) == ["0"]
    assert report.skipped == {
        "1": "FP8 does not pay: 0.50x the speed of float32 at 128 tokens, 64 to 16",
        "2": "FP8 does not pay: 0.50x the speed of float32 at 128 tokens, 16 to 64",
    }
    assert [type(layer) is Fp8Linear for layer in m] == [True, False, False]


def test_a_shape_is_measured_once():
    asked: list[Case] = []
    timer = timed_by_size(asked)
    for _ in range(2):
        m = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        convert(m, Recipe(), where_it_pays=True, tokens=256, timer=timer)
    assert len(asked) == 2  # plain and FP8
    m = nn.Sequential(nn.Linear(64, 64))
    convert(m, Recipe(), where_it_pays=True, tokens=512, timer=timer)
    assert len(asked) == 4


def test_skipped_layers_are_not_measured():
    asked: list[Case] = []
    convert(model(), Recipe(), skip=["1", "2"], where_it_pays=True, tokens=64,
            timer=timed_by_size(asked))  # fmt: skip
    assert {case.out_features for case in asked} == {64}


@pytest.mark.parametrize("tokens", [None, 0, True, 1.5])
def test_tokens_are_asked_for(tokens):
    m = model()
    with pytest.raises(ConvertError, match="expected tokens"):
        convert(m, Recipe(), where_it_pays=True, tokens=tokens)
    assert not any(isinstance(layer, Fp8Linear) for layer in m)


def test_the_timer_runs_a_step_of_either_layer():
    case = Case(8, 16, 16, True, torch.float32, torch.device("cpu"), "")
    layer = nn.Linear(16, 16)
    assert step_ms(layer, case) > 0
    unclamp.convert(layer, Recipe())
    assert step_ms(layer, case) > 0


def test_amds_mi300_gets_its_own_formats():
    assert native_format(E4M3FN, "gfx942") is E4M3FNUZ
    assert native_format(E5M2, "gfx942") is E5M2FNUZ
    for arch in ("gfx950", "sm_90", "cpu"):
        assert native_format(E4M3FN, arch) is E4M3FN
        assert native_format(E5M2, arch) is E5M2
