"""Accelerate: the user's loop in FP8, recorded, saved and resumed.

The truth is the same loop without us: its own losses, a brute-force history, and the training that
was never interrupted.
"""

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import unclamp
from patience import PATIENCE_S
from unclamp import ConvertError, Delayed, Recipe, RunLog, RunLogError, ScalingState, UnclampWarning
from unclamp.nn import find_ledgers

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration

from unclamp.integrations.accelerate import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
]
HISTORY, ACCUMULATION, BATCHES = 4, 3, 12
STEPS = BATCHES // ACCUMULATION
RECIPE = Recipe.uniform(Delayed(history_len=HISTORY))


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Have no accelerator know of the one before."""
    anew_now()
    yield
    anew_now()


def anew_now() -> None:
    for each in (AcceleratorState, GradientState, PartialState):
        each._reset_state()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(3)
    grown = torch.arange(1, BATCHES + 1).repeat_interleave(2)[:, None]
    return TensorDataset(torch.randn(2 * BATCHES, 6, generator=g) * grown)


class Loop:
    """A user's own loop; what it sees is the truth."""

    def __init__(
        self,
        run: Path | None = None,
        *,
        converts: str = "before",
        attaches: bool = True,
        precision: str = "no",
        accumulation: int = ACCUMULATION,
        model: Callable[[], nn.Module] = Net,
        scaler: torch.amp.GradScaler | None = None,
        **given: Any,
    ) -> None:
        self.accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation
        )
        if scaler is not None:
            self.accelerator.scaler = scaler
        plain = self.plain = model()
        self.attached: Any = None
        if attaches and converts == "before":
            self.attached = attach(self.accelerator, plain, recipe=RECIPE, run=run, **given)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            plain, optimizer, schedule, DataLoader(data(), batch_size=2)
        )
        if attaches and converts == "after":
            self.attached = attach(self.accelerator, self.model, recipe=RECIPE, run=run, **given)
        if not attaches:
            unclamp.convert(self.accelerator.unwrap_model(self.model), RECIPE)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def train(self, batches: range = range(BATCHES)) -> "Loop":
        accelerator = self.accelerator
        total = torch.zeros(())
        for number, (x,) in enumerate(self.loader):
            if number not in batches:
                continue
            with accelerator.accumulate(self.model):
                loss = self.model(x).square().mean()
                accelerator.backward(loss)
                total = total + loss.detach() / accelerator.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.norms.append(float(norm))  # pyright: ignore
                    self.rates.append(self.optimizer.param_groups[0]["lr"])
                    self.losses.append(float(total))
                    total = torch.zeros(())
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Tensor]:
        weights = unclamp.weights_only(self.plain.state_dict())
        return {k: v.clone() for k, v in (weights | ScalingState(self.plain).state_dict()).items()}


def rows(run: Path, name: str) -> list[float]:
    return asked(run, f"SELECT {name} FROM steps ORDER BY step")


def asked(run: Path, query: str) -> list[Any]:
    with RunLog.open(run) as log:
        return [next(iter(row.values())) for row in log.sql(query).to_pylist()]


def status(run: Path) -> str:
    with RunLog.open(run) as log:
        return log.header.status


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.cell("Accelerate", "updates once a step")
@pytest.mark.cell("Accelerate", "accumulation")
@pytest.mark.parametrize("converts", ["before", "after"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_history_is_that_of_the_inputs_of_each_step(converts: str, precision: str) -> None:
    loop = Loop(converts=converts, precision=precision).train()
    (x,) = data().tensors
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    each = x.to(dtype).float().abs().reshape(STEPS, -1).amax(1)
    history = loop.state()["up.unclamp_input_amax_history"]
    assert history.tolist() == each.flip(0).tolist()
    assert find_ledgers(loop.plain)[0].count() == STEPS


def test_attaching_changes_no_bit_of_the_training() -> None:
    assert same(Loop(attaches=False).train().state(), Loop().train().state())
    assert same(Loop(converts="after").train().state(), Loop().train().state())


def test_a_model_that_is_one_layer_is_converted_before_prepare_or_told() -> None:
    for converts, precision in (("before", "no"), ("after", "no"), ("before", "bf16")):
        anew_now()
        loop = Loop(converts=converts, precision=precision, model=lambda: nn.Linear(6, 4)).train()
        assert find_ledgers(loop.plain)[0].count() == STEPS
    anew_now()
    with pytest.warns(UnclampWarning, match="its forward is replaced on the instance"):
        Loop(converts="after", precision="bf16", model=lambda: nn.Linear(6, 4))


@pytest.mark.cell("Accelerate", "loss as its own log")
def test_what_is_recorded_is_what_the_loop_sees(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run").train()
    loop.attached.evaluation({"accuracy": float("nan")})
    loop.accelerator.end_training()
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
        assert log.header.metadata["framework"] == "accelerate"
        assert log.header.metadata["accumulation"] == ACCUMULATION
    assert rows(tmp_path / "run", "step") == [1, 2, 3, 4]
    for name, truth in (("loss", loop.losses), ("grad_norm", loop.norms), ("lr", loop.rates)):
        assert rows(tmp_path / "run", name) == truth
    assert asked(tmp_path / "run", "SELECT count(*) FROM casts") == [STEPS * 6]
    told = asked(tmp_path / "run", "SELECT data FROM events WHERE kind = 'evaluation'")
    assert [json.loads(each) for each in told] == [{"metrics": {"accuracy": "nan"}}]


@pytest.mark.cell("Accelerate", "resume bit for bit")
@pytest.mark.parametrize("converts", ["before", "after"])
def test_a_resume_from_a_saved_state_goes_on_bit_for_bit(tmp_path: Path, converts: str) -> None:
    whole = Loop(tmp_path / "whole").train()
    whole.accelerator.end_training()
    anew_now()
    first = Loop(tmp_path / "run").train(range(6))
    first.accelerator.save_state(str(tmp_path / "checkpoint"))
    first.accelerator.end_training()
    anew_now()
    second = Loop(tmp_path / "run", converts=converts)
    second.accelerator.load_state(str(tmp_path / "checkpoint"))
    second.train(range(6, BATCHES))
    second.accelerator.end_training()
    assert same(second.state(), whole.state())
    for name in ("step", "loss", "grad_norm", "lr"):
        assert rows(tmp_path / "run", name) == rows(tmp_path / "whole", name)


def test_a_training_that_goes_back_to_a_saved_state_has_each_step_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run").train(range(6))
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.train(range(6, BATCHES))
    loop.accelerator.load_state(str(tmp_path / "state"))
    loop.train(range(6, BATCHES))
    loop.accelerator.end_training()
    assert loop.losses[2:4] == loop.losses[4:6]
    assert rows(tmp_path / "run", "step") == [1, 2, 3, 4]
    assert rows(tmp_path / "run", "loss") == loop.losses[:4]
    assert asked(tmp_path / "run", "SELECT count(*) FROM casts") == [STEPS * 6]
    assert status(tmp_path / "run") == "finished"


def test_a_state_that_is_registered_by_hand_resumes_bit_for_bit(tmp_path: Path) -> None:
    def made() -> Loop:
        loop = Loop(attaches=False)
        loop.accelerator.register_for_checkpointing(ScalingState(loop.model))
        return loop

    whole = made().train().state()
    anew_now()
    first = made().train(range(6))
    first.accelerator.save_state(str(tmp_path))
    anew_now()
    second = made()
    second.accelerator.load_state(str(tmp_path))
    assert same(second.train(range(6, BATCHES)).state(), whole)


def test_a_checkpoint_without_our_file_is_told(tmp_path: Path) -> None:
    first = Loop()
    first.attached.detach()
    first.train(range(6)).accelerator.save_state(str(tmp_path))
    anew_now()
    second = Loop()
    with pytest.warns(UnclampWarning, match=r"has no unclamp_scaling_state\.pt"):
        second.accelerator.load_state(str(tmp_path))


@pytest.mark.cell("Accelerate", "save format clean")
def test_what_is_saved_has_the_keys_of_the_plain_model(tmp_path: Path) -> None:
    loop = Loop(model=Wide).train()
    want = set(Wide().state_dict())
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.accelerator.save_model(loop.model, str(tmp_path / "model"), max_shard_size="1KB")
    assert set(load_file(tmp_path / "state" / "model.safetensors")) == want
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    assert {key for shard in shards for key in load_file(shard)} == want
    assert set(loop.accelerator.get_state_dict(loop.model)) == want


def test_a_run_is_not_begun_anew_in_its_folder(tmp_path: Path) -> None:
    Loop(tmp_path / "run").train().accelerator.end_training()
    anew_now()
    with pytest.raises(RunLogError, match="already holds a run, and this training begins anew"):
        Loop(tmp_path / "run").train()


@pytest.mark.cell("Accelerate", "exception")
def test_an_exception_in_the_loop_is_the_runs_status(tmp_path: Path) -> None:
    def broken(name: str, error: BaseException) -> str:
        anew_now()
        loop = Loop(tmp_path / name)

        def work() -> None:
            with loop.attached:
                loop.train()
                raise error

        with pytest.raises(type(error)):
            work()
        return status(tmp_path / name)

    assert broken("failed", ValueError("no")) == "failed"
    assert broken("interrupted", KeyboardInterrupt()) == "interrupted"


def test_a_program_that_dies_of_an_exception_leaves_a_failed_run(tmp_path: Path) -> None:
    program = """
        import sys, torch, unclamp
        from accelerate import Accelerator
        from unclamp.integrations.accelerate import attach
        accelerator, model = Accelerator(cpu=True), torch.nn.Linear(8, 8)
        attach(accelerator, model, recipe=unclamp.Recipe(), run=sys.argv[1])
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        accelerator.backward(model(torch.ones(2, 8)).sum())
        optimizer.step()
        raise ValueError("out of luck")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "ValueError: out of luck" in done.stderr
    assert status(tmp_path / "run") == "failed"
    assert rows(tmp_path / "run", "step") == [1]


def test_numbers_of_casts_reach_the_accelerators_trackers(tmp_path: Path) -> None:
    class Tracker(GeneralTracker):
        name, requires_logging_directory = "ours", False

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, dict[str, Any]]] = []

        @property
        def tracker(self) -> Any:
            return self

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.seen.append((step or 0, values))

    tracker, model = Tracker(), Net()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("name")
    attach(accelerator, model, recipe=RECIPE, run=tmp_path / "run", trackers=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(model(torch.ones(2, 6)).sum())
        optimizer.step()
    accelerator.end_training()
    assert [step for step, _ in tracker.seen] == [1, 2]
    assert all(name.startswith("unclamp/") for _, values in tracker.seen for name in values)
    query = "SELECT sum(saturated) FROM casts WHERE step = 2"
    assert [tracker.seen[-1][1]["unclamp/saturated"]] == asked(tmp_path / "run", query)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.cell("Accelerate", "compile")
def test_a_compiled_model_is_recorded_alike(tmp_path: Path) -> None:
    def trained(run: str, backend: str | None) -> Loop:
        anew_now()
        loop = Loop(tmp_path / run)
        if backend is not None:
            compiled: Any = torch.compile(loop.model, backend=backend, fullgraph=True)
            loop.model = compiled
        return loop.train()

    eager, compiled = trained("eager", None), trained("compiled", "aot_eager")
    for loop in (eager, compiled):
        loop.attached.detach()
    assert same(eager.state(), compiled.state())
    for name in ("step", "loss", "grad_norm", "lr"):
        assert rows(tmp_path / "eager", name) == rows(tmp_path / "compiled", name)
        query = "SELECT saturated FROM casts ORDER BY step, site"
    assert asked(tmp_path / "eager", query) == asked(tmp_path / "compiled", query)


def test_automatic_names_of_checkpoints_are_followed(tmp_path: Path) -> None:
    loop = Loop()
    loop.accelerator.project_configuration = ProjectConfiguration(
        project_dir=str(tmp_path), automatic_checkpoint_naming=True
    )
    loop.train().accelerator.save_state()
    folder = tmp_path / "checkpoints" / "checkpoint_0"
    assert json.loads((folder / "unclamp_step.json").read_text()) == {"step": STEPS}
    before = loop.state()
    loop.train()
    assert loop.attached.step == 2 * STEPS
    loop.accelerator.load_state()
    assert loop.attached.step == STEPS
    assert same(loop.state(), before)


def test_a_step_that_a_scaler_skips_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run", accumulation=1, scaler=torch.amp.GradScaler("cpu"))
    seen = []
    for number in range(3):
        with loop.accelerator.accumulate(loop.model):
            loss = loop.model(torch.ones(2, 6)).square().mean()
            loop.accelerator.backward(loss * (torch.inf if number == 1 else 1))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        if not loop.optimizer.step_was_skipped:
            seen.append(float(loss.detach()))
    loop.attached.detach()
    assert len(seen) == 2
    assert rows(tmp_path / "run", "loss") == [pytest.approx(each) for each in seen]


def test_a_model_in_place_of_its_accelerator_is_named() -> None:
    model: Any = torch.nn.Linear(4, 4)
    with pytest.raises(ConvertError, match=r"takes the accelerator first.*got Linear"):
        attach(model, model, recipe=unclamp.Recipe())


def test_an_accelerator_is_attached_once_and_lets_go() -> None:
    loop = Loop()
    with pytest.raises(ConvertError, match="attached already"):
        attach(loop.accelerator, loop.plain)
    loop.attached.detach()
    assert "backward" not in vars(loop.accelerator)
    attach(loop.accelerator, loop.plain).detach()


def test_copies_and_pickles_of_an_attached_model_are_of_the_model_alone(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run", converts="after")
    twin = copy.deepcopy(loop.plain)
    torch.save(loop.plain, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (twin, again):
        each(torch.ones(2, 6)).sum().backward()
    assert loop.attached.recorder is None
    loop.attached.detach()
