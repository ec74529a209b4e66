"""Experts that are spread over ranks: tokens travel to them by all-to-all, and back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WIDTH, EXPERTS, RANKS = 32, 4, 2


class Mixture(nn.Module):
    """A router that is not trained, and the experts of one rank, or all."""

    def __init__(self, *, rank: int | None) -> None:
        super().__init__()
        a_rank = EXPERTS // RANKS
        held = range(EXPERTS) if rank is None else range(rank * a_rank, (rank + 1) * a_rank)
        self.is_spread = rank is not None
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False).requires_grad_(False)
        every = [nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)]
        self.experts = nn.ModuleDict({str(i): every[i] for i in held})

    def forward(self, x: Tensor) -> Tensor:
        """Return what the experts make of `[tokens, WIDTH]`."""
        weight, expert = self.router(x).softmax(1).max(1)
        order = torch.argsort(expert, stable=True)
        counts = torch.bincount(expert, minlength=EXPERTS)
        made = (self._spread if self.is_spread else self._here)(x[order], counts)
        return torch.zeros_like(x).index_put((order,), made) * weight.unsqueeze(1)

    def _here(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = zip(self.experts.values(), x.split(counts.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts])

    def _spread(self, x: Tensor, ours: Tensor) -> Tensor:
        theirs = torch.empty_like(ours)  # [from rank, expert of ours]
        dist.all_to_all_single(theirs, ours)
        sent, received = (t.view(RANKS, -1).sum(1).tolist() for t in (ours, theirs))
        parts = Exchange.apply(x, sent, received).split(theirs.tolist())
        a_rank = EXPERTS // RANKS
        done: list[Tensor] = [x] * len(parts)
        for i, expert in enumerate(self.experts.values()):
            mine = [parts[r * a_rank + i] for r in range(RANKS)]
            made = expert(torch.cat(mine)).split([len(part) for part in mine])
            for r in range(RANKS):
                done[r * a_rank + i] = made[r]
        return Exchange.apply(torch.cat(done), received, sent)


def mixture(rank: int | None) -> Mixture:
    """Return the same mixture in each process, with the experts of a rank or all."""
    torch.manual_seed(0)
    return Mixture(rank=rank)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error over `[batch, length, WIDTH]`."""
    return (model(x.flatten(0, 1)) - y.flatten(0, 1)).square().mean()


class Exchange(torch.autograd.Function):
    """Sends rows to the ranks that they are for, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sizes = sent, received
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        sent, received = ctx.sizes
        dx = gradients[0].new_empty(sum(sent), gradients[0].shape[1])
        dist.all_to_all_single(dx, gradients[0].contiguous(), sent, received)
        return dx, None, None
