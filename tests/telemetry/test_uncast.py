"""Products that were converted and never cast: warned of, and noted beside the run's figures."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import unclamp
from unclamp import HighPrecision, Recipe, Recorder, RunLog, UnclampWarning
from unclamp.report.html import write_page
from unclamp.report.text import print_view
from unclamp.report.view import build_view
from unclamp.telemetry.uncast import UNCAST_STEPS

STEPS = 12


class Model(nn.Module):
    """A model with a head that is called, or whose weight a fused loss takes."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 32, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up(self.embed(tokens)).relu()


def called(model: Model, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden)


def by_hand(model: Model, hidden: Tensor) -> Tensor:
    return F.linear(hidden, model.lm_head.weight)


def by_the_embedding(model: Model, hidden: Tensor) -> Tensor:
    return hidden @ model.embed.weight.t()


def train(
    path: Path,
    head: Callable[[Model, Tensor], Tensor],
    *,
    recipe: Recipe | None = None,
    steps: int = STEPS,
    tied: bool = False,
    late: bool = False,
    casts: int = 1,
) -> dict[str, int]:
    """Train and record a model; return how often a forward hook saw each layer called."""
    torch.manual_seed(0)
    model = Model(tied=tied)
    unclamp.convert(model, Recipe() if recipe is None else recipe)
    calls: dict[str, int] = {"up": 0, "lm_head": 0}

    def counting(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        model.get_submodule(name).register_forward_hook(counting(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(8)
    with Recorder(model, path, casts=casts) as recorder:
        for step in range(steps):
            hidden = model(tokens)
            use = called if late and step == steps - 1 else head
            loss = F.cross_entropy(use(model, hidden), tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
            if step == steps - 2:  # so that the last step knows what the writer's thread has found
                recorder.flush()
    return calls


@pytest.mark.parametrize("head", [by_hand, by_the_embedding])
@pytest.mark.parametrize("casts", [1, 100])
def test_a_head_whose_weight_someone_else_reads_is_named(
    tmp_path: Path, head: Callable[[Model, Tensor], Tensor], casts: int
) -> None:
    path = tmp_path / "run"
    with pytest.warns(UnclampWarning, match="lm_head: converted, and cast nothing") as caught:
        calls = train(path, head, tied=head is by_the_embedding, casts=casts)
    assert calls == {"up": STEPS, "lm_head": 0}
    assert len(caught) == 1
    assert caught[0].filename == __file__
    view = build_view(path)
    (note,) = [note for note in view.notes if "lm_head" in note]
    assert note.startswith("Converted, and no cast in the log although it was trained: lm_head.")
    assert "was not in FP8" in note
    assert note in json.dumps(view.to_dict())
    page = write_page(view, tmp_path / "page.html").read_text()
    assert "no cast in the log although it was trained: lm_head" in page
    text = io.StringIO()
    print_view(view, Console(width=400, file=text))
    assert "no cast in the log although it was trained: lm_head" in text.getvalue()


def test_tied_weights_are_not_named_where_the_head_is_called(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(tmp_path / "run", called, tied=True) == {"up": STEPS, "lm_head": STEPS}
    assert build_view(tmp_path / "run").notes == []


class Experts(nn.Module):
    """Experts in one parameter, of which those that are asked for get the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor, number: int) -> Tensor:
        ends = torch.tensor([len(x) * (expert >= number) for expert in range(3)], dtype=torch.int32)
        return unclamp.grouped_mm(x, self.up.transpose(1, 2), offs=ends)


@pytest.mark.parametrize("calls", [True, False])
def test_an_expert_without_tokens_is_not_named_and_a_bank_that_nobody_calls_is(
    calls: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts(), "head": nn.Linear(16, 16)})
    unclamp.convert(model, Recipe())
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnclampWarning)
        with Recorder(model, tmp_path / "run") as recorder:
            for _ in range(2 * UNCAST_STEPS + 2):
                x = model["head"](torch.randn(8, 16))
                bank = model["experts"]
                y = bank(x, 1) if calls else x @ bank.up[1].T  # pyright: ignore
                y.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step()
    said = [str(w.message) for w in caught]
    assert [text.startswith("experts.up.0, experts.up.1, experts.up.2:") for text in said] == (
        [] if calls else [True]
    )


def test_too_few_steps_tell_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path / "run", by_hand, steps=7)
    assert build_view(tmp_path / "run").notes == []


def test_a_layer_in_high_precision_is_not_expected_to_cast(tmp_path: Path) -> None:
    high = HighPrecision()
    recipes = [
        Recipe().override("lm_head", scaling=high),
        Recipe().override("lm_head", output=high, grad_input=high, grad_weight=high),
    ]
    for number, recipe in enumerate(recipes):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(tmp_path / str(number), by_hand, recipe=recipe)
        assert build_view(tmp_path / str(number)).notes == []


def test_a_head_that_casts_later_is_not_in_the_report(tmp_path: Path) -> None:
    with pytest.warns(UnclampWarning, match="lm_head"):
        train(tmp_path / "run", by_hand, late=True)
    assert build_view(tmp_path / "run").notes == []
    with RunLog.open(tmp_path / "run") as log:
        kinds = log.events().column("kind").to_pylist()
    assert kinds == ["uncast"]


def test_a_half_that_is_not_trained_yet_is_not_named(tmp_path: Path) -> None:
    halves = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    unclamp.convert(halves, Recipe())
    optimizers = [torch.optim.SGD(half.parameters(), lr=0.1) for half in halves.values()]
    with warnings.catch_warnings(), Recorder(halves, tmp_path / "run") as recorder:
        warnings.simplefilter("error")
        for half, optimizer in zip(halves.values(), optimizers, strict=True):
            for _ in range(20):
                half(torch.randn(3, 4)).sum().backward()
                optimizer.step()
                recorder.step()


def test_an_event_of_a_users_own_of_this_kind_does_no_harm(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    unclamp.convert(model, Recipe())
    with Recorder(model, tmp_path / "run") as recorder:
        recorder.step(loss=1.0)
        recorder.event("uncast", products=3)
    assert build_view(tmp_path / "run").notes == []


def record(
    path: Path,
    model: nn.Module,
    step: Callable[[Tensor], None],
    evaluate: Callable[[int], object] = lambda _: None,
) -> None:
    """Train what wants gradients and record it; evaluate before, and after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        evaluate(-1)
    with Recorder(model, path) as recorder:
        for number in range(STEPS):
            step(torch.randn(3, 4))
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
            recorder.flush()
            with torch.no_grad():
                evaluate(number)


def test_a_frozen_layer_whose_weight_someone_else_reads_is_named(tmp_path: Path) -> None:
    frozen, head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    model = nn.Sequential(frozen, head)
    unclamp.convert(model, Recipe())

    def step(x: Tensor) -> None:
        head(x @ frozen.weight.t()).sum().backward()

    with pytest.warns(UnclampWarning, match="0: converted, frozen, and cast nothing") as caught:
        record(tmp_path / "run", model, step)
    assert len(caught) == 1
    (note,) = build_view(tmp_path / "run").notes
    assert note.startswith("Converted, frozen, and not called in the training: 0. If something")


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def distil(
    path: Path,
    model: nn.ModuleDict,
    forward: Callable[[int, Tensor], Tensor],
    *,
    steps: int = STEPS,
    after_step: Callable[[], None] = lambda: None,
) -> list[str]:
    """Train the student of a model and record it; return the notes. No warning comes."""
    optimizer = torch.optim.SGD(model["student"].parameters(), lr=0.1)
    with warnings.catch_warnings(), Recorder(model, path) as recorder:
        warnings.simplefilter("error", UnclampWarning)
        for step in range(steps):
            forward(step, torch.randn(3, 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
            after_step()
            recorder.step()
            recorder.flush()
    return build_view(path).notes


def pair(
    *, wants_gradients: bool = False, warmup_steps: int = 0, mode: bool = True
) -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"student": block(), "teacher": block()})
    model["teacher"].requires_grad_(wants_gradients).train(mode)
    unclamp.convert(model, Recipe(warmup_steps=warmup_steps))
    return model


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("wants_gradients", [True, False])
@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_a_teacher_that_is_called_without_gradients_is_not_named(
    mode: bool, wants_gradients: bool, warmup_steps: int, tmp_path: Path
) -> None:
    model = pair(wants_gradients=wants_gradients, warmup_steps=warmup_steps, mode=mode)
    teacher, student = model["teacher"], model["student"]

    def forward(_: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return (student(x) - target).square().mean()

    @torch.no_grad()
    def follow() -> None:
        for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
            own.lerp_(other, 0.1)

    assert distil(tmp_path / "run", model, forward, after_step=follow) == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_teacher_in_evaluation_mode_is_not_named(tmp_path: Path) -> None:
    model = pair(mode=False)
    teacher = torch.compile(model["teacher"], backend="aot_eager")

    def forward(_: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return (model["student"](x) - target).square().mean()

    assert distil(tmp_path / "run", model, forward) == []


def test_a_frozen_part_that_nobody_calls_is_said_to_be_not_called(tmp_path: Path) -> None:
    model = pair()
    (note,) = distil(tmp_path / "run", model, lambda _, x: model["student"](x).sum())
    assert note.startswith(
        "Converted, frozen, and not called in the training: teacher.0 and teacher.2. If something"
    )


@pytest.mark.parametrize("begins", [10, 14])
def test_a_teacher_that_is_called_later_is_named_no_more(begins: int, tmp_path: Path) -> None:
    model = pair()

    def forward(step: int, x: Tensor) -> Tensor:
        if step < begins:
            return model["student"](x).sum()
        with torch.no_grad():
            target = model["teacher"](x)
        return (model["student"](x) - target).square().mean()

    assert distil(tmp_path / "run", model, forward, steps=16) == []


def test_evaluations_do_not_hide_that_something_else_reads_a_weight_that_trains(
    tmp_path: Path,
) -> None:
    model = pair(wants_gradients=True)

    def step(x: Tensor) -> None:
        first, last = (model.get_parameter(f"teacher.{i}.weight") for i in (0, 2))
        F.linear(F.linear(model["student"](x), first), last).sum().backward()

    def evaluate(_: int) -> None:
        model["teacher"](torch.randn(3, 4))

    with pytest.warns(UnclampWarning, match=r"teacher.0, teacher.2: converted, and cast nothing"):
        record(tmp_path / "run", model, step, evaluate)
    (note,) = build_view(tmp_path / "run").notes
    assert "although they were trained: teacher.0 and teacher.2." in note


def test_an_evaluation_before_the_training_does_not_hide_a_frozen_weight_that_is_read(
    tmp_path: Path,
) -> None:
    model = nn.ModuleDict({"body": block(), "lm_head": nn.Linear(4, 4).requires_grad_(False)})
    unclamp.convert(model, Recipe())

    def step(x: Tensor) -> None:
        F.linear(model["body"](x), model.get_parameter("lm_head.weight")).sum().backward()

    def evaluate(step: int) -> None:
        if step == -1 or step > UNCAST_STEPS:
            model["lm_head"](torch.randn(3, 4))

    with pytest.warns(UnclampWarning, match="lm_head: converted, frozen, and cast nothing"):
        record(tmp_path / "run", model, step, evaluate)
    (note,) = build_view(tmp_path / "run").notes
    assert "frozen, and not called in the training: lm_head." in note
