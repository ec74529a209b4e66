"""Fabric with our callback, against loops that keep what Fabric was given."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import RunLog, RunLogError, UnsupportedError

pytest.importorskip("lightning.fabric")
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision

from unclamp.integrations.lightning import FabricRecorder, Fp8Precision

pytestmark = [
    pytest.mark.xdist_group("lightning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

STEPS, WIDTH = 6, 32


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(16, WIDTH, generator=generator) * (1 + i) for i in range(STEPS)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 4))


def rows(run: Path) -> list[dict[str, Any]]:
    with RunLog.open(run) as log:
        return log.sql("SELECT step, loss, grad_norm, lr FROM steps ORDER BY step").to_pylist()


def status(run: Path) -> str:
    with RunLog.open(run) as log:
        return log.header.status


class Training:
    """A loop of a user's own, that keeps what it gave to Fabric and what Fabric said."""

    def __init__(self, recorder: FabricRecorder | None, *, compiled: bool = False, **settings: Any):
        callbacks = [] if recorder is None else [recorder]
        self.recorder = recorder
        self.fabric = Fabric(accelerator="cpu", devices=1, callbacks=callbacks, **settings)
        self.plain = network()
        optimizer = torch.optim.AdamW(self.plain.parameters(), lr=0.01)
        model: Any = torch.compile(self.plain, backend="aot_eager") if compiled else self.plain
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, *each: Tensor, clip: float | None = None, poison: float = 1.0) -> None:
        total = torch.zeros(())
        for index, batch in enumerate(each):
            is_last = index == len(each) - 1
            with self.fabric.no_backward_sync(self.model, enabled=not is_last):
                loss = self.model(batch).square().mean() / len(each) * poison
                self.fabric.backward(loss)
            total += loss.detach()
        self.losses.append(float(total))
        if clip is not None:
            norm: Any = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=clip, error_if_nonfinite=False
            )
            self.norms.append(float(norm))
        else:
            gradients = [p.grad for p in self.plain.parameters() if p.grad is not None]
            self.norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "unclamp": self.recorder}

    def scales(self) -> dict[str, Tensor]:
        return unclamp.ScalingState(self.plain).state_dict()


def inputs_seen(training: Training) -> list[float]:
    return training.scales()["0.unclamp_input_amax_history"].tolist()


@pytest.mark.cell("Fabric", "loss as its own log")
@pytest.mark.cell("Fabric", "updates once a step")
def test_each_step_is_recorded_once_with_what_backward_got(tmp_path: Path) -> None:
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        training = Training(recorder)
        for batch in batches():
            training.step(batch)
        assert recorder.report.converted
    got = rows(tmp_path / "run")
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in got] == training.losses
    assert [row["grad_norm"] for row in got] == pytest.approx(training.norms, rel=1e-5)
    assert {row["lr"] for row in got} == {0.01}
    seen = [float(batch.abs().max()) for batch in batches()]
    assert inputs_seen(training)[:STEPS] == seen[::-1]
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
        assert log.header.metadata["framework"] == "lightning Fabric"
        amaxes = "SELECT amax FROM casts JOIN sites USING (site) WHERE fqn = '0' AND role = 'input'"
        assert [row["amax"] for row in log.sql(f"{amaxes} ORDER BY step").to_pylist()] == seen
    assert "backward" not in vars(training.fabric)


@pytest.mark.cell("Fabric", "loss as its own log")
def test_recording_changes_nothing(tmp_path: Path) -> None:
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        trainings = Training(recorder), Training(None)
        unclamp.convert(trainings[1].plain, unclamp.Recipe())
        for batch in batches():
            for training in trainings:
                training.step(batch, clip=0.05)
    assert trainings[0].losses == trainings[1].losses
    got = rows(tmp_path / "run")
    assert [row["grad_norm"] for row in got] == trainings[1].norms
    assert min(trainings[1].norms) > 0.05


@pytest.mark.cell("Fabric", "accumulation")
def test_a_step_of_several_batches_is_one_update_and_the_sum_of_their_losses(tmp_path) -> None:
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        training = Training(recorder)
        for first in range(0, STEPS, 2):
            training.step(*batches()[first : first + 2])
    assert [row["loss"] for row in rows(tmp_path / "run")] == training.losses
    largest = [float(batch.abs().max()) for batch in batches()]
    pairs = [max(largest[i : i + 2]) for i in range(0, STEPS, 2)]
    assert inputs_seen(training)[:3] == pairs[::-1]


@pytest.mark.cell("Fabric", "resume bit for bit")
@pytest.mark.parametrize("order", ["model first", "model last"])
def test_a_resumed_training_goes_on_bit_for_bit(order: str, tmp_path: Path) -> None:
    with FabricRecorder(unclamp.Recipe(), tmp_path / "whole") as recorder:
        whole = Training(recorder)
        for batch in batches():
            whole.step(batch)
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        first = Training(recorder)
        for batch in batches()[:4]:
            first.step(batch)
            if recorder.state_dict()["step"] == 3:
                first.fabric.save(tmp_path / "at 3", first.state())
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        second = Training(recorder)
        state = second.state()
        if order == "model last":
            state = dict(reversed(state.items()))
        second.fabric.load(tmp_path / "at 3", state)
        for batch in batches()[3:]:
            second.step(batch)
    assert second.losses == whole.losses[3:]
    for name, value in whole.scales().items():
        assert torch.equal(value, second.scales()[name]), name
    for name, value in whole.plain.state_dict().items():
        assert torch.equal(value, second.plain.state_dict()[name]), name
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.cell("Fabric", "save format clean")
def test_a_training_that_goes_back_to_a_checkpoint_has_each_step_once(tmp_path: Path) -> None:
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        training = Training(recorder)
        for number, batch in enumerate(batches()):
            training.step(batch)
            if number == 2:
                training.fabric.save(tmp_path / "checkpoint", training.state())
        training.fabric.load(tmp_path / "checkpoint", training.state())
        for batch in batches()[3:]:
            training.step(batch)
    got = rows(tmp_path / "run")
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in got] == training.losses[:6]
    assert training.losses[3:6] == training.losses[6:]
    assert status(tmp_path / "run") == "finished"


def test_a_checkpoint_has_the_keys_of_a_plain_model(tmp_path: Path) -> None:
    training = Training(FabricRecorder(unclamp.Recipe()))
    training.step(batches()[0])
    training.fabric.save(tmp_path / "file", training.state())
    held = torch.load(tmp_path / "file", weights_only=True)
    assert list(held["model"]) == list(network().state_dict())
    network().load_state_dict(held["model"], strict=True)


@pytest.mark.cell("Fabric", "compile")
def test_a_compiled_model_is_recorded_alike(tmp_path: Path) -> None:
    eager = Training(FabricRecorder(unclamp.Recipe()))
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        training = Training(recorder, compiled=True)
        for batch in batches():
            eager.step(batch)
            training.step(batch)
    assert [row["loss"] for row in rows(tmp_path / "run")] == training.losses
    assert training.losses == pytest.approx(eager.losses, rel=1e-3)
    assert inputs_seen(training) == inputs_seen(eager)


@pytest.mark.cell("Fabric", "exception")
@pytest.mark.parametrize(
    ("error", "ended"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_an_exception_ends_the_run(error: Any, ended: str, tmp_path: Path) -> None:
    def train() -> None:
        with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
            Training(recorder).step(batches()[0])
            raise error

    with pytest.raises(error):
        train()
    assert status(tmp_path / "run") == ended
    assert len(rows(tmp_path / "run")) == 1


def test_a_nan_is_recorded_as_it_is(tmp_path: Path) -> None:
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        training = Training(recorder)
        training.step(batches()[0], batches()[1], poison=math.nan)
    (row,) = rows(tmp_path / "run")
    assert math.isnan(row["loss"])
    assert math.isnan(row["grad_norm"])


def test_norms_under_a_gradient_scaler_are_unscaled(tmp_path: Path) -> None:
    norms = []
    for scale in (1.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run = tmp_path / f"{scale}"
        with FabricRecorder(None, run, plain=True) as recorder:
            training = Training(recorder, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
            training.step(batches()[0])
        norms.append(rows(run)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_several_optimizers_need_to_say_when_a_step_ends(tmp_path: Path) -> None:
    for manual in (False, True):
        with FabricRecorder(unclamp.Recipe(), tmp_path / f"{manual}", manual=manual) as recorder:
            fabric = Fabric(accelerator="cpu", devices=1, callbacks=[recorder])
            halves = nn.ModuleDict({"critic": nn.Linear(8, 1), "maker": nn.Linear(8, 8)})
            own = [torch.optim.SGD(half.parameters(), lr=0.1) for half in halves.values()]
            _, critic, maker = fabric.setup(halves, *own)
            x, loss = torch.randn(4, 8), torch.zeros(())
            for _ in range(3):
                fabric.backward(halves["critic"](halves["maker"](x).detach()).mean())
                critic.step()
                loss = halves["critic"](halves["maker"](x)).square().mean()
                fabric.backward(loss)
                if not manual:
                    with pytest.raises(UnsupportedError, match="manual=True"):
                        maker.step()
                    break
                maker.step()
                recorder.step(loss=loss.detach(), tokens=4)
    got = rows(tmp_path / "True")
    assert [row["step"] for row in got] == [1, 2, 3]
    assert got[-1]["loss"] == float(loss.detach())


def test_a_folder_that_holds_a_run_is_refused_and_replaced_on_demand(tmp_path: Path) -> None:
    choices: list[tuple[dict[str, Any], bool]] = [
        ({}, False), ({}, True), ({"overwrite": True}, False)
    ]  # fmt: skip
    for settings, refused in choices:
        recorder = FabricRecorder(unclamp.Recipe(), tmp_path / "run", **settings)
        training = Training(recorder)
        if refused:
            with pytest.raises(RunLogError, match="already holds a run"):
                training.step(batches()[0])
        else:
            training.step(batches()[0])
        recorder.close()
    assert len(rows(tmp_path / "run")) == 1


def test_an_evaluation_is_an_event(tmp_path: Path) -> None:
    with FabricRecorder(unclamp.Recipe(), tmp_path / "run") as recorder:
        training = Training(recorder)
        training.step(batches()[0])
        recorder.evaluation({"val_loss": 0.5})
    with RunLog.open(tmp_path / "run") as log:
        events = log.sql("SELECT step FROM events WHERE kind = 'evaluation'").to_pylist()
    assert events == [{"step": 1}]


def test_a_precision_plugin_converts_for_fabric(tmp_path: Path) -> None:
    losses = []
    for plugin in (True, False):
        with FabricRecorder(None if plugin else unclamp.Recipe(), tmp_path / f"{plugin}") as one:
            own = Fp8Precision(unclamp.Recipe(), "32-true", fabric=True)
            training = Training(one, plugins=[own] if plugin else None)
            for batch in batches():
                training.step(batch)
        losses.append(training.losses)
        assert one.state_dict()["scaling"]
    assert losses[0] == losses[1]
    assert rows(tmp_path / "True") == rows(tmp_path / "False")
