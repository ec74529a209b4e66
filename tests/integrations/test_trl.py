"""`attach` to TRL's trainers: what they log, what they save, and how they resume."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import unclamp
from hf_training import (
    VOCABULARY,
    TrainerCallback,
    differing,
    everything,
    own_log,
    recorded,
    scaling,
    status,
    tiny_llama,
)
from unclamp.integrations.transformers import attach

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of experimental parts, while it is imported
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

pytestmark = [  # of transformers, about TRL
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
WORDS = [f"w{n}" for n in range(VOCABULARY - 3)]
ASKED = {
    **{"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    **{"learning_rate": 1e-3, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2},
    **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False},
    **{"bf16": False, "activation_checkpointing": False},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one that knows a word a token."""
    known = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def sentences(count: int, seed: int) -> list[str]:
    """Return sentences of several lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=draw).tolist()
    drawn = [torch.randint(0, len(WORDS), (n,), generator=draw).tolist() for n in lengths]
    return [" ".join(WORDS[n] for n in each) for each in drawn]


def sft(folder: Path, **changes: Any) -> Any:
    """Return an SFTTrainer."""
    return SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(output_dir=str(folder), **{**ASKED, **changes}),
        train_dataset=Dataset.from_dict({"text": sentences(40, 0)}),
        processing_class=tokenizer(),
    )


def dpo(folder: Path, **changes: Any) -> Any:
    """Return a DPOTrainer with a reference model."""
    pairs = {"prompt": sentences(40, 0), "chosen": sentences(40, 1), "rejected": sentences(40, 2)}
    model = tiny_llama()
    return DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(output_dir=str(folder), **{**ASKED, **changes}),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
    )


class Breaks(TrainerCallback):
    """Raises at the beginning of the fourth step."""

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Raise where it is to."""
        if state.global_step == 3:
            raise ZeroDivisionError("planted")


def all_of(make: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Train without us, with us, and with a break."""
    plain = make(folder / "plain", logging_steps=1)
    unclamp.convert(plain.model, unclamp.Recipe())
    plain.train()
    whole = make(folder / "whole")
    attach(whole, unclamp.Recipe(), folder / "whole-run")
    seen: list[float] = []

    def look(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(inputs[0].abs().max().item())

    whole.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(look)
    whole.train()
    broken = make(folder / "broken")
    attach(broken, unclamp.Recipe(), folder / "run")
    broken.add_callback(Breaks())
    with pytest.raises(ZeroDivisionError, match="planted"):
        broken.train()
    then = status(folder / "run")
    again = make(folder / "broken")
    attach(again, unclamp.Recipe(), folder / "run")
    again.train(resume_from_checkpoint=True)
    return {"plain": plain, "whole": whole, "seen": seen, "then": then, "again": again}


@pytest.fixture(scope="module")
def of_sft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Train the SFTTrainer."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, all_of(sft, folder)


@pytest.fixture(scope="module")
def of_dpo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Train the DPOTrainer."""
    folder = tmp_path_factory.mktemp("dpo")
    return folder, all_of(dpo, folder)


@pytest.fixture
def of(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    """Return what one of the two left."""
    return request.getfixturevalue(request.param)


def cells(*columns: str) -> Callable[[Any], Any]:
    """Run a test for both trainers, each as the proof of its own cells."""
    rows = {"of_sft": "TRL SFT", "of_dpo": "TRL DPO"}
    each = [
        pytest.param(name, marks=[pytest.mark.cell(row, c) for c in columns], id=row[4:].lower())
        for name, row in rows.items()
    ]
    return pytest.mark.parametrize("of", each, indirect=True)


@cells("loss as its own log", "accumulation")
def test_what_is_recorded_is_the_trainers_own_log(of: tuple[Path, dict[str, Any]]) -> None:
    folder, found = of
    assert len(own_log(found["plain"])) == 6
    assert recorded(folder / "whole-run") == own_log(found["plain"])
    assert differing(everything(found["plain"]), everything(found["whole"])) == []


@cells("loss as its own log")
def test_what_trl_adds_to_its_log_is_there_at_every_step(of: tuple[Path, dict[str, Any]]) -> None:
    folder, found = of
    with unclamp.RunLog.open(folder / "whole-run") as log:
        rows = log.sql("SELECT step, scalars FROM steps ORDER BY step").to_pylist()
    logged = [said for said in found["plain"].state.log_history if "loss" in said]
    known = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    for row, said in zip(rows, logged, strict=True):
        assert dict(row["scalars"]) == {k: v for k, v in said.items() if k not in known}
    names = set(dict(rows[0]["scalars"]))
    assert "mean_token_accuracy" in names
    if "dpo" in folder.name:
        assert {"rewards/chosen", "rewards/margins", "logps/rejected"} <= names


@cells("updates once a step")
def test_scales_follow_each_step_once(of: tuple[Path, dict[str, Any]]) -> None:
    _, found = of
    seen = found["seen"]
    each = len(seen) // 6
    steps = [max(seen[n : n + each]) for n in range(0, len(seen), each)]
    key = "model.layers.1.mlp.down_proj.unclamp_input_amax_history"
    assert scaling(found["whole"].model)[key].flatten()[:6].tolist() == steps[::-1]


@cells("resume bit for bit", "exception")
def test_a_resumed_training_is_the_uninterrupted_one(of: tuple[Path, dict[str, Any]]) -> None:
    folder, found = of
    assert found["then"] == "failed"
    assert differing(everything(found["whole"]), everything(found["again"])) == []
    assert recorded(folder / "run") == recorded(folder / "whole-run")
    assert status(folder / "run") == "finished"


@cells("save format clean")
def test_files_hold_no_key_of_ours(of: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = of
    tiny_llama().save_pretrained(tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as plain,
        safe_open(folder / "whole" / "checkpoint-6" / "model.safetensors", "pt") as own,
    ):
        assert sorted(own.keys()) == sorted(plain.keys())


def test_the_head_that_trl_reads_itself_is_named(tmp_path: Path) -> None:
    made = dpo(tmp_path / "dpo", max_steps=9, gradient_accumulation_steps=1, save_strategy="no")
    attach(made, unclamp.Recipe(), tmp_path / "run", coverage=False)
    with pytest.warns(unclamp.UnclampWarning, match="lm_head"):
        made.train()
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.header.metadata["framework"] == "trl DPOTrainer"
