"""The planted scenario in a mixture of experts: a starved expert, and its stale scale.

The question of the scenario: an expert that is hardly ever chosen has a history of what it saw long
ago. Does a scale from that history clamp what reaches the expert now? The construction, the same
ordinary trainable weights in every arm:

- In the last decoder layer's MoE one expert, number 3, is chosen by the planted prompts only: its
  router's row is along a direction r, of which each prompt has a share, and against the shared
  direction p, which ordinary tokens have and prompts have not.
- So the expert sees tokens at the planted steps, its visits, and at no other. In its history stand
  its own visits, however long ago, because an expert without tokens learns no amax.
- Visit n brings a loud prompt that no visit had before. It fires channel n of the expert. All
  channels have the same gate; the row of `up` is `LOUDER` times as large as that of the channel
  before, and the column of `down` as many times smaller. Each writes the same u, so that in high
  precision all visits are the same function, and only the activations between grow.
- A quiet prompt reaches the expert as well, and fires nothing.
- Answers are read from the *ratio* of the written u to the direction w that each prompt has of its
  own, as in a Llama (`outlier`). Divided by `LOUDER`, the write is the smaller of the two, and the
  loud prompt is read as the quiet one.

With delayed scaling the first visit fits, since the scale is the tensor's own while there is no
history. Each later one is `LOUDER` times too large for its input of the down projection, until all
channels have been fired. Visits after the last new one repeat it, and fit.
"""

import torch
from torch import nn
from torch.nn.functional import silu

from unclamp.errors import StudyError
from unclamp.study.outlier import (
    ANSWERS,
    GAIN,
    PROMPT_NORM,
    PROMPTS,
    SHARED_NORM,
    SHUT,
    TILT,
    Pairs,
    embeddings,
    free_directions,
)

EXPERT = 3
"""The number of the starved expert."""
LOUD = (PROMPTS[0], PROMPTS[1], 0xF9, 0xF8)
"""The loud prompt of each visit; like all planted tokens bytes that never occur in UTF-8."""
QUIET = PROMPTS[2]
FIRED, UNFIRED = ANSWERS[0], ANSWERS[2]
"""The answers to a loud and to a quiet prompt."""
SHARES = (0.8, 0.2)
WHAT = "rare tokens that alone reach one expert, and drive it harder at each visit"
LOUDER = 8.0
"""Activation of a visit over that of the one before."""
FIRST_VOLUME = 1 / 128
"""Row of `up` over that of `gate` in the channel of the first visit, which is the smallest."""
ROUTE = 0.35
"""Share of a prompt's embedding along the direction that its router's row reads."""
ROUTER_GAIN = 4.0
WRITES = 2.5
"""Norm of what a channel writes, over a prompt's own."""
SCORE = 56.0
"""Logit of an answer whose direction is all that the head sees."""


def expert_of(model: nn.Module) -> str | None:
    """Return the name of the planted expert's down projection; None where there is no such expert.

    Experts must be two parameters as in transformers' Mixtral: `mlp.experts.gate_up_proj`, `[E, 2
    I, H]`, gate before up, and `mlp.experts.down_proj`, `[E, H, I]`; their router a weight `[E, H]`
    whose largest logits win.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if layers is None or not isinstance(mlp, nn.Module) or not _has_parts(mlp):
        return None
    return f"model.layers.{len(layers) - 1}.mlp.experts.down_proj.{EXPERT}"


def _has_parts(mlp: nn.Module) -> bool:
    experts = getattr(mlp, "experts", None)
    up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    router = getattr(getattr(mlp, "gate", None), "weight", None)
    if not all(isinstance(part, nn.Parameter) for part in (up, down, router)):
        return False
    count, hidden, inner = down.shape if down.ndim == 3 else (0, 0, 0)  # pyright: ignore
    fits = up.shape == (count, 2 * inner, hidden) and router.shape == (count, hidden)  # pyright: ignore
    is_plain = not getattr(experts, "has_bias", False) and getattr(experts, "is_concatenated", True)
    is_biased = getattr(mlp.get_submodule("gate"), "e_score_correction_bias", None) is not None
    return fits and is_plain and not is_biased


def loud_activation(visit: int, hidden_size: int) -> float:
    """Return what the loud prompt of a visit makes of its channel before anything is trained.

    The prompt's embedding outweighs all else that is in its residual stream, so that the normed
    input of the experts is `hidden_size ** 0.5` times its direction.
    """
    seen = torch.tensor(GAIN * TILT * hidden_size**0.5)
    return float(silu(seen) * seen) * _volume(visit)


def _volume(visit: int) -> float:
    return FIRST_VOLUME * LOUDER ** _channel(visit)


def _channel(visit: int) -> int:
    return min(visit, len(LOUD) - 1)


def pairs_of_visit(visit: int) -> Pairs:
    """Return the prompts and answers of the n-th planted step, counted from 0."""
    prompts = (LOUD[_channel(visit)], QUIET)
    return Pairs(prompts=prompts, answers=(FIRED, UNFIRED), shares=SHARES)


@torch.no_grad()
def plant_expert(model: nn.Module, *, seed: int) -> None:
    """Plant the starved expert into a freshly made model, in place.

    Raises:
        StudyError: It has no such experts or too few, ties its embeddings, or is too small.
    """
    found = expert_of(model)
    assert found is not None
    mlp = model.get_submodule(found.partition(".experts.")[0])
    gate_up = mlp.get_submodule("experts").get_parameter("gate_up_proj")
    down = mlp.get_submodule("experts").get_parameter("down_proj")
    if len(down) <= EXPERT or down.shape[2] < len(LOUD):
        raise StudyError(
            f"scenario 'outlier' plants in expert {EXPERT}, in {len(LOUD)} of its channels: "
            f"expected at least {EXPERT + 1} experts of as many channels, got {len(down)} of "
            f"{down.shape[2]}"
        )
    basis = free_directions(model, len(LOUD) + 4, seed=seed)
    writes, own, shared, route = basis.T[len(LOUD) :]
    router = mlp.get_submodule("gate").get_parameter("weight")
    for rows in (router, gate_up[EXPERT]):
        rows -= (rows @ basis) @ basis.T
    router[EXPERT] = ROUTER_GAIN * route - SHUT * shared
    embed, head = embeddings(model)
    embed += SHARED_NORM * shared
    rest = (1 - TILT**2 - ROUTE**2) ** 0.5 * own + ROUTE * route
    for channel, prompt in enumerate(LOUD):
        fires = basis.T[channel]
        embed[prompt] = PROMPT_NORM * (rest + TILT * fires)
        gate, up = gate_up[EXPERT].chunk(2)
        gate[channel] = GAIN * fires - SHUT * shared
        up[channel] = GAIN * _volume(channel) * fires
        reach = loud_activation(channel, len(own))
        down[EXPERT][:, channel] = WRITES * PROMPT_NORM / reach * writes
    embed[QUIET] = PROMPT_NORM * ((1 - ROUTE**2) ** 0.5 * own + ROUTE * route)
    reads = SCORE / len(own) ** 0.5
    head[FIRED], head[UNFIRED] = reads * writes, reads * own
