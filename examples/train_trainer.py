"""Train a small Llama in FP8 with transformers' Trainer, and record every cast.

    python examples/train_trainer.py runs/trainer
    unclamp report runs/trainer
    unclamp explain runs/trainer     # if the loss has a spike

Weights are random and the text is this file, so nothing is downloaded.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import unclamp
from unclamp.integrations.transformers import attach

CONTEXT, STEPS = 64, 30
RUN = sys.argv[1] if len(sys.argv) > 1 else "runs/trainer"


def build() -> Trainer:
    """Make the trainer; `unclamp explain` does so again."""
    text = list(Path(__file__).read_bytes())
    rows = [text[at : at + CONTEXT] for at in range(0, len(text) - CONTEXT, 8)]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=f"{RUN}-checkpoints",
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            save_steps=10,
            report_to=[],
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    attach(trainer, unclamp.Recipe(), RUN, skip=["lm_head"], snapshots=True, build=build)
    return trainer


if __name__ == "__main__":
    build().train()
    print(f"unclamp report {RUN}")
