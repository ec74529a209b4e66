"""`attach` to transformers' Trainer: what it records is what Trainer itself would log."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors import safe_open

import unclamp
from hf_training import (
    Trainer,
    TrainerCallback,
    adapted,
    differing,
    everything,
    own_log,
    recorded,
    scaling,
    status,
    tiny_llama,
    tokens,
    trained,
    trainer,
)
from unclamp.integrations.recorded import SCALING_STATE_FILE
from unclamp.integrations.transformers import UnclampCallback, attach

pytestmark = [  # of torch, while it compiles; of transformers, about PEFT
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ACCUMULATION = pytest.mark.cell("Trainer", "accumulation")
COMPILE = pytest.mark.cell("Trainer", "compile")
CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 6},
    "bf16": {
        **{"bf16": True, "gradient_accumulation_steps": 2},
        **{"average_tokens_across_devices": False},
    },
    "unclipped": {
        **{"max_grad_norm": 0.0, "optim": "adafactor"},
        **{"lr_scheduler_type": "cosine", "weight_decay": 0.1},
    },
    "clipped": {
        **{"max_grad_norm": 0.1, "logging_strategy": "epoch"},
        **{"max_steps": -1, "num_train_epochs": 0.25},
    },
    "checkpointing": {"activation_checkpointing": True, "max_steps": 4},
    "reentrant": {
        **{"activation_checkpointing": True, "max_steps": 4},
        **{"activation_checkpointing_kwargs": {"use_reentrant": True}},
    },
    "compile": {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4},
}
MARKS = {"accumulation": [ACCUMULATION], "compile": [COMPILE]}
EXAMPLES = [pytest.param(c, id=n, marks=MARKS.get(n, [])) for n, c in CASES.items()]


@pytest.mark.cell("Trainer", "loss as its own log")
@pytest.mark.parametrize("changes", EXAMPLES)
def test_what_is_recorded_is_trainers_own_log_of_every_step(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    layers = 1 if "torch_compile" in changes else 2
    model = tiny_llama(num_hidden_layers=layers)
    plain = trained(tmp_path / "plain", model=copy.deepcopy(model), **changes)
    other = trainer(tmp_path / "attached", model=model, **changes)
    attach(other, unclamp.Recipe(), tmp_path / "run")
    other.train()
    assert len(own_log(plain)) == plain.state.global_step
    assert recorded(tmp_path / "run") == own_log(plain)
    assert differing(everything(plain), everything(other)) == []
    assert status(tmp_path / "run") == "finished"


@pytest.mark.cell("Trainer", "updates once a step")
def test_scales_follow_each_step_once_and_evaluations_not_at_all(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
    )
    attach(made, unclamp.Recipe(), tmp_path / "run")
    seen: list[float] = []

    def look(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(inputs[0].abs().max().item())

    made.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(look)
    made.train()
    steps = [max(seen[n : n + 2]) for n in range(0, 16, 2)]
    key = "model.layers.1.mlp.down_proj.unclamp_input_amax_history"
    history = scaling(made.model)[key].flatten()[:8].tolist()
    assert history == steps[::-1]
    with unclamp.RunLog.open(tmp_path / "run") as log:
        rows = log.sql("SELECT DISTINCT step FROM casts ORDER BY step").to_pylist()
        events = log.sql("SELECT step, data FROM events WHERE kind = 'evaluation'").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, 9))
    said = [s for s in made.state.log_history if "eval_loss" in s]
    assert [event["step"] for event in events] == [s["step"] for s in said] == [0, 3, 6, 8]
    for event, own in zip(events, said, strict=True):
        assert json.loads(event["data"])["metrics"]["eval_loss"] == own["eval_loss"]


class Poisoned(Trainer):
    """One micro-batch of the second step has no number for a loss."""

    called = 0

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        """Return the loss, or NaN, or Inf."""
        self.called += 1
        loss: Any = super().compute_loss(*args, **named)
        return loss * {3: math.nan, 5: math.inf, 6: math.inf}.get(self.called, 1.0)


def test_nan_and_inf_are_recorded_though_trainer_hides_them(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, of=Poisoned, gradient_accumulation_steps=2, max_steps=3, learning_rate=0.0
    )
    attach(made, unclamp.Recipe(), tmp_path / "run")
    made.args.logging_steps = 1
    made.state.compute_steps(made.args, 3)
    made.train()
    assert all(math.isfinite(loss) for _, loss, *_ in own_log(made))
    first, second, third = recorded(tmp_path / "run")
    assert math.isfinite(first[1])
    assert math.isnan(second[1])
    assert third[1] == math.inf or math.isnan(third[1])


def test_without_a_run_the_coverage_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path, max_steps=3)
    attach(made, unclamp.Recipe())
    made.train()
    assert capsys.readouterr().out.count("of the FLOPs") == 1


# ---- checkpoints -------------------------------------------------------------------------------


class Breaks(TrainerCallback):
    """Raises at the beginning of a step."""

    def __init__(self, at: int, error: BaseException) -> None:
        self._at, self._error = at, error

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Raise where it is to."""
        if state.global_step == self._at:
            raise self._error


SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
}


def broken_and_resumed(
    folder: Path, model: Callable[[], Any], recipe: unclamp.Recipe
) -> dict[str, Any]:
    """Train without a break; and with one, going on from the last checkpoint."""
    whole = trainer(folder / "whole", model=model(), **SAVING)
    attach(whole, recipe, folder / "whole-run")
    whole.train()
    broken = trainer(folder / "broken", model=model(), **SAVING, save_total_limit=1)
    attach(broken, recipe, folder / "run")
    error = ZeroDivisionError("planted")
    broken.add_callback(Breaks(5, error))
    with pytest.raises(ZeroDivisionError) as raised:
        broken.train()
    then = status(folder / "run")
    again = trainer(folder / "broken", model=model(), **SAVING)
    attach(again, recipe, folder / "run")
    with pytest.raises(unclamp.RunLogError) as refused:
        again.train()
    again.train(resume_from_checkpoint=True)
    return {
        **{"folder": folder, "whole": whole, "again": again, "error": error},
        **{"raised": raised.value, "then": then, "refused": str(refused.value)},
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Break a training of a whole model."""
    return broken_and_resumed(tmp_path_factory.mktemp("resumed"), tiny_llama, unclamp.Recipe())


@pytest.mark.cell("Trainer", "resume bit for bit")
def test_a_resumed_training_is_the_uninterrupted_one(resumed: dict[str, Any]) -> None:
    whole, again, folder = resumed["whole"], resumed["again"], resumed["folder"]
    assert again.state.global_step == 8
    assert len(scaling(whole.model)) > 50
    assert differing(everything(whole), everything(again)) == []
    assert recorded(folder / "run") == recorded(folder / "whole-run")
    with unclamp.RunLog.open(folder / "run") as log:
        assert len(log.header.attempts) == 2
        assert log.header.status == "finished"
        header = log.header.metadata
    assert header["framework"] == "transformers Trainer"
    assert header["seed"] == whole.args.seed
    batch = next(iter(whole.get_train_dataloader()))
    assert header["tokens_per_step"] == 2 * batch["input_ids"].numel()  # of two micro-batches


@pytest.mark.cell("PEFT", "resume bit for bit")
@pytest.mark.parametrize("inside", [False, True], ids=["base", "and-adapter"])
def test_a_resumed_training_of_an_adapter_is_the_uninterrupted_one(
    tmp_path: Path, inside: bool
) -> None:
    recipe = unclamp.Recipe(warmup_steps=5)
    recipe = recipe.override("*lora_A*", input=unclamp.Delayed(4)) if inside else recipe
    found = broken_and_resumed(tmp_path, lambda: adapted(tiny_llama()), recipe)
    whole, again = found["whole"], found["again"]
    is_there = [name for name in scaling(whole.model) if "lora_A" in name]
    assert bool(is_there) is inside
    assert len(scaling(whole.model)) > 50
    assert differing(everything(whole), everything(again)) == []
    assert recorded(tmp_path / "run") == recorded(tmp_path / "whole-run")
    adapter = tmp_path / "whole" / "checkpoint-8" / "adapter_model.safetensors"
    with safe_open(adapter, "pt") as own:
        assert not [key for key in own.keys() if "unclamp" in key]  # noqa: SIM118, it is no dict


@pytest.mark.cell("Trainer", "exception")
def test_an_exception_stays_what_it_is_and_the_run_has_failed(resumed: dict[str, Any]) -> None:
    assert resumed["raised"] is resumed["error"]
    assert resumed["then"] == "failed"
    assert "resume it from its last checkpoint" in resumed["refused"]


@pytest.mark.cell("Trainer", "save format clean")
def test_files_of_a_checkpoint_hold_no_key_of_ours(resumed: dict[str, Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    resumed["whole"].save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / SCALING_STATE_FILE).exists()
    checkpoint = resumed["folder"] / "whole" / "checkpoint-8"
    with safe_open(tmp_path / "model.safetensors", "pt") as plain:
        for folder in (checkpoint, tmp_path / "saved"):
            with safe_open(folder / "model.safetensors", "pt") as own:
                assert sorted(own.keys()) == sorted(plain.keys())
    assert (checkpoint / SCALING_STATE_FILE).is_file()


def test_a_checkpoint_without_scaling_state_warns(resumed: dict[str, Any], tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", **SAVING, max_steps=2)
    plain.train()
    made = trainer(tmp_path / "plain", **SAVING, max_steps=3)
    attach(made, unclamp.Recipe())
    with pytest.warns(unclamp.UnclampWarning, match="histories of scales start anew"):
        made.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


def test_the_best_model_gets_its_scales_back(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        **{**SAVING, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1},
        **{"load_best_model_at_end": True, "learning_rate": 0.3},
    )
    attach(made, unclamp.Recipe())
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name != "checkpoint-8"
    kept = torch.load(best / SCALING_STATE_FILE, weights_only=True)
    counted = {n for n in kept if ".self_attn.unclamp_" in n}
    kept = {n: v for n, v in kept.items() if n not in counted}
    assert differing(kept, scaling(made.model)) == []


# ---- how a run ends, and what is refused ---------------------------------------------------------


def test_ctrl_c_leaves_an_interrupted_run(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    attach(made, unclamp.Recipe(), tmp_path / "run", coverage=False)
    made.add_callback(Breaks(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert status(tmp_path / "run") == "interrupted"
    assert [row[0] for row in recorded(tmp_path / "run")] == [1, 2]


def test_a_trainer_is_attached_once_and_detached_as_it_was(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=2)
    before = {name: value for name, value in vars(made).items() if callable(value)}
    first = attach(made, unclamp.Recipe(), tmp_path / "run")
    with pytest.raises(unclamp.ConvertError, match="attached already"):
        attach(made, unclamp.Recipe(), tmp_path / "other")
    made.train()
    with pytest.raises(unclamp.RunLogError, match="already holds a run"):
        made.train()
    first.detach()
    assert {name: value for name, value in vars(made).items() if callable(value)} == before
    made.train()  # nothing of ours hears of it
    assert len(recorded(tmp_path / "run")) == 2
    attach(made, None, tmp_path / "second")
    made.train()
    assert len(recorded(tmp_path / "second")) == 2


def test_a_training_without_a_run_tells_its_coverage_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path, max_steps=3)
    attach(made, unclamp.Recipe())
    made.train()
    assert capsys.readouterr().out.count("of the FLOPs") == 1
    made.train()
    assert capsys.readouterr().out.count("of the FLOPs") == 1


def test_a_model_in_place_of_its_trainer_is_named() -> None:
    model: Any = tiny_llama()
    with pytest.raises(unclamp.ConvertError, match=r"takes the trainer.*not LlamaForCausalLM"):
        attach(model, unclamp.Recipe())


class TooLarge(Trainer):
    """Has no memory for two examples, from the second step on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        """Do the step, or have no memory."""
        if self.state.global_step == 1 and len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **named)


def test_smaller_batches_begin_the_run_anew(tmp_path: Path) -> None:
    made = trainer(tmp_path, of=TooLarge, auto_find_batch_size=True, max_steps=3, logging_steps=1)
    attach(made, unclamp.Recipe(), tmp_path / "run")
    made.train()
    assert recorded(tmp_path / "run") == own_log(made)[-3:]
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert len(log.header.attempts) == 2


def test_models_that_are_made_anew_are_converted_and_a_search_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=2, logging_steps=1)
    anew = Trainer(model_init=lambda: tiny_llama(), args=made.args, train_dataset=tokens())
    attach(anew, unclamp.Recipe(), tmp_path / "run")
    anew.train()
    assert recorded(tmp_path / "run") == own_log(anew)
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.sql("SELECT count(DISTINCT step) AS n FROM casts").to_pylist() == [{"n": 2}]
    with pytest.raises(unclamp.UnsupportedError, match="search of hyperparameters"):
        anew.train(trial={"learning_rate": 1.0})


# ---- the callback --------------------------------------------------------------------------------


def test_a_callback_records_trainers_log_where_that_is_whole(tmp_path: Path) -> None:
    made = Trainer(
        model=tiny_llama(),
        args=trainer(
            tmp_path, logging_steps=1, logging_nan_inf_filter=False, gradient_accumulation_steps=2
        ).args,
        train_dataset=tokens(),
        callbacks=[UnclampCallback(unclamp.Recipe(), tmp_path / "run")],
    )
    made.train()
    plain = trained(tmp_path / "plain", gradient_accumulation_steps=2)
    assert recorded(tmp_path / "run") == own_log(plain)
    assert status(tmp_path / "run") == "finished"
    with unclamp.RunLog.open(tmp_path / "run") as log:
        rows = log.sql("SELECT DISTINCT step FROM casts ORDER BY step").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "logging_steps=3, logging_nan_inf_filter=True"),
        ({"logging_strategy": "epoch", "logging_nan_inf_filter": False}, "'epoch'"),
        ({"logging_steps": 1}, "say logging_nan_inf_filter=True: unclamp"),
    ],
    ids=["defaults", "epoch", "filter"],
)
def test_a_callback_refuses_a_log_that_is_not_whole(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    made = trainer(tmp_path, **changes)
    made.add_callback(UnclampCallback(unclamp.Recipe(), tmp_path / "run"))
    with pytest.raises(unclamp.UnsupportedError, match=said):
        made.train()
    assert not (tmp_path / "run").exists()


class ToldNan(Trainer):
    """Says NaN once, of the first loss, whose gradient is as ever; keeps what it says."""

    told: list[float]

    def training_step(self, *args: Any, **named: Any) -> Any:
        """Return NaN, the first time."""
        loss: Any = super().training_step(*args, **named)
        self.told = [*getattr(self, "told", []), loss.item()]
        return loss * math.nan if len(self.told) == 2 else loss


def test_a_callback_takes_no_loss_from_a_log_that_a_nan_has_spoilt(tmp_path: Path) -> None:
    changes = {"logging_steps": 1, "logging_nan_inf_filter": False, "max_steps": 4}
    made = trainer(tmp_path, of=ToldNan, **changes)
    made.add_callback(UnclampCallback(unclamp.Recipe(), tmp_path / "run"))
    with pytest.warns(unclamp.UnclampWarning, match="the loss of step 2 is nan"):
        made.train()
    assert [math.isnan(loss) for _, loss, *_ in own_log(made)] == [False, True, True, True]
    assert all(map(math.isfinite, made.told))
    losses = [loss for _, loss, *_ in recorded(tmp_path / "run")]
    assert losses[0] == made.told[0]
    assert math.isnan(losses[1])
    assert losses[2:] == [None, None]


def test_a_callback_refuses_to_resume(resumed: dict[str, Any], tmp_path: Path) -> None:
    changes = {"logging_steps": 1, "logging_nan_inf_filter": False, "max_steps": 9}
    made = trainer(tmp_path, **{**SAVING, **changes})
    made.add_callback(UnclampCallback(unclamp.Recipe(), tmp_path / "run"))
    with pytest.raises(unclamp.UnsupportedError, match="from which checkpoint"):
        made.train(resume_from_checkpoint=str(resumed["folder"] / "whole" / "checkpoint-8"))
