"""Lightning's own Trainer with our callback: what is recorded is what Lightning logs itself."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unclamp
from patience import PATIENCE_S
from unclamp import RunLog, RunLogError, UnclampWarning

L = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import (  # noqa: E402
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from unclamp.integrations.lightning import Fp8Precision, UnclampCallback  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("lightning"),
    pytest.mark.filterwarnings(
        "ignore:Be aware that when using .ckpt_path.:UserWarning",
        "ignore:.*does not have many workers:UserWarning",
        "ignore:.*smaller than the logging interval:UserWarning",
        "ignore:The dirpath has changed:UserWarning",
        "ignore:.*treespec.*:FutureWarning",
        "ignore:.*LeafSpec.*:FutureWarning",
        "ignore:.*isinstance.treespec:DeprecationWarning",
        "ignore:Checkpoint directory .* exists:UserWarning",
        "ignore:.*val_dataloader.*:UserWarning",
        "ignore:.*should not be instantiated:DeprecationWarning",
        "ignore::DeprecationWarning:lightning.*",
    ),
]

BATCHES, ROWS, WIDTH = 6, 16, 32


def batches(count: int = BATCHES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(ROWS, WIDTH, generator=generator) * (1 + i) for i in range(count)]


class Loader:
    """Batches in order, that a checkpoint in the middle of an epoch goes on with."""

    def __init__(self, count: int = BATCHES) -> None:
        self.every, self.at = batches(count), 0

    def __len__(self) -> int:
        return len(self.every)

    def __iter__(self) -> Iterator[Tensor]:
        first, self.at = self.at, 0
        for index in range(first, len(self.every)):
            self.at = (index + 1) % len(self.every)
            yield self.every[index]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Net(L.LightningModule):
    def __init__(self, fails_at: int | None = None, error: type[BaseException] = ValueError):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 4))
        self.fails_at, self.error = fails_at, error
        self.micro: list[Tensor] = []
        self.before_clipping: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if self.fails_at is not None and self.global_step == self.fails_at:
            raise self.error("planted")
        loss = self(batch).square().mean()
        self.log("loss", loss)
        self.micro.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self(batch).square().mean())

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None,
                                    gradient_clip_algorithm: Any = None) -> None:  # fmt: skip
        """What torch's clipping says, of which Lightning keeps nothing."""
        limit = gradient_clip_val or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters()), limit)
        self.before_clipping.append(norm.detach().clone())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
             "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2,
             "num_sanity_val_steps": 0}  # fmt: skip
    return L.Trainer(**(quiet | settings), callbacks=list(callbacks), default_root_dir=folder)


def rows(run: Path) -> list[dict[str, Any]]:
    with RunLog.open(run) as log:
        return log.sql("SELECT step, loss, grad_norm, lr FROM steps ORDER BY step").to_pylist()


def logged(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """What Lightning logs of the same training without the callback, at every step."""
    folder = tmp_path_factory.mktemp("plain")
    module = Net()
    unclamp.convert(module, unclamp.Recipe())
    trainer(folder, logger=CSVLogger(folder), log_every_n_steps=1).fit(module, Loader())
    return {int(row["step"]): float(row["loss"]) for row in logged(folder)}


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net, UnclampCallback]:
    """The same, recorded by the callback, with Lightning logging rarely, and validating."""
    folder = tmp_path_factory.mktemp("taken")
    module, callback = Net(), UnclampCallback(unclamp.Recipe(), folder / "run")
    trainer(
        folder, callback, logger=CSVLogger(folder), log_every_n_steps=50, num_sanity_val_steps=2,
        gradient_clip_val=None,
    ).fit(module, Loader(), Loader(2))  # fmt: skip
    return folder, module, callback


@pytest.mark.cell("Lightning", "loss as its own log")
def test_losses_are_those_that_lightning_logs(taken, plain) -> None:
    """A validation, and its sanity check, change nothing; nor does `log_every_n_steps`."""
    got = {row["step"]: row["loss"] for row in rows(taken[0] / "run")}
    assert got == plain
    assert list(got) == list(range(2 * BATCHES))


@pytest.mark.cell("Lightning", "updates once a step")
def test_scales_follow_once_a_step(taken) -> None:
    state = unclamp.ScalingState(taken[1]).state_dict()
    seen = [float(batch.abs().max()) for batch in 2 * batches()]
    history = state["net.0.unclamp_input_amax_history"].tolist()
    kept = min(len(history), len(seen))
    assert history[:kept] == pytest.approx(seen[::-1][:kept], rel=0)
    with RunLog.open(taken[0] / "run") as log:
        casts = "SELECT step, amax, microsteps FROM casts JOIN sites USING (site)"
        found = log.sql(f"{casts} WHERE fqn = 'net.0' AND role = 'input' ORDER BY step")
        assert [row["amax"] for row in found.to_pylist()] == seen
        assert {row["microsteps"] for row in found.to_pylist()} == {1}


def test_norms_are_before_clipping_and_rates_are_those_of_the_step(taken, tmp_path) -> None:
    got = rows(taken[0] / "run")
    assert [row["grad_norm"] for row in got] == [n.item() for n in taken[1].before_clipping]
    assert [row["lr"] for row in got] == pytest.approx([0.01 * 0.9**i for i in range(12)])
    module = Net()
    trainer(
        tmp_path, UnclampCallback(unclamp.Recipe(), tmp_path / "run"), max_epochs=1,
        gradient_clip_val=0.01,
    ).fit(module, Loader())  # fmt: skip
    norms = [row["grad_norm"] for row in rows(tmp_path / "run")]
    assert norms == [norm.item() for norm in module.before_clipping]
    assert min(norms) > 0.02


def test_validations_are_events_and_a_sanity_check_is_none(taken) -> None:
    with RunLog.open(taken[0] / "run") as log:
        events = log.sql("SELECT step, data FROM events WHERE kind = 'evaluation' ORDER BY step")
        got = [(row["step"], json.loads(row["data"])["metrics"]) for row in events.to_pylist()]
    own = [
        (int(row["step"]), float(row["val_loss"])) for row in logged(taken[0]) if row["val_loss"]
    ]
    assert [(step, metrics["val_loss"]) for step, metrics in got] == own
    assert [list(metrics) for _, metrics in got] == [["val_loss"]] * 2


def test_the_header_says_who_drove(taken) -> None:
    with RunLog.open(taken[0] / "run") as log:
        assert log.header.status == "finished"
        assert log.header.metadata == {
            "framework": "lightning", "framework_version": __import__("lightning").__version__,
            "world_size": 1, "accumulation": 1, "precision": "32-true",
        }  # fmt: skip
    assert taken[2].report.converted
    assert taken[2].recorder is None


@pytest.mark.cell("Lightning", "accumulation")
@pytest.mark.parametrize("scheduled", [False, True], ids=["fixed", "scheduled"])
def test_a_step_of_several_batches_has_the_mean_of_their_losses(scheduled, tmp_path) -> None:
    module, callback = Net(), UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    more = [GradientAccumulationScheduler({0: 2, 1: 3})] if scheduled else []
    trainer(
        tmp_path, callback, *more, **({} if scheduled else {"accumulate_grad_batches": 4})
    ).fit(module, Loader())  # fmt: skip
    sizes = [2, 2, 2, 3, 3] if scheduled else [4, 2, 4, 2]
    shares = [2, 2, 2, 3, 3] if scheduled else [4] * 4
    losses, seen = iter(module.micro), iter(2 * batches())
    expected = [
        sum(next(losses) / share for _ in range(n)) for n, share in zip(sizes, shares, strict=True)
    ]
    largest = [max(float(next(seen).abs().max()) for _ in range(n)) for n in sizes]
    got = rows(tmp_path / "run")
    assert [row["loss"] for row in got] == [float(each) for each in expected]
    assert [row["step"] for row in got] == list(range(len(sizes)))
    history = unclamp.ScalingState(module).state_dict()["net.0.unclamp_input_amax_history"]
    assert history[: len(sizes)].tolist() == largest[::-1]


def test_a_loss_by_name_is_the_mean_over_the_steps_batches(tmp_path: Path) -> None:
    class Several(Net):
        def training_step(self, batch: Tensor, index: int) -> Any:
            return {"loss": super().training_step(batch, index), "half": self.micro[-1] / 2}

    module = Several()
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run", loss="half")
    trainer(tmp_path, callback, accumulate_grad_batches=2, max_epochs=1).fit(module, Loader())
    pairs = zip(module.micro[::2], module.micro[1::2], strict=True)
    expected = [float(a / 2 / 2 + b / 2 / 2) for a, b in pairs]
    assert [row["loss"] for row in rows(tmp_path / "run")] == expected


def test_a_fit_that_is_called_again_goes_on(tmp_path: Path) -> None:
    module, callback = Net(), UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    driver = trainer(tmp_path, callback, max_epochs=1)
    driver.fit(module, Loader())
    driver.fit_loop.max_epochs = 2
    driver.fit(module, Loader())
    got = rows(tmp_path / "run")
    assert [row["step"] for row in got] == list(range(2 * BATCHES))
    assert [row["loss"] for row in got] == [loss.item() for loss in module.micro]


def test_a_search_for_a_learning_rate_is_no_part_of_the_run(tmp_path: Path) -> None:
    class Found(Net):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    search = L.callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
    module = Found()
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)  # pyright: ignore
    trainer(tmp_path, callback, search, max_epochs=1).fit(module, loader, Loader(2))
    got = rows(tmp_path / "run")
    assert [row["step"] for row in got] == list(range(BATCHES))
    history = unclamp.ScalingState(module).state_dict()["net.0.unclamp_input_amax_history"]
    assert history[:BATCHES].tolist() == [float(x.abs().max()) for x in batches()][::-1]
    assert not history[BATCHES:].any()


def test_without_the_package_one_is_told_what_to_install(monkeypatch) -> None:
    import importlib.util

    from unclamp.integrations import lightning as ours

    for name in ours.PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(unclamp.UnsupportedError, match=r"pip install .unclamp\[lightning\]"):
        ours._bases()


def saved(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}",
                           **settings)  # fmt: skip


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training without a stop, and one stopped in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("resumed")
    whole, second = Net(), Net()
    first = UnclampCallback(unclamp.Recipe(), folder / "whole")
    trainer(folder, first, saved(folder / "whole-ckpt"), enable_checkpointing=True).fit(
        whole, Loader()
    )
    broken = UnclampCallback(unclamp.Recipe(), folder / "run")
    with pytest.raises(ValueError, match="planted"):
        trainer(folder, broken, saved(folder / "ckpt"), enable_checkpointing=True).fit(
            Net(fails_at=10), Loader()
        )
    path = folder / "ckpt" / "step=8.ckpt"
    again = UnclampCallback(unclamp.Recipe(), folder / "run")
    trainer(folder, again).fit(second, Loader(), ckpt_path=path)
    return {"folder": folder, "whole": whole, "second": second, "path": path}


@pytest.mark.cell("Lightning", "resume bit for bit")
def test_a_resume_in_the_middle_of_an_epoch_is_bit_for_bit(resumed) -> None:
    whole, second = resumed["whole"], resumed["second"]
    states = [unclamp.ScalingState(module).state_dict() for module in (whole, second)]
    assert list(states[0]) == list(states[1])
    for name, value in [*states[0].items(), *whole.state_dict().items()]:
        other = states[1].get(name)
        assert torch.equal(value, second.state_dict()[name] if other is None else other), name
    assert rows(resumed["folder"] / "run") == rows(resumed["folder"] / "whole")
    with RunLog.open(resumed["folder"] / "run") as log:
        assert log.header.status == "finished"


@pytest.mark.cell("Lightning", "exception")
def test_an_exception_ends_the_run_as_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="planted"):
        trainer(tmp_path, UnclampCallback(unclamp.Recipe(), tmp_path / "run")).fit(
            Net(fails_at=3), Loader()
        )
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "failed"
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.cell("Lightning", "exception")
def test_ctrl_c_ends_the_run_as_interrupted(tmp_path: Path) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # Lightning's
            trainer(tmp_path, UnclampCallback(unclamp.Recipe(), tmp_path / "run")).fit(
                Net(fails_at=3, error=KeyboardInterrupt), Loader()
            )
    finally:
        signal.signal(signal.SIGINT, before)
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "interrupted"


@pytest.mark.cell("Lightning", "save format clean")
def test_a_checkpoint_has_the_keys_of_a_plain_module(resumed, tmp_path: Path) -> None:
    held = torch.load(resumed["path"], weights_only=True)
    assert list(held["state_dict"]) == list(Net().state_dict())
    assert "unclamp" not in json.dumps(list(held["optimizer_states"][0]))
    loaded = Net.load_from_checkpoint(resumed["path"])  # strict
    assert type(loaded.net[0]) is nn.Linear


def test_a_weights_only_checkpoint_is_clean_too(tmp_path: Path) -> None:
    weights = saved(tmp_path / "ckpt", save_weights_only=True)
    callback = UnclampCallback(unclamp.Recipe())
    trainer(tmp_path, callback, weights, enable_checkpointing=True, max_steps=2).fit(
        Net(), Loader()
    )
    held = torch.load(tmp_path / "ckpt" / "step=2.ckpt", weights_only=True)
    assert list(held["state_dict"]) == list(Net().state_dict())


def test_state_among_the_modules_keys_if_asked_for(tmp_path: Path) -> None:
    choices: list[tuple[str, Any]] = [("first", "model"), ("second", "apart")]
    ended: list[dict[str, Tensor]] = []
    for name, state in choices:
        callback = UnclampCallback(unclamp.Recipe(), state=state)
        module = Net()
        trainer(tmp_path, callback, saved(tmp_path / name), enable_checkpointing=True,
                max_steps=4).fit(module, Loader(), ckpt_path=None if name == "first" else
                                 tmp_path / "first" / "step=2.ckpt")  # fmt: skip
        keys = list(torch.load(tmp_path / name / "step=4.ckpt", weights_only=True)["state_dict"])
        assert any("unclamp" in key for key in keys) == (state == "model")
        ended.append(unclamp.ScalingState(module).state_dict())
    assert all(torch.equal(value, ended[1][key]) for key, value in ended[0].items())


def test_a_checkpoint_without_scaling_state_is_said(tmp_path: Path) -> None:
    trainer(tmp_path, saved(tmp_path / "ckpt"), enable_checkpointing=True, max_steps=2).fit(
        Net(), Loader()
    )
    path = tmp_path / "ckpt" / "step=2.ckpt"
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    with pytest.warns(UnclampWarning, match="histories of scales start anew"):
        trainer(tmp_path, callback, max_steps=4).fit(Net(), Loader(), ckpt_path=path)
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 3]


@pytest.mark.cell("Lightning", "compile")
@pytest.mark.parametrize("part", ["module", "network"])
def test_a_compiled_module_is_recorded_alike(part: str, plain, tmp_path: Path) -> None:
    class Quiet(Net):
        """`self.log` in a compiled training_step is more than torch's compiler takes here."""

        def log(self, *_: Any, **__: Any) -> None:
            pass

    module = Quiet()
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    whole: Any = torch.compile(module, backend="aot_eager") if part == "module" else module
    if part == "network":
        module.net = torch.compile(module.net, backend="aot_eager")  # pyright: ignore
    trainer(tmp_path, callback, max_epochs=1).fit(whole, Loader())
    got = {row["step"]: row["loss"] for row in rows(tmp_path / "run")}
    assert got == pytest.approx({step: plain[step] for step in range(BATCHES)}, rel=1e-3)
    history = unclamp.ScalingState(module).state_dict()["net.0.unclamp_input_amax_history"]
    assert history[:BATCHES].tolist() == [float(x.abs().max()) for x in batches()][::-1]


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_averaged_weights_are_saved_plain_and_resume_bit_for_bit(first, tmp_path: Path) -> None:
    ended = []
    for path in (None, tmp_path / "ckpt" / "step=8.ckpt"):
        own = UnclampCallback(unclamp.Recipe(), tmp_path / "run")
        average = L.callbacks.EMAWeightAveraging(decay=0.9)
        both = [own, average] if first == "ours" else [average, own]
        module = Net()
        trainer(tmp_path, *both, saved(tmp_path / "ckpt"), enable_checkpointing=True).fit(
            module, Loader(), Loader(2), ckpt_path=path
        )
        ended.append({**module.state_dict(), **unclamp.ScalingState(module).state_dict()})
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())
    held = torch.load(tmp_path / "ckpt" / "step=8.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert list(held[part]) == list(Net().state_dict())


class Later(Net):
    """Makes its layers when the strategy asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 4))


def test_layers_that_configure_model_makes_are_converted_and_resumed(resumed, tmp_path) -> None:
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    module = Later()
    trainer(tmp_path, callback).fit(module, Loader(), ckpt_path=resumed["path"])
    whole = unclamp.ScalingState(resumed["whole"]).state_dict()
    states = unclamp.ScalingState(module).state_dict()
    assert all(torch.equal(value, states[key]) for key, value in whole.items())


class Gan(L.LightningModule):
    """Two optimizers, stepped by hand; the critic twice, its gradients clipped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.halves = nn.ModuleDict({"critic": nn.Linear(WIDTH, 1), "maker": nn.Linear(8, WIDTH)})
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> None:
        critic, maker = self.optimizers()
        loss = torch.zeros(())
        for _ in range(2):
            made = self.halves["maker"](batch[:, :8]).detach()
            loss = (self.halves["critic"](made) - self.halves["critic"](batch)).mean()
            critic.zero_grad()
            self.manual_backward(loss)
            critic.step()
        own = -self.halves["critic"](self.halves["maker"](batch[:, :8])).mean()
        maker.zero_grad()
        self.manual_backward(own)
        maker.step()
        self.losses.append(own.item())
        self.log_dict({"critic": loss, "maker": own})

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(half.parameters(), lr=0.01) for half in self.halves.values()]


def test_manual_optimisation_is_one_row_a_batch_with_the_loss_that_is_named(tmp_path) -> None:
    module = Gan()
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run", loss="maker", scalars=["critic"])
    trainer(tmp_path, callback, max_epochs=1).fit(module, Loader())
    got = rows(tmp_path / "run")
    assert [row["loss"] for row in got] == pytest.approx(module.losses, rel=1e-6)
    assert [row["step"] for row in got] == list(range(BATCHES))
    with RunLog.open(tmp_path / "run") as log:
        scalars = [dict(r["scalars"]) for r in log.sql("SELECT scalars FROM steps").to_pylist()]
        casts = log.sql(
            "SELECT microsteps FROM casts JOIN sites USING (site) "
            "WHERE fqn = 'halves.maker' AND role = 'grad_output'"
        ).to_pylist()
    assert [list(each) for each in scalars] == [["critic"]] * BATCHES
    assert [row["microsteps"] for row in casts] == [1] * BATCHES


class Seldom(Net):
    """Trains by every batch, and logs a part of the loss in every third one only."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        if index % 3 == 0:
            self.log("part", loss / 2, on_step=True, on_epoch=True)
        self.log("whole", loss, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("loss", [None, "part"], ids=["scalar", "loss"])
def test_what_a_step_did_not_log_is_not_said_of_it(loss: str | None, tmp_path: Path) -> None:
    """Lightning goes on telling the last value that was logged."""
    module, names = Seldom(), ["part", "whole"]
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run", loss=loss, scalars=names)
    trainer(tmp_path, callback).fit(module, Loader(), Loader(1))
    with RunLog.open(tmp_path / "run") as log:
        got = log.sql("SELECT loss, scalars FROM steps ORDER BY step").to_pylist()
    parts = [float(m / 2) if i % 3 == 0 else None for i, m in enumerate(module.micro)]
    assert [dict(row["scalars"] or ()) for row in got] == [
        {} if part is None else {"part": part} for part in parts
    ]
    assert [row["loss"] for row in got] == (parts if loss else [float(m) for m in module.micro])


def test_what_any_batch_of_a_step_logged_is_the_steps(tmp_path: Path) -> None:
    module = Seldom()
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run", scalars=["part"])
    settings = {"accumulate_grad_batches": 3, "max_epochs": 1}
    trainer(tmp_path, callback, **settings).fit(module, Loader())
    with RunLog.open(tmp_path / "run") as log:
        got = log.sql("SELECT scalars FROM steps ORDER BY step").to_pylist()
    assert [dict(row["scalars"]) for row in got] == [
        {"part": float(module.micro[first] / 2)} for first in (0, 3)
    ]


def test_a_name_that_nobody_logs_is_an_error(tmp_path: Path) -> None:
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run", loss="generator")
    with pytest.raises(unclamp.UnsupportedError, match="neither returns nor logs"):
        trainer(tmp_path, callback).fit(Gan(), Loader())


@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
def test_norms_under_a_gradient_scaler_are_unscaled(fused: bool, tmp_path: Path) -> None:
    class Scaled(Net):
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.0, fused=fused)

    norms = {}
    for name in ("scaled", "plain"):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        half = MixedPrecision("16-mixed", "cpu", scaler)
        callback = UnclampCallback(None, tmp_path / name, plain=True)
        more = {"plugins": [half]} if name == "scaled" else {}
        trainer(tmp_path, callback, max_epochs=1, **more).fit(Scaled(), Loader())
        norms[name] = [row["grad_norm"] for row in rows(tmp_path / name)]
    assert norms["scaled"] == pytest.approx(norms["plain"], rel=0.02)


def test_a_nan_is_recorded_as_it_is(tmp_path: Path) -> None:
    class Poisoned(Net):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return super().training_step(batch, index) * (math.nan if index == 3 else 1.0)

    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    trainer(tmp_path, callback, max_epochs=1).fit(Poisoned(), Loader())
    got = rows(tmp_path / "run")
    assert [math.isnan(row["loss"]) for row in got] == [False] * 3 + [True] * 3
    assert math.isnan(got[3]["grad_norm"])


def test_fast_dev_run_converts_and_writes_no_run(tmp_path: Path) -> None:
    callback = UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    trainer(tmp_path, callback, fast_dev_run=True).fit(Net(), Loader(), Loader(2))
    assert callback.report.converted
    assert not (tmp_path / "run").exists()


def test_overfit_batches_is_recorded(tmp_path: Path) -> None:
    module, callback = Net(), UnclampCallback(unclamp.Recipe(), tmp_path / "run")
    trainer(tmp_path, callback, overfit_batches=2, max_epochs=3).fit(module, Loader())
    assert [row["loss"] for row in rows(tmp_path / "run")] == [n.item() for n in module.micro]
    assert len(module.micro) == 6


def test_a_folder_that_holds_a_run_is_refused_before_the_training(taken, tmp_path: Path) -> None:
    module = Net()
    with pytest.raises(RunLogError, match="already holds a run"):
        trainer(tmp_path, UnclampCallback(unclamp.Recipe(), taken[0] / "run")).fit(module, Loader())
    assert module.micro == []


def test_a_trained_module_is_tested_with_its_scales(resumed, tmp_path: Path) -> None:
    class Tested(Net):
        def test_step(self, batch: Tensor, index: int) -> None:
            self.log("test_loss", self(batch).square().mean())

    module, callback = Tested(), UnclampCallback(unclamp.Recipe())
    trainer(tmp_path, callback).test(module, Loader(2), ckpt_path=resumed["path"], verbose=False)
    held = torch.load(resumed["path"], weights_only=True)["callbacks"]["UnclampCallback"]
    now = unclamp.ScalingState(module).state_dict()
    assert all(torch.equal(value, now[key]) for key, value in held["scaling"].items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_precision_plugin_converts_and_resumes(precision: str, tmp_path: Path) -> None:
    """The plugin alone is what callback and Lightning's own plugin are together."""
    modules = [Net(), Net(), Net()]
    for module in modules[1:]:
        module.configure_gradient_clipping = lambda *_, **__: None
    callback = UnclampCallback(unclamp.Recipe())
    trainer(tmp_path, callback, precision=precision).fit(modules[0], Loader())
    for index, limit in ((1, 8), (2, -1)):
        trainer(
            tmp_path, saved(tmp_path / "ckpt"), enable_checkpointing=True, max_steps=limit,
            plugins=[Fp8Precision(unclamp.Recipe(), precision)],
        ).fit(
            modules[index], Loader(),
            ckpt_path=tmp_path / "ckpt" / "step=8.ckpt" if index == 2 else None,
        )  # fmt: skip
    states = [unclamp.ScalingState(module).state_dict() for module in (modules[0], modules[2])]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, modules[2].state_dict()[name]), name
    with pytest.raises(unclamp.UnsupportedError, match="did you mean 'bf16-mixed'"):
        Fp8Precision(unclamp.Recipe(), "bf16-mix")


OTHER = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import pytorch_lightning as pl
from unclamp.integrations.lightning import UnclampCallback
import unclamp

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(16, 4)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

assert issubclass(UnclampCallback, pl.Callback)
assert "lightning.pytorch" not in sys.modules
pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
           enable_progress_bar=False, enable_model_summary=False,
           callbacks=UnclampCallback(unclamp.Recipe(), sys.argv[1])).fit(
    Net(), torch.utils.data.DataLoader(torch.randn(24, 16), batch_size=8))
"""


def test_the_other_package_is_served_too(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run(
        [sys.executable, "-c", OTHER, str(tmp_path / "run")],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run")) == 3
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.metadata["framework"] == "pytorch_lightning"
