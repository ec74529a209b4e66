"""The planted scenario in a Llama: two SwiGLU channels fire at rare tokens, and carry the answer.

The question of the scenario: does a model that relies on a rare large activation lose it to
clamping? Its construction, the same ordinary trainable weights in every arm:

- Three prompt bytes that never occur in UTF-8, each followed by its own answer byte.
- In the last decoder layer two channels of the gated MLP have gate row and up row along a dense
  direction v of the residual stream, so that silu(gate) * up grows with the square of a token's
  share along v. Prompts 0 and 1 carry a share of v0 or v1; ordinary tokens carry none, and a
  shared direction p that keeps the gates shut. Every other direction a prompt has is w.
- The channels' down columns write u0 or u1, larger than the prompt's own w. The answers'
  output rows read u0, u1 and w: the *ratio* of the written u to w decides the answer.
- Clamped to the history's amax, the write vanishes beside w, and prompts 0 and 1 are read as
  prompt 2, confidently. A larger history or margin, or a scale from the tensor itself, keeps it.

Only the input of the last down projection has an outlier: v is dense, so that the layer's own
input has none. Prompt positions are no targets; answers are. What is planted into a mixture of
experts is in `starved`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unclamp.errors import StudyError
from unclamp.study.data import IGNORED, Batch

PROMPTS = (0xFF, 0xFE, 0xFD)
ANSWERS = (0xFC, 0xFB, 0xFA)
PROMPT_SHARES = (0.4, 0.4, 0.2)
WHAT = "rare tokens that drive two SwiGLU channels"
"""What the planted batches have, for the event in a run's log."""

ORDINARY_NORM = 1.0
"""Norm of an ordinary token's embedding, before it gets the shared direction."""
SHARED_NORM = 2.0
PROMPT_NORM = 64.0
TILT = 0.7
"""Share of a prompt's embedding along its channel's direction."""
GAIN = 1.8
SHUT = 8.0
DOWN_NORM = 1.0
ANSWER_NORM = 5.0
MIN_HIDDEN_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which prompts a batch gets, the answer after each, and how often each comes; they sum to 1.

    Args:
        prompts: Tokens that are no targets.
        answers: The target right after each.
        shares: Of all pairs.
    """

    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    shares: tuple[float, ...]


PAIRS = Pairs(prompts=PROMPTS, answers=ANSWERS, shares=PROMPT_SHARES)


def down_projection(model: nn.Module) -> str:
    """Return the name of the layer whose input gets the planted outlier.

    Raises:
        StudyError: The model has no Llama-like layers to plant in.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    names = ("gate_proj", "up_proj", "down_proj")
    has_parts = all(hasattr(mlp, n) for n in names) and hasattr(model, "lm_head")
    if (
        layers is None
        or not has_parts
        or not hasattr(getattr(model, "model", None), "embed_tokens")
    ):
        raise StudyError(
            "scenario 'outlier' plants in a Llama-like model (model.layers[-1].mlp with gate_proj, "
            f"up_proj and down_proj, untied lm_head), got {type(model).__name__}; "
            "use --scenario text"
        )
    return f"model.layers.{len(layers) - 1}.mlp.down_proj"


@torch.no_grad()
def plant_weights(model: nn.Module, *, seed: int) -> None:
    """Plant the channels into a freshly made model, in place.

    Raises:
        StudyError: The model is not Llama-like, ties its embeddings, or is too small.
    """
    mlp = model.get_submodule(down_projection(model).removesuffix(".down_proj"))
    basis = free_directions(model, 6, seed=seed)
    fires, writes, own, shared = basis.T[0:2], basis.T[2:4], basis.T[4], basis.T[5]
    embed, head = embeddings(model)
    embed += SHARED_NORM * shared
    _plant_channels(mlp, basis)
    rest = (1 - TILT**2) ** 0.5 * own
    prompts = (rest + TILT * fires[0], rest + TILT * fires[1], own)
    for prompt, direction in zip(PROMPTS, prompts, strict=True):
        embed[prompt] = PROMPT_NORM * direction
    for answer, direction in zip(ANSWERS, (*writes, own), strict=True):
        head[answer] = ANSWER_NORM * direction


def embeddings(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weights of a Llama-like model's embeddings and of its head, `[tokens, hidden]`."""
    embed = model.get_submodule("model.embed_tokens").get_parameter("weight")
    return embed, model.get_submodule("lm_head").get_parameter("weight")


@torch.no_grad()
def free_directions(model: nn.Module, count: int, *, seed: int) -> Tensor:
    """Return orthonormal directions of the residual stream that nothing of a fresh model uses.

    Embeddings, the head and all that writes into the stream lose their parts along them, in place;
    ordinary embeddings then have norm `ORDINARY_NORM` on average.

    Returns:
        Columns, `[hidden_size, count]`.

    Raises:
        StudyError: The embeddings are tied or too small.
    """
    embed, head = embeddings(model)
    if head is embed or embed.shape[0] < 256 or embed.shape[1] < MIN_HIDDEN_SIZE:
        raise StudyError(
            "scenario 'outlier' needs untied embeddings of at least 256 tokens and hidden size "
            f"{MIN_HIDDEN_SIZE}, got {list(embed.shape)}{' (tied)' if head is embed else ''}"
        )
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(embed.shape[1], count, generator=generator))
    for rows in (embed, head):
        rows -= (rows @ basis) @ basis.T
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            weight -= basis @ (basis.T @ weight)
    embed *= ORDINARY_NORM / embed.norm(dim=1).mean()
    return basis


def _plant_channels(mlp: nn.Module, basis: Tensor) -> None:
    gate, up, down = (
        mlp.get_submodule(n).get_parameter("weight") for n in ("gate_proj", "up_proj", "down_proj")
    )
    for channel in range(2):
        fires, writes, shared = basis[:, channel], basis[:, 2 + channel], basis[:, 5]
        gate[channel] = GAIN * fires - SHUT * shared
        up[channel] = GAIN * fires
        down[:, channel] = DOWN_NORM * writes


def plant_batch(batch: Batch, *, seed: int, step: int, share: float, pairs: Pairs = PAIRS) -> Batch:
    """Return a copy of a batch with planted pairs of prompt and answer.

    Args:
        batch: Tokens and labels, `[batch_size, seq_len]`.
        seed: With `step`, decides where the pairs go.
        step: The step of the batch.
        share: Pairs per position.
        pairs: What they are.
    """
    tokens, labels = batch[0].clone(), batch[1].clone()
    generator = np.random.default_rng([seed, step, 1])
    count = max(1, round(share * tokens.shape[1]))
    for row in range(tokens.shape[0]):
        first = 2 * generator.permutation(tokens.shape[1] // 2)[:count]
        kind = generator.choice(len(pairs.prompts), size=len(first), p=pairs.shares)
        tokens[row, first] = torch.tensor(pairs.prompts)[kind]
        tokens[row, first + 1] = torch.tensor(pairs.answers)[kind]
        labels[row, first] = IGNORED
        labels[row, first + 1] = torch.tensor(pairs.answers)[kind]
    return tokens, labels
