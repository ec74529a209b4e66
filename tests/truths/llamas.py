"""Small Llamas with planted causes of a spike: the study's construction, freer.

Channels of gated MLPs have gate and up rows along a direction that only rare prompts have, so that
the input of that layer's down projection gets an outlier when they come, and write another one.
The answer to a prompt is read from the written directions against the prompt's own. Channels in
two layers that answer two prompts are parallel causes; a channel that writes what another one reads
is in series with it; a decoy's write is zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import unclamp
from unclamp.explain import Training
from unclamp.names import SiteName
from unclamp.study.data import Batches, read_text
from unclamp.study.outlier import (
    ANSWER_NORM,
    ANSWERS,
    GAIN,
    ORDINARY_NORM,
    PROMPT_NORM,
    PROMPTS,
    SHARED_NORM,
    SHUT,
    TILT,
    plant_batch,
)

SPIKE = 32
STEPS = SPIKE + 5
LR = 1e-3
SEQ_LEN = 48

Batch = tuple[Tensor, Tensor, Tensor]
Channel = tuple[int, int, int | None]
"""Layer, direction that fires it, direction it writes; None writes nothing."""

OWN, SHARED, DIRECTIONS = 6, 7, 8
LAYOUTS: dict[str, tuple[list[Channel], tuple[int | None, ...], tuple[int, ...]]] = {
    # Channels; the direction that each prompt has; the direction that each answer reads.
    "single": ([(1, 0, 2), (1, 1, 3), (0, 4, None)], (0, 1, None), (2, 3, OWN)),
    "first": ([(0, 0, 2), (0, 1, 3), (1, 4, None)], (0, 1, None), (2, 3, OWN)),
    "parallel": ([(0, 0, 2), (1, 1, 3)], (0, 1, None), (2, 3, OWN)),
    "series": ([(0, 0, 1), (1, 1, 3), (0, 4, None)], (0, 0, None), (3, 3, OWN)),
    "decoys": ([(0, 0, None), (1, 1, None)], (0, 1, None), (OWN, OWN, OWN)),
}


@dataclass(frozen=True, kw_only=True)
class LlamaCase:
    """What is planted: a layout, and perhaps a cause that is not clamping."""

    layout: str = "single"
    other: str = ""
    seed: int = 0
    width: int = 48
    scaling: unclamp.Delayed = field(default_factory=unclamp.Delayed)

    @property
    def culprits(self) -> list[SiteName]:
        """The planted sites."""
        layers = {layer for layer, _, write in LAYOUTS[self.layout][0] if write is not None}
        return [
            SiteName(f"model.layers.{layer}.mlp.down_proj", "input") for layer in sorted(layers)
        ]

    @property
    def spike(self) -> int:
        return SPIKE

    @property
    def recipe(self) -> unclamp.Recipe:
        return unclamp.Recipe.uniform(self.scaling)

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        torch.manual_seed(self.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=self.width,
                intermediate_size=2 * self.width,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                tie_word_embeddings=False,
            )
        )
        plant(model, self)
        unclamp.convert(model, recipe or self.recipe, skip=["lm_head"])
        model.train()
        return Training(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=LR))

    def step(self, training: Training, batch: Batch) -> Tensor:
        tokens, labels, rate = batch
        for group in training.optimizer.param_groups:
            group["lr"] = LR * float(rate)
        loss = training.model(input_ids=tokens, labels=labels, use_cache=False).loss
        training.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        return loss

    def batches(self) -> Iterator[Batch]:
        text = Batches(corpus(), batch_size=4, seq_len=SEQ_LEN, seed=self.seed)
        for number in range(STEPS):
            batch = text.batch(number)
            if number == SPIKE:
                batch = plant_batch(batch, seed=self.seed, step=number, share=0.15)
            tokens, labels = batch
            if number == SPIKE and self.other == "bad batch":
                generator = torch.Generator().manual_seed(self.seed)
                labels = torch.randint(0, 256, labels.shape, generator=generator)
            fast = number == SPIKE - 1 and self.other == "learning rate"
            yield tokens, labels, torch.tensor(300.0 if fast else min(1.0, (number + 1) / 5))


@lru_cache(maxsize=1)
def corpus() -> np.ndarray:
    return np.frombuffer(read_text((), seq_len=SEQ_LEN), dtype=np.uint8)


@torch.no_grad()
def plant(model: LlamaForCausalLM, case: LlamaCase) -> None:
    """Plant a case's channels into a freshly made model, in place."""
    channels, prompts, answers = LAYOUTS[case.layout]
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    generator = torch.Generator().manual_seed(case.seed)
    basis, _ = torch.linalg.qr(torch.randn(case.width, DIRECTIONS, generator=generator))
    for rows in (embed, head):
        rows -= (rows @ basis) @ basis.T
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            weight = module.get_parameter("weight")
            weight -= basis @ (basis.T @ weight)
    embed *= ORDINARY_NORM / embed.norm(dim=1).mean()
    embed += SHARED_NORM * basis[:, SHARED]
    used: dict[int, int] = {}
    for layer, fires, writes in channels:
        mlp = model.get_submodule(f"model.layers.{layer}.mlp")
        channel = used.setdefault(layer, 0)
        used[layer] += 1
        gate, up, down = (
            mlp.get_submodule(f"{n}_proj").get_parameter("weight") for n in ("gate", "up", "down")
        )
        gate[channel] = GAIN * basis[:, fires] - SHUT * basis[:, SHARED]
        up[channel] = GAIN * basis[:, fires]
        down[:, channel] = 0 if writes is None else basis[:, writes]
    own = basis[:, OWN]
    for token, fires in zip(PROMPTS, prompts, strict=True):
        along = own if fires is None else (1 - TILT**2) ** 0.5 * own + TILT * basis[:, fires]
        embed[token] = PROMPT_NORM * along
    for token, reads in zip(ANSWERS, answers, strict=True):
        head[token] = ANSWER_NORM * basis[:, reads]
