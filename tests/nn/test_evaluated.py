"""Copies in evaluation: what they clamp, how old their scales are, and how they follow."""

import copy
import pickle
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import unclamp
from truths.kept import drive, fresh, train
from unclamp import ConvertError, Delayed, Dynamic, Guarded, Recipe, Scaling, UnclampWarning

GROWS_AT, COPIED_AT, STEPS = 15, 10, 20


def through_fp8(x: Tensor, scale: float) -> Tensor:
    """Return what another library's cast makes of a tensor; NaN where it is out of range."""
    scaled = (x.detach().numpy() * np.float32(scale)).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(scaled.astype(np.float32) / np.float32(scale))


def clamped(x: Tensor, amax: float) -> int:
    """Return how many elements of a tensor are out of range at the scale of an amax."""
    return int(through_fp8(x, 448 / amax).isnan().sum())


def planted(scaling: Scaling, copied_at: int = COPIED_AT) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a model, an average of it made on the way, and an input that is 20 times larger.

    The largest input of the time before the copy is 1, so that truths are easy.
    """
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    unclamp.convert(model, Recipe.uniform(scaling))
    optimizer = SGD(model.parameters(), lr=1e-3)
    average = None
    for step in range(STEPS):
        if step == copied_at:
            average = copy.deepcopy(model)
        x = torch.randn(128, 64)
        x = x / x.abs().max() * (1 if step < GROWS_AT else 20)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:  # as timm's ModelEmaV2
            with torch.no_grad():
                for mine, new in zip(
                    average.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    mine.copy_(0.9 * mine + 0.1 * new)
    assert average is not None
    x = torch.randn(128, 64)
    return model, average.eval(), x / x.abs().max() * 20


def written(model: nn.Module) -> None:
    """Write a model's weights as an average does, without a change of their values."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.mul_(1.0)


def relative_error(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        weight, bias = model.get_parameter("weight"), model.get_parameter("bias")
        truth = nn.functional.linear(x, weight, bias)
        return float((model(x) - truth).norm() / truth.norm())


def test_an_average_says_once_what_it_clamps_on_old_scales_and_follows_when_asked() -> None:
    model, average, x = planted(Delayed())
    want = clamped(x, 1.0)
    assert want > 5000
    with pytest.warns(
        UnclampWarning, match=f"{want:,} of 8,192 elements.*10 updates older"
    ) as said:
        error = relative_error(average, x)
    assert error > 0.8
    assert len(said) == 1
    counts = unclamp.evaluation_counts(average)
    assert (counts.saturated, counts.age) == (want, 10)
    assert counts.sites[0].name == unclamp.SiteName("", "input")
    assert counts.sites[0].overshoot == pytest.approx(20)
    relative_error(average, x)  # does not warn again, and counts on
    assert unclamp.evaluation_counts(average, reset=True).saturated == 2 * want
    unclamp.refresh(average, from_=model)
    assert relative_error(average, x) < 0.05
    counts = unclamp.evaluation_counts(average)
    assert (counts.saturated, counts.age, counts.elements) == (0, 0, 128 * 64 + 64 * 64)


def test_a_refreshed_average_computes_what_another_library_does() -> None:
    model, average, x = planted(Delayed())
    unclamp.refresh(average, from_=model)
    weight, bias = average.get_parameter("weight"), average.get_parameter("bias")
    x_hat = through_fp8(x, 448 / 20)  # the largest input of the model's history
    w_hat = through_fp8(weight, 448 / float(weight.detach().abs().max()))
    with torch.no_grad():
        assert torch.allclose(average(x), x_hat @ w_hat.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "copied_at"), [(Guarded(), COPIED_AT), (Dynamic(), COPIED_AT), (Delayed(), 0)]
)
def test_a_copy_that_clamps_nothing_says_nothing(scaling: Scaling, copied_at: int) -> None:
    _, average, x = planted(scaling, copied_at)
    assert relative_error(average, x) < 0.05
    counts = unclamp.evaluation_counts(average)
    assert (counts.saturated, counts.age) == (0, STEPS - copied_at)


def test_a_copy_outlives_its_source_and_still_knows_its_age() -> None:
    model, average, x = planted(Delayed())
    del model
    with pytest.warns(UnclampWarning, match="10 updates older"):
        average(x)  # with gradients enabled, and never run backward
    assert unclamp.evaluation_counts(copy.deepcopy(average)).age == 10


def test_a_copy_whose_source_has_not_gone_on_does_not_warn() -> None:
    model = fresh()
    drive(model, 1.0, 1.0)
    twin = copy.deepcopy(model).eval()
    twin(torch.full((2, 6), 8.0))
    counts = unclamp.evaluation_counts(twin)
    assert (counts.age, counts.sites[0].saturated) == (0, 12)


def test_what_was_clamped_while_scales_were_new_is_no_reason_to_warn() -> None:
    model = fresh()
    drive(model, 1.0)
    twin = copy.deepcopy(model).eval()
    twin(torch.full((2, 6), 8.0))
    drive(model, 1.0)
    twin(torch.full((2, 6), 0.5))
    assert unclamp.evaluation_counts(twin).age == 1
    written(twin)
    twin(torch.full((2, 6), 0.5))
    with pytest.warns(UnclampWarning, match="1 update older"):
        twin(torch.full((2, 6), 2.0))


def best_so_far(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def target(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    drive(model, 1.0)
    written(other)
    other.load_state_dict(model.state_dict())
    return other


def average_at_rest(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    drive(model, 1.0)
    written(other)
    unclamp.refresh(other, from_=model)
    return other


@pytest.mark.parametrize("made", [best_so_far, target, average_at_rest])
def test_a_copy_that_is_meant_to_be_old_says_nothing_until_it_is_written(made) -> None:
    model = fresh()
    drive(model, 1.0)
    other = made(model).eval()
    drive(model, 1.0, 1.0, 1.0)
    with torch.no_grad():
        other(torch.full((2, 6), 8.0))
        counts = unclamp.evaluation_counts(other)
        assert counts.age == 3
        assert [s.saturated for s in counts.sites if str(s.name) == "0 input"] == [12]
        written(other)
        with pytest.warns(UnclampWarning, match="3 updates older.*weights were written since"):
            other(torch.full((2, 6), 8.0))


def test_one_clamped_element_of_an_average_is_no_reason_to_warn() -> None:
    model = fresh()
    drive(model, 1.0)
    average = copy.deepcopy(model).eval()
    drive(model, 1.0)
    written(average)
    x = torch.full((2, 6), 1.0)
    x[0, 0] = 1.25
    with torch.no_grad():
        average(x)
        assert unclamp.evaluation_counts(average).sites[0].saturated == 1
        with pytest.warns(UnclampWarning, match="2 of 24 elements"):
            average(x)


def test_an_average_that_is_written_through_data_shows_when_it_is_written_again() -> None:
    model = fresh()
    drive(model, 1.0)
    average = copy.deepcopy(model).eval()
    drive(model, 1.0)
    x = torch.full((2, 6), 8.0)
    with torch.no_grad():
        average(x)
        for weight in average.parameters():
            weight.data.mul_(0.9)
        with pytest.warns(UnclampWarning, match="1 update older"):
            average(x)


def test_a_copy_that_trains_has_scales_of_its_own() -> None:
    model = fresh()
    drive(model, 1.0)
    twin = copy.deepcopy(model)
    drive(model, 1.0, 1.0)
    assert unclamp.evaluation_counts(twin).age == 2
    drive(twin, 4.0)
    with torch.no_grad():
        twin.eval()(torch.full((2, 6), 8.0))  # clamps, and does not warn
    assert unclamp.evaluation_counts(twin).age == 0


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torchs_average_has_the_right_weights_counts_and_follows(use_buffers: bool) -> None:
    layer = nn.Linear(6, 8)
    model = nn.Sequential(layer, nn.BatchNorm1d(8), nn.Linear(8, 4))
    unclamp.convert(model, Recipe.uniform(Delayed(history_len=4)))
    optimizer = SGD(model.parameters(), lr=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    weight = None
    for size in (1.0, 1.0, 8.0):
        model((torch.rand(16, 6) - 0.5) * size).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        new = layer.weight.detach()
        weight = new.clone() if weight is None else (weight + new) / 2
    assert weight is not None
    assert torch.allclose(average.module.get_parameter("0.weight"), weight)
    unclamp.refresh(average, from_=model)
    with torch.no_grad():
        average.eval()(torch.full((4, 6), 3.9))
    counts = unclamp.evaluation_counts(average)
    first = [site for site in counts.sites if site.name.fqn == "0"]
    assert [(site.elements, site.saturated) for site in first] == [(24, 0), (48, 0)]
    assert counts.age == 0
    assert {site.name.fqn for site in counts.sites} == {"0", "2"}


def test_an_average_of_states_that_is_loaded_says_so_when_it_clamps() -> None:
    model = fresh()
    average = None
    for amax in (1.0, 1.0, 1.0, 64.0):
        drive(model, amax)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        average = average or state
        for key, value in state.items():
            average[key].lerp_(value, 0.25)
    assert average is not None
    other = fresh().eval()
    other.load_state_dict(average)
    assert unclamp.evaluation_counts(other).age is None
    with pytest.warns(UnclampWarning, match="an average of several states"), torch.no_grad():
        other(torch.full((2, 6), 64.0))
    unclamp.refresh(other, from_=model)
    with torch.no_grad():
        other(torch.full((2, 6), 64.0))
    assert unclamp.evaluation_counts(other).age == 0


def test_evaluations_count_apart_and_change_nothing_of_the_training() -> None:
    model, other = fresh(), fresh()
    other.load_state_dict(model.state_dict())
    for _ in range(2):
        mine, theirs = train(model, 2), train(other, 2)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        with torch.no_grad():
            model.eval()(torch.randn(50, 6) * 30)
        model.train()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert unclamp.evaluation_counts(model).sites
    assert unclamp.evaluation_counts(other).sites == ()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_copy", [False, True])
def test_the_first_forward_of_reentrant_checkpointing_is_no_evaluation(
    training: bool, is_copy: bool
) -> None:
    model = fresh().train(training)
    model = copy.deepcopy(model) if is_copy else model
    x = torch.randn(5, 6, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert unclamp.evaluation_counts(model).sites == ()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_evaluation_counts_what_an_eager_one_does() -> None:
    model = fresh()
    drive(model, 1.0)
    model.eval()
    x = torch.full((2, 6), 8.0)
    with torch.no_grad():
        model(x)
        want = unclamp.evaluation_counts(model, reset=True)
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert unclamp.evaluation_counts(model) == want
    assert want.sites[0].saturated == 12


def test_a_copy_made_in_a_warm_up_leaves_it_with_its_source() -> None:
    model = fresh(Recipe(warmup_steps=2))
    twin = copy.deepcopy(model).eval()
    drive(model, 1.0, 1.0, 1.0)
    with torch.no_grad():
        twin(torch.ones(2, 6))
    assert unclamp.evaluation_counts(twin).sites == ()
    unclamp.refresh(twin, from_=model)
    with torch.no_grad():
        assert torch.equal(twin(torch.full((2, 6), 0.3)), model.eval()(torch.full((2, 6), 0.3)))
    assert unclamp.evaluation_counts(twin).sites


def test_refreshing_takes_histories_over_and_keeps_what_the_copy_has_pending() -> None:
    model = fresh()
    twin = copy.deepcopy(model)
    twin(torch.full((2, 6), 5.0)).sum().backward()
    drive(model, 2.0, 9.0, 3.0)
    unclamp.refresh(twin, from_=model)
    assert twin.state_dict()["0.unclamp_input_amax_history"].tolist() == [3, 9, 2, 0]
    SGD(twin.parameters(), lr=0.0).step()
    assert twin.state_dict()["0.unclamp_input_amax_history"].tolist() == [5, 3, 9, 2]
    assert model.state_dict()["0.unclamp_input_amax_history"].tolist() == [3, 9, 2, 0]
    assert float(twin.state_dict()["0.unclamp_updates"]) == 4


def test_a_copy_of_another_recipe_takes_its_scale_from_the_history() -> None:
    model = fresh(history_len=4)
    twin = fresh(Recipe.uniform(Delayed(history_len=2, margin=1)))
    drive(model, 8.0, 2.0, 1.0)
    unclamp.refresh(twin, from_=model)
    assert twin.state_dict()["0.unclamp_input_amax_history"].tolist() == [1, 2]
    assert float(twin.state_dict()["0.unclamp_input_scale"]) == 448 / 2 / 2


def test_what_cannot_be_refreshed_or_counted_is_refused() -> None:
    model = fresh()
    with pytest.raises(ConvertError, match="scaling state of its own"):
        unclamp.refresh(model, from_=model)
    with pytest.raises(ConvertError, match="without converted layers"):
        unclamp.refresh(model, from_=nn.Linear(2, 2))
    with pytest.raises(ConvertError, match="got 3"):
        unclamp.evaluation_counts(3)  # pyright: ignore[reportArgumentType]
    other = nn.Sequential(nn.Linear(6, 8))
    unclamp.convert(other, Recipe())
    with pytest.raises(ConvertError, match="got one without 2 input and 2 more"):
        unclamp.refresh(model, from_=other)


def test_a_pickled_copy_goes_on_without_counts() -> None:
    model = fresh()
    drive(model, 1.0)
    with torch.no_grad():
        model.eval()(torch.full((2, 6), 8.0))
    twin = pickle.loads(pickle.dumps(model))
    assert unclamp.evaluation_counts(twin).sites == ()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(torch.full((2, 6), 8.0))
    assert unclamp.evaluation_counts(twin).sites[0].saturated == 12
