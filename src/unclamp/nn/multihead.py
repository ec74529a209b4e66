"""`nn.MultiheadAttention`: its projections, which it reads past their layers, and its attention.

Its products are `in_proj` (or `q_proj`, `k_proj`, `v_proj`, where keys or values have another width
than queries), `qk` and `pv`; `out_proj` is a layer of its own, and is called as one here.

What is computed follows `F.multi_head_attention_forward` operation by operation, so that where
nothing is cast the bits are the plain module's. In evaluation that has a path of its own in one
call: it is the plain module's, and is not taken where anything is in FP8.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp.errors import UnsupportedError
from unclamp.names import shown
from unclamp.nn.attend import PV, QK, AttentionProducts, attend
from unclamp.nn.attention import WithAttention
from unclamp.nn.operands import Operands
from unclamp.nn.product import multiply
from unclamp.nn.products import Matrix, products_in
from unclamp.nn.scores import Attended, Scoring

IN_PROJ = "in_proj"
SEPARATE = ("q_proj", "k_proj", "v_proj")
Mask = Tensor | None


class Fp8MultiheadAttention(WithAttention, nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose operands go through FP8; see the module's text.

    Shapes: those of `nn.MultiheadAttention`.
    """

    @classmethod
    def matrices(cls, module: nn.Module) -> dict[str, Matrix]:
        """Return the projections of the input, and the two products without a weight."""
        names = [IN_PROJ] if getattr(module, "_qkv_same_embed_dim", True) else SEPARATE
        made: dict[str, Matrix] = {}
        for name in names:
            weight = getattr(module, f"{name}_weight")
            made[name] = Matrix(f"{name}_weight", tuple(weight.shape))
        return {**made, QK: Matrix(None), PV: Matrix(None)}

    @classmethod
    def heads(cls, module: nn.Module) -> int:
        """Return its heads."""
        assert isinstance(module, nn.MultiheadAttention)
        return module.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Mask = None,
        need_weights: bool = True,
        attn_mask: Mask = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Mask]:
        """Return what the plain module does, by products that are cast or counted."""
        if not self._goes_by_products(query, key, value):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        if query.is_nested:
            return self._of_sequences(query), None
        is_batched = F._mha_shape_check(  # pyright: ignore[reportAttributeAccessIssue]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if not is_batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = _by_time(query, key, value)
        length, batch, _ = query.shape
        self._check(query, key, value)
        mask, is_causal = self._mask(
            query, key, key_padding_mask, attn_mask, needs_weights=need_weights, hint=is_causal
        )
        q, k, v = self._heads(*self._projected(query, key, value))
        output, weights = self._attended(
            q, k, v, mask, is_causal=is_causal, needs_weights=need_weights
        )
        output = output.permute(2, 0, 1, 3).reshape(length * batch, self.embed_dim)
        output = self.out_proj(output).view(length, batch, -1)
        weights = weights if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(1, 0) if self.batch_first else output, weights

    def _of_sequences(self, x: Tensor) -> Tensor:
        """Return self-attention in sequences of several lengths, as torch's encoders nest them."""
        projected = self._linear(IN_PROJ, x, self.in_proj_weight, self.in_proj_bias)
        lengths = [len(each) for each in projected.unbind()]
        padded = projected.to_padded_tensor(0.0)
        q, k, v = self._heads(*_split(padded.transpose(0, 1), 3, self.embed_dim))
        seen = torch.arange(padded.shape[1], device=x.device) < torch.tensor(
            lengths, device=x.device
        ).unsqueeze(1)
        mask = q.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        mask = mask.repeat_interleave(self.num_heads, 0).unsqueeze(1)
        output, _ = self._attended(q, k, v, mask, is_causal=False, needs_weights=False)
        output = output.transpose(1, 2).flatten(2)
        parts = [own[:length] for own, length in zip(output, lengths, strict=True)]
        return self.out_proj(torch.nested.as_nested_tensor(parts, layout=x.layout))

    def _goes_by_products(self, *inputs: Tensor) -> bool:
        """Whether anything is computed in FP8, or counted in a training."""
        own = [*products_in(self).values(), *products_in(self.out_proj).values()]
        if any(not (each.is_plain or each.counts_only) for each in own):
            return True
        if any(t.is_nested for t in inputs) or not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in (*inputs, *self.parameters()))

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise a ValueError where sizes do not fit."""
        if query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"expected queries of {self.embed_dim} features, got {query.shape[-1]}"
            )
        wants = key.shape if self._qkv_same_embed_dim else (*key.shape[:2], value.shape[-1])
        if value.shape != wants:
            raise ValueError(f"expected values of {list(wants)}, got {list(value.shape)}")

    def _mask(
        self, query: Tensor, key: Tensor, padding: Mask, mask: Mask, *, needs_weights: bool,
        hint: bool,
    ) -> tuple[Mask, bool]:  # fmt: skip
        """Return both masks in one, added to scores `[1 or batch * heads, L, S]`; and whether
        scores are causal without one.
        """  # noqa: D205
        (length, batch, _), keys = query.shape, key.shape[0]
        padding = F._canonical_mask(
            mask=padding, mask_name="key_padding_mask", other_type=F._none_or_dtype(mask),
            other_name="attn_mask", target_type=query.dtype,
        )  # fmt: skip
        if hint and mask is None:
            raise ValueError("expected attn_mask where is_causal says that it is causal")
        if hint and padding is None and not needs_weights:
            return None, True
        mask = F._canonical_mask(
            mask=mask, mask_name="attn_mask", other_type=None, other_name="",
            target_type=query.dtype, check_other=False,
        )  # fmt: skip
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
            if mask.shape not in ((1, length, keys), (batch * self.num_heads, length, keys)):
                raise ValueError(
                    f"expected attn_mask of [{length}, {keys}] or "
                    f"[{batch * self.num_heads}, {length}, {keys}], got {list(mask.shape)}"
                )
        added = (self.bias_k is not None) + self.add_zero_attn
        mask = F.pad(mask, (0, added)) if mask is not None and added else mask
        if padding is not None:
            padding = F.pad(padding, (0, added)) if added else padding
            padding = padding.view(batch, 1, 1, keys + added)
            padding = padding.expand(-1, self.num_heads, -1, -1).reshape(-1, 1, keys + added)
            mask = padding if mask is None else mask + padding
        return mask, False

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, `[length, batch, embed_dim]` each."""
        width, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = [None] * 3 if bias is None else bias.chunk(3)
            each = zip(SEPARATE, (query, key, value), weights, biases, strict=True)
            q, k, v = (self._linear(name, x, w, b) for name, x, w, b in each)
            return q, k, v
        if query is key and key is value:
            made = self._linear(IN_PROJ, query, weight, bias)
            q, k, v = _split(made, 3, width)
            return q, k, v
        self._check_blocks()
        if key is value:
            w_q, w_kv = weight.split([width, width * 2])
            b_q, b_kv = (None, None) if bias is None else bias.split([width, width * 2])
            q = self._linear(IN_PROJ, query, w_q, b_q)
            k, v = _split(self._linear(IN_PROJ, key, w_kv, b_kv), 2, width)
            return q, k, v
        biases = [None] * 3 if bias is None else bias.chunk(3)
        each = zip((query, key, value), weight.chunk(3), biases, strict=True)
        q, k, v = (self._linear(IN_PROJ, x, w, b) for x, w, b in each)
        return q, k, v

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Mask) -> Tensor:
        own: Operands | None = products_in(self).get(name)
        if own is None:
            return F.linear(x, weight, bias)
        return multiply(own, x, weight, bias, training=self.training)

    def _check_blocks(self) -> None:
        own = products_in(self).get(IN_PROJ)
        if own is not None and own.ledger.sites[own.indices["weight"]].grids:
            raise UnsupportedError(
                f"{shown(own.fqn)}: expected a scale a tensor in cross-attention, and without a "
                "batch, where parts of the weight are multiplied, got rows or blocks with a "
                "history; use Dynamic, or a scale a tensor"
            )

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `[batch, heads, length, width of a head]`, with the keys that the module adds."""
        batch = q.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
        q, k, v = (
            t.view(t.shape[0], batch * self.num_heads, self.head_dim).transpose(0, 1)
            for t in (q, k, v)
        )
        if self.add_zero_attn:
            zero = k.new_zeros(batch * self.num_heads, 1, self.head_dim)
            k, v = torch.cat([k, zero], dim=1), torch.cat([v, zero], dim=1)
        q, k, v = (t.view(batch, self.num_heads, -1, self.head_dim) for t in (q, k, v))
        return q, k, v

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, is_causal: bool, needs_weights: bool
    ) -> tuple[Tensor, Mask]:
        """Return the output of each head, `[batch, heads, length, width]`, and probabilities."""
        dropout = self.dropout if self.training else 0.0
        each = mask
        if mask is not None:
            each = mask.unsqueeze(0) if len(mask) == 1 else mask.view(*q.shape[:2], -1, k.shape[2])

        def plain() -> tuple[Tensor, Mask]:
            if needs_weights:
                return _with_weights(q, k, v, mask, dropout)
            return F.scaled_dot_product_attention(q, k, v, each, dropout, is_causal), None

        def asked() -> Attended:
            scoring = Scoring(
                scale=1 / math.sqrt(self.head_dim),
                is_causal=is_causal,
                masks=() if each is None else (each,),
            )
            return Attended(q=q, k=k, v=v, scoring=scoring, dropout=dropout)

        products = AttentionProducts.of(self)
        output, weights = attend(products, asked, plain, tensors=(q, k, v), training=self.training)
        return output, None if weights is None else weights.to(q.dtype)


def _with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return what torch computes where probabilities are wanted, in the order of its operations."""
    shape = q.shape[:3]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    q = q * math.sqrt(1.0 / float(q.shape[-1]))
    scores = (
        torch.bmm(q, k.transpose(-2, -1))
        if mask is None
        else torch.baddbmm(mask, q, k.transpose(-2, -1))
    )
    weights = torch.softmax(scores, dim=-1)
    weights = F.dropout(weights, p=dropout) if dropout > 0 else weights
    output = torch.bmm(weights, v)
    return output.view(*shape, -1), weights.view(*shape, -1)


def _by_time(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors with time first; what was the same one stays the same one."""
    made = {id(t): t.transpose(1, 0) for t in (q, k, v)}
    return made[id(q)], made[id(k)], made[id(v)]


def _split(x: Tensor, parts: int, width: int) -> Tensor:
    """Return parts of the last dimension as the first, as torch lays them."""
    x = x.unflatten(-1, (parts, width))
    return x.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
