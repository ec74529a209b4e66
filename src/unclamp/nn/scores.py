"""From scores to probabilities: scale, cap, masks, sinks, softmax; of all scores, or of a part."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MOST_SCORES = 1 << 22
"""Scores that are made at a time where they are only counted: 16 MB in float32."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of an attention: batch, heads, queries, keys; heads of the keys may be fewer."""

    batch: int
    heads: int
    queries: int
    keys: int
    key_heads: int

    @property
    def shared_by(self) -> int:
        """Heads that share a head of the keys."""
        return self.heads // self.key_heads


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the scores of an attention: slices of batch, heads and queries."""

    batch: slice
    heads: slice
    queries: slice

    def heads_of_keys(self, shape: Shape) -> slice | Tensor:
        """Return the head of the keys of each head."""
        if shape.shared_by == 1:
            return self.heads
        return torch.arange(*self.heads.indices(shape.heads)) // shape.shared_by


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How scores become probabilities.

    Attributes:
        scale: What `q @ k.T` is multiplied by.
        is_causal: Whether query i sees the keys 0 to i alone: torch's sense, from the top left.
        masks: Each boolean (True: is seen) or added, broadcast to `[B, H, queries, keys]`.
        softcap: Scores are brought into (-softcap, softcap) by a tanh, before the masks.
        sinks: One score a head that takes a share of the probabilities, without a value, `[heads]`.
    """

    scale: float
    is_causal: bool = False
    masks: tuple[Tensor, ...] = ()
    softcap: float | None = None
    sinks: Tensor | None = None

    def of_heads(self, heads: slice, shape: Shape) -> "Scoring":
        """Return that of some heads."""
        masks = (m.expand(shape.batch, shape.heads, *m.shape[-2:])[:, heads] for m in self.masks)
        sinks = None if self.sinks is None else self.sinks[heads]
        return replace(self, masks=tuple(masks), sinks=sinks)

    def detached(self) -> "Scoring":
        """Return it without a graph."""
        return replace(
            self,
            masks=tuple(mask.detach() for mask in self.masks),
            sinks=None if self.sinks is None else self.sinks.detach(),
        )

    def probabilities(self, products: Tensor, shape: Shape, part: Part | None = None) -> Tensor:
        """Return the probabilities of `q @ k.T`, `[batch, heads, queries, keys]`, in float32.

        Numerics: a query that sees no key has probabilities of zero, as torch has it.
        """
        part = part or Part(batch=slice(None), heads=slice(None), queries=slice(None))
        scores = products.to(torch.float32) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.is_causal:
            first = part.queries.indices(shape.queries)[0]
            rows = torch.arange(first, first + scores.shape[-2], device=scores.device)
            keys = torch.arange(shape.keys, device=scores.device)
            scores = scores.masked_fill(keys > rows[:, None], -torch.inf)
        for mask in self.masks:
            mask = _part_of(mask, shape, part)
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = scores + mask
        if self.sinks is None:
            return torch.ops.aten._safe_softmax(scores, -1)
        sinks = self.sinks[part.heads].to(torch.float32).view(-1, 1, 1)
        with_sinks = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        return torch.softmax(with_sinks, -1)[..., :-1]


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What an attention is asked for: its tensors, and how probabilities are made of them.

    Shapes: `q` `[B, H, L, D]`, `k` `[B, J, S, D]`, `v` `[B, J, S, E]`, H a multiple of J.

    Attributes:
        dropout: The share of the probabilities that is dropped.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scoring: Scoring
    dropout: float = 0.0

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        batch, heads, queries = self.q.shape[:3]
        keys, key_heads = self.k.shape[2], self.k.shape[1]
        return Shape(batch=batch, heads=heads, queries=queries, keys=keys, key_heads=key_heads)

    def heads_of(self, head: int) -> slice:
        """Return the heads that share a head of the keys."""
        shared_by = self.shape.shared_by
        return slice(head * shared_by, (head + 1) * shared_by)

    def of_head(self, head: int) -> "Attended":
        """Return what belongs to one head of the keys."""
        heads, keys = self.heads_of(head), slice(head, head + 1)
        return replace(
            self,
            q=self.q[:, heads],
            k=self.k[:, keys],
            v=self.v[:, keys],
            scoring=self.scoring.of_heads(heads, self.shape),
        )

    def detached(self) -> "Attended":
        """Return it without a graph."""
        q, k, v = (t.detach() for t in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, scoring=self.scoring.detached())

    def in_dtype(self, dtype: torch.dtype | None) -> "Attended":
        """Return it with queries, keys and values in a dtype; as they are without one."""
        if dtype is None:
            return self
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def without_tensors(self) -> "Attended":
        """Return it without queries, keys and values."""
        nothing = self.q.new_empty(0)
        return replace(self, q=nothing, k=nothing, v=nothing)

    def scores(self, part: Part) -> Tensor:
        """Return `q @ k.T` of a part, float32."""
        k = self.k[part.batch, part.heads_of_keys(self.shape)]
        q = self.q[part.batch, part.heads, part.queries]
        return q.to(torch.float32) @ k.to(torch.float32).mT

    def probabilities(self, scores: Tensor, part: Part) -> Tensor:
        """Return those of a part's scores, float32, as large as what is left of them by dropout."""
        made = self.scoring.probabilities(scores, self.shape, part)
        return made / (1 - self.dropout) if 0 < self.dropout < 1 else made

    def score_gradient(self, dy: Tensor, part: Part) -> Tensor:
        """Return the gradient of a part of `q @ k.T`, made of that of the output, float32."""
        v = self.v[part.batch, part.heads_of_keys(self.shape)].to(torch.float32)
        with torch.enable_grad():
            scores = self.scores(part).requires_grad_()
            p = self.probabilities(scores, part)
        own = dy[part.batch, part.heads, part.queries].to(torch.float32)
        return torch.autograd.grad(p, scores, own @ v.mT)[0]


def asked_by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """Return what `F.scaled_dot_product_attention` is asked for by these arguments.

    Shapes: `q` `[..., H, L, D]`, `k` `[..., J, S, D]`, `v` `[..., J, S, E]`; leading shapes, and
    heads unless `enable_gqa`, broadcast. Two and three dimensions have one head.

    Raises:
        ValueError: A mask and `is_causal`, or heads that are no multiple of those of the keys.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("expected either attn_mask or is_causal=True, got both")
    if attn_mask is not None and attn_mask.ndim > q.ndim:
        raise ValueError(f"expected a mask of {q.ndim} dimensions or fewer, got {attn_mask.ndim}")
    has_heads = q.ndim > 3
    q, k, v = ((t if has_heads else t.unsqueeze(-3)) for t in (q, k, v))
    if attn_mask is not None and not has_heads and attn_mask.ndim > 2:
        attn_mask = attn_mask.unsqueeze(-3)
    if enable_gqa and q.shape[-3] % k.shape[-3]:
        raise ValueError(
            f"expected a number of heads that is a multiple of the keys', got {q.shape[-3]} and "
            f"{k.shape[-3]}"
        )
    leading = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    heads = torch.broadcast_shapes(*([t.shape[-3]] for t in (k, v)))
    if not enable_gqa:
        heads = torch.broadcast_shapes(heads, [q.shape[-3]])
    own = [q.shape[-3]] if enable_gqa else heads
    q = q.expand(*leading, *own, *q.shape[-2:])
    k, v = (t.expand(*leading, *heads, *t.shape[-2:]) for t in (k, v))
    if attn_mask is not None and len(leading) > 1:
        attn_mask = attn_mask.expand(*leading, own[0], q.shape[-2], k.shape[-2])
        attn_mask = attn_mask.reshape(-1, *attn_mask.shape[-3:])
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scoring = Scoring(
        scale=scale, is_causal=is_causal, masks=() if attn_mask is None else (attn_mask,)
    )
    return Attended(q=q, k=k, v=v, scoring=scoring, dropout=dropout_p)


def _part_of(mask: Tensor, shape: Shape, part: Part) -> Tensor:
    whole = mask.expand(shape.batch, shape.heads, shape.queries, shape.keys)
    return whole[part.batch, part.heads, part.queries]


def parts(shape: Shape) -> Iterator[Part]:
    """Cut an attention into parts of `MOST_SCORES` scores at most, and one query at least."""
    a_head = shape.queries * shape.keys
    every = slice(None)
    if a_head * shape.heads <= MOST_SCORES:
        for batch in _cut(shape.batch, MOST_SCORES // max(a_head * shape.heads, 1)):
            yield Part(batch=batch, heads=every, queries=every)
    elif a_head <= MOST_SCORES:
        for batch in _cut(shape.batch, 1):
            for heads in _cut(shape.heads, MOST_SCORES // a_head):
                yield Part(batch=batch, heads=heads, queries=every)
    else:
        for batch in _cut(shape.batch, 1):
            for heads in _cut(shape.heads, 1):
                for queries in _cut(shape.queries, max(MOST_SCORES // shape.keys, 1)):
                    yield Part(batch=batch, heads=heads, queries=queries)


def _cut(length: int, step: int) -> Iterator[slice]:
    for first in range(0, length, max(step, 1)):
        yield slice(first, min(first + step, length))
