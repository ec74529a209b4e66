"""Trainings of transformers that take a second: a tiny model, tokens of our own, no network."""

import warnings
from pathlib import Path
from typing import Any

import torch

import unclamp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao warns while it is imported
    from peft import LoraConfig, get_peft_model
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

__all__ = ["Trainer", "TrainerCallback"]

VOCABULARY = 64
LENGTH = 12


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a Llama of two layers with dropout in its attention, the same one each time."""
    sizes = {
        **{"hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"max_position_embeddings": 32, "attention_dropout": 0.1, "use_cache": False},
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def tokens(count: int = 64) -> Any:
    """Return examples of one length, as a data set; from 1 to 11 of their tokens are predicted."""
    made = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    hidden = [[-100] * (n % (LENGTH - 1)) for n in range(count)]
    return [
        {"input_ids": row, "labels": unseen + row[len(unseen) :]}
        for row, unseen in zip(made.tolist(), hidden, strict=True)
    ]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Return arguments for eight short steps that nothing but the test hears of."""
    asked = {
        **{"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        **{"logging_steps": 3, "save_strategy": "no", "report_to": [], "use_cpu": True},
        **{"disable_tqdm": True, "dataloader_pin_memory": False, "warmup_steps": 2},
        **changes,
    }
    return TrainingArguments(output_dir=str(folder), **asked)


def trainer(folder: Path, *, of: type[Trainer] = Trainer, model: Any = None, **changes: Any) -> Any:
    """Return a trainer of the tiny model, or of another."""
    made = tiny_llama() if model is None else model
    asked = arguments(folder, **changes)
    return of(model=made, args=asked, train_dataset=tokens(), eval_dataset=tokens(4))


def adapted(model: Any, **changes: Any) -> Any:
    """Return a model with an adapter of PEFT that has dropout."""
    torch.manual_seed(0)
    asked = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"], **changes}
    return get_peft_model(model, LoraConfig(**asked))


def trained(folder: Path, **changes: Any) -> Any:
    """Train a converted model that nothing of ours is attached to; its own log has every step."""
    plain = trainer(folder, **{**changes, "logging_steps": 1, "logging_strategy": "steps"})
    unclamp.convert(plain.model, unclamp.Recipe())
    plain.train()
    return plain


def own_log(plain: Any) -> list[tuple[int, float, float | None, float]]:
    """Return step, loss, norm and learning rate of each step that a trainer has logged."""
    return [
        (said["step"], said["loss"], said.get("grad_norm"), said["learning_rate"])
        for said in plain.state.log_history
        if "loss" in said
    ]


def recorded(run: Path) -> list[tuple[int, float, float | None, float]]:
    """Return the same of a run of ours."""
    with unclamp.RunLog.open(run) as log:
        found = log.sql("SELECT step, loss, grad_norm, lr FROM steps ORDER BY step").to_pylist()
    return [tuple(row.values()) for row in found]


def status(run: Path) -> str:
    """Return how a run ended."""
    with unclamp.RunLog.open(run) as log:
        return log.header.status


def everything(of: Any) -> dict[str, torch.Tensor]:
    """Return every tensor that decides a trainer's next step: model, scaling, optimizer."""
    found = dict(unclamp.weights_only(of.model.state_dict()))
    found |= {f"scaling {name}": value for name, value in scaling(of.model).items()}
    for number, state in of.optimizer.state_dict()["state"].items():
        found |= {
            f"optimizer {number} {n}": torch.as_tensor(v) for n, v in state.items() if v is not None
        }
    return found


def scaling(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's scaling state, but for what is only counted.

    The attentions of these models are: nothing is computed from that, and a run counts it at its
    first step too, wherever it begins.
    """
    state = unclamp.ScalingState(model).state_dict()
    return {key: value for key, value in state.items() if ".self_attn.unclamp_" not in key}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not the same, bit for bit."""
    names = sorted({*one, *other})
    return [n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])]
