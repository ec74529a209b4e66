"""What FP8 covers of every kind of model: tiny ones train, and their FLOPs are those on paper.

The formulas are written from the configs, by hand: tokens, widths, heads. A GEMM has 2 M N K, and
a step three of them; the first convolution of pixels or sound has no gradient of its input.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp.covered import CoverageReport

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCABULARY = 2, 12, 96
TOKENS = BATCH * LENGTH
H, F, LAYERS, HEADS, KV, D = 48, 80, 2, 4, 2, 12
"""Widths of the model and its MLP, layers, heads, heads of keys, and the width of a head."""
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Shares = Mapping[str, float]
"""FLOPs of a step by kind; " (left out)" stands behind kinds that no cast sees."""

COVERED = ("linear", "attention", "patches", "experts")
"""Kinds of products that `convert` takes, wherever it finds them."""


def attention(queries: int, keys: int, depth: int, width: int, *, causal: bool) -> int:
    """FLOPs forward of a batch's attention in all of a layer's heads."""
    pairs = queries * keys
    if causal:
        pairs = sum(min(i + 1, keys) for i in range(queries))
    return 2 * BATCH * HEADS * pairs * (depth + width)


def named(forward: Mapping[str, float], *, twice: Mapping[str, float] | None = None) -> Shares:
    """Return a step's FLOPs from those of its forward; `twice` are without a gradient of input."""
    step = {kind: 3 * flops for kind, flops in forward.items()}
    for kind, flops in (twice or {}).items():
        step[kind] = step.get(kind, 0) + 2 * flops
    return {
        kind if kind in COVERED or kind.endswith("(left out)") else f"{kind} (left out)": flops
        for kind, flops in step.items()
    }


def llama_like(kv: int = KV, mlp: int | None = None, **others: int) -> dict[str, float]:
    """FLOPs forward of a decoder with gated MLPs, or something else in their place."""
    project = H * HEADS * D + 2 * H * kv * D + HEADS * D * H
    mlp = 3 * H * F if mlp is None else mlp
    return {
        "linear": 2 * TOKENS * (LAYERS * (project + mlp) + H * VOCABULARY),
        "attention": LAYERS * attention(LENGTH, LENGTH, D, D, causal=True),
        **others,
    }


def experts_of(width: int, count: int, chosen: int, layers: int = LAYERS) -> dict[str, int]:
    return {
        "experts": layers * 2 * TOKENS * chosen * 3 * H * width,
        "router": layers * 2 * TOKENS * H * count,
    }


def layer(tokens: int, h: int = H, f: int = F) -> int:
    """FLOPs forward of a plain transformer layer's linear layers."""
    return 2 * tokens * (4 * h * h + 2 * h * f)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of model.

    Attributes:
        model: Makes a tiny one.
        batch: What it is called with.
        flops: Those of a step, by kind.
        left_out: What is not covered, and why, in the words of the report; by its name there.
    """

    model: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    flops: Shares
    evaluates: bool = False


def lm(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = getattr(transformers, f"{name}Config")(**config)
        return getattr(transformers, f"{name}ForCausalLM")(made)

    return make


def ids(length: int = LENGTH) -> Tensor:
    return torch.arange(BATCH * length).reshape(BATCH, length) * 7 % (VOCABULARY - 3) + 3


TEXT = {"input_ids": ids(), "labels": ids()}
ATTENDS_CAUSALLY = LAYERS * attention(LENGTH, LENGTH, D, D, causal=True)
ATTENDS = LAYERS * attention(LENGTH, LENGTH, D, D, causal=False)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**DECODER))


ANSWER = 8
"""Tokens that an encoder-decoder writes."""


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=H, d_kv=D, d_ff=F, num_layers=LAYERS, num_heads=HEADS, vocab_size=VOCABULARY,
            decoder_start_token_id=0, bos_token_id=1,
        )
    )  # fmt: skip


def encoder_decoder(source: int, answer: int, *, causal: bool) -> dict[str, float]:
    """FLOPs forward of an encoder, a decoder that reads it, and a head."""
    cross = 2 * BATCH * (answer + source) * 2 * H * H
    return {
        "linear": LAYERS * (layer(BATCH * source) + layer(BATCH * answer) + cross)
        + 2 * BATCH * answer * H * VOCABULARY,
        "attention": LAYERS * (
            attention(source, source, D, D, causal=False)
            + attention(answer, answer, D, D, causal=causal)
            + attention(answer, source, D, D, causal=False)
        ),
    }  # fmt: skip


SIDE, PATCH = 24, 8
PATCHES = (SIDE // PATCH) ** 2
VISION = {
    "hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": F, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
SEES = LAYERS * attention(PATCHES + 1, PATCHES + 1, D, D, causal=False)
PATCHED = {"patches": 2 * BATCH * PATCHES * 3 * PATCH * PATCH * H}


def images() -> Tensor:
    return torch.linspace(-1, 1, BATCH * 3 * SIDE * SIDE).reshape(BATCH, 3, SIDE, SIDE)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=5))


MELS, FRAMES = 8, 20


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=H, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=F, decoder_ffn_dim=F, num_mel_bins=MELS,
        vocab_size=VOCABULARY, max_source_positions=FRAMES // 2, max_target_positions=LENGTH,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=H, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH, vocab_size=VOCABULARY,
            bos_token_id=1, eos_token_id=2, loss_type="ForCausalLMLoss",
        )
    )  # fmt: skip


NOPE, ROPE, WIDE, Q_RANK, KV_RANK = 8, 4, 12, 20, 16
DEEP_HEADS = (
    H * Q_RANK + Q_RANK * HEADS * (NOPE + ROPE) + H * (KV_RANK + ROPE)
    + KV_RANK * HEADS * (NOPE + WIDE) + HEADS * WIDE * H
)  # fmt: skip
SMALL = 20
"""Width of a small expert."""

INNER, STATE, RANK, TAPS = 2 * H, 6, 3, 4
"""Of Mamba: width of its mixer, of its state, of the step's projection, and its convolution."""

CLIP_TEXT = {"hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
             "intermediate_size": F, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
SHARED = 16
"""Width in which CLIP compares."""


def clip() -> nn.Module:
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=SHARED)
    )


class Recurrent(nn.Module):
    """An LSTM with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(H, F, batch_first=True)
        self.head = nn.Linear(F, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def waves(length: int = LENGTH) -> Tensor:
    return torch.linspace(-3, 3, BATCH * length * H).reshape(BATCH, length, H).sin()


def mha(queries: int, keys: int) -> dict[str, float]:
    """FLOPs forward of one nn.MultiheadAttention."""
    return {
        "linear": 2 * BATCH * (2 * queries + 2 * keys) * H * H,
        "attention": attention(queries, keys, D, D, causal=False),
    }


def summed(*parts: Mapping[str, float]) -> dict[str, float]:
    return {kind: sum(p.get(kind, 0) for p in parts) for kind in itertools.chain(*parts)}


def mlp(length: int) -> dict[str, float]:
    return {"linear": 2 * BATCH * length * 2 * H * F}


CASES = {
    "Llama": Case(
        model=lm("Llama", **DECODER, num_key_value_heads=KV),
        batch=TEXT,
        flops=named(llama_like()),
    ),
    "GPT-2": Case(
        model=gpt2,
        batch=TEXT,
        flops=named({
            "linear": LAYERS * layer(TOKENS, f=4 * H) + 2 * TOKENS * H * VOCABULARY,
            "attention": ATTENDS_CAUSALLY,
        }),
    ),
    "BERT": Case(
        model=bert,
        batch=TEXT,
        flops=named({
            "linear": LAYERS * layer(TOKENS) + 2 * TOKENS * (H * H + H * VOCABULARY),
            "attention": ATTENDS,
        }),
    ),
    "T5": Case(
        model=t5,
        batch={"input_ids": ids(), "labels": ids(ANSWER)},
        flops=named(encoder_decoder(LENGTH, ANSWER, causal=False)),  # a bias, and no kernel's flag
    ),
    "ViT": Case(
        model=vit,
        batch={"pixel_values": images(), "labels": torch.tensor([1, 3])},
        flops=named(
            {
                "linear": LAYERS * layer(BATCH * (PATCHES + 1)) + 2 * BATCH * H * 5,
                "attention": SEES,
            },
            twice=PATCHED,
        ),
    ),
    "Whisper": Case(
        model=whisper,
        batch={
            "input_features": torch.linspace(-1, 1, BATCH * MELS * FRAMES).view(BATCH, MELS, -1),
            "labels": ids(),
        },
        flops=named(
            encoder_decoder(FRAMES // 2, LENGTH, causal=True)
            | {"convolution": 2 * BATCH * (FRAMES // 2) * 3 * H * H},
            twice={"convolution": 2 * BATCH * FRAMES * 3 * MELS * H},
        ),
    ),
    "Mixtral": Case(
        model=lm("Mixtral", **DECODER, num_key_value_heads=KV, num_local_experts=4),
        batch=TEXT,
        flops=named(llama_like(mlp=0, **experts_of(F, 4, 2))),
    ),
    "Qwen3-MoE": Case(
        model=lm("Qwen3Moe", **DECODER, num_key_value_heads=KV, head_dim=D, num_experts=6,
                 num_experts_per_tok=3, moe_intermediate_size=SMALL),
        batch=TEXT,
        flops=named(llama_like(mlp=0, **experts_of(SMALL, 6, 3))),
    ),
    "gpt-oss": Case(
        model=lm("GptOss", **DECODER, num_key_value_heads=KV, head_dim=D, num_local_experts=4,
                 num_experts_per_tok=2),
        batch=TEXT,
        flops=named(  # its attention has sinks, and computes all pairs
            llama_like(mlp=0, **experts_of(F, 4, 2)) | {"attention": ATTENDS}
        ),
    ),
    "DeepSeek-V3": Case(
        model=lm("DeepseekV3", **DECODER, num_key_value_heads=HEADS, n_routed_experts=8, n_group=2,
                 topk_group=1, num_experts_per_tok=2, moe_intermediate_size=SMALL,
                 q_lora_rank=Q_RANK, kv_lora_rank=KV_RANK, qk_rope_head_dim=ROPE,
                 qk_nope_head_dim=NOPE, v_head_dim=WIDE, first_k_dense_replace=1),
        batch=TEXT,
        flops=named({
            "linear": 2 * TOKENS * (LAYERS * DEEP_HEADS + 3 * H * F + 3 * H * SMALL
                                    + H * VOCABULARY),
            "attention": LAYERS * attention(LENGTH, LENGTH, NOPE + ROPE, WIDE, causal=True),
            **experts_of(SMALL, 8, 2, layers=1),
        }),
    ),
    "Gemma": Case(
        model=lm("Gemma", **DECODER, num_key_value_heads=1, head_dim=D),
        batch=TEXT,
        flops=named(llama_like(kv=1)),
    ),
    "Mamba": Case(
        model=lm("Mamba", hidden_size=H, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
                 state_size=STATE, time_step_rank=RANK, conv_kernel=TAPS, pad_token_id=0,
                 bos_token_id=1, eos_token_id=2),
        batch=TEXT,
        flops=named({
            "linear": 2 * TOKENS * (LAYERS * (H * 2 * INNER + INNER * (RANK + 2 * STATE)
                                              + INNER * H) + H * VOCABULARY),
            "linear (left out)": LAYERS * 2 * TOKENS * RANK * INNER,  # read outside of its layer
            "convolution": LAYERS * 2 * BATCH * (LENGTH + TAPS - 1) * INNER * TAPS,
            "matmul": LAYERS * 2 * TOKENS * INNER * STATE,
        }),
    ),
    "CLIP": Case(
        model=clip,
        batch={"input_ids": ids(), "pixel_values": images(), "return_loss": torch.tensor(True)},
        flops=named(
            {
                "linear": LAYERS * (layer(TOKENS) + layer(BATCH * (PATCHES + 1)))
                + 2 * 2 * BATCH * H * SHARED,
                "attention": ATTENDS_CAUSALLY + SEES,
                "matmul": 2 * BATCH * BATCH * SHARED,
            },
            twice=PATCHED,
        ),
    ),
    "nn.Transformer": Case(
        model=lambda: nn.Transformer(H, HEADS, LAYERS, LAYERS, F, batch_first=True),
        batch={"src": waves(), "tgt": waves(ANSWER)},
        flops=named(
            summed(*LAYERS * [
                mha(LENGTH, LENGTH), mlp(LENGTH), mha(ANSWER, ANSWER), mha(ANSWER, LENGTH),
                mlp(ANSWER),
            ]),
        ),
    ),
    "nn.TransformerEncoder": Case(
        model=lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(H, HEADS, F, batch_first=True), LAYERS
        ),
        batch={"src": waves()},
        evaluates=True,  # as its fast path has it
        flops=named(summed(*LAYERS * [mha(LENGTH, LENGTH), mlp(LENGTH)])),
    ),
    "nn.LSTM": Case(
        model=Recurrent,
        batch={"x": waves()},
        flops=named(
            {"linear": 2 * TOKENS * F * H, "recurrent": 2 * TOKENS * F * 4 * F},
            twice={"recurrent": 2 * TOKENS * H * 4 * F},
        ),
    ),
}  # fmt: skip

NO_GRADIENT = {
    # The input of the first layer wants no gradient, and neither does an LSTM's first state.
    "nn.LSTM": {"recurrent (left out)": 2 * BATCH * F * 4 * F},
    "nn.Transformer": {"linear": 2 * (TOKENS + BATCH * ANSWER) * 3 * H * H},
    "nn.TransformerEncoder": {"linear": 2 * TOKENS * 3 * H * H},
}


def expected(name: str) -> Shares:
    return {
        kind: flops - NO_GRADIENT.get(name, {}).get(kind, 0)
        for kind, flops in CASES[name].flops.items()
    }


def found_kinds(report: CoverageReport) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for product in report.products:
        kind = product.kind + (" (left out)" if product.state == "left out" else "")
        kinds[kind] = kinds.get(kind, 0) + product.flops
    return kinds


def train(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Make three steps, and see that they learn from something finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        output = model(**batch)
        loss = getattr(output, "loss", None)
        loss = output.square().mean() if loss is None else loss
        loss.backward()
        assert math.isfinite(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the libraries
@pytest.mark.parametrize("name", CASES)
def test_the_flops_of_an_architecture_are_those_on_paper(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    plain = unclamp.coverage(model, **case.batch)
    assert found_kinds(plain) == expected(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", unclamp.UnclampWarning)
        unclamp.convert(model, unclamp.Recipe())
    if case.evaluates:
        model.eval()
    train(model, case.batch)
    report = unclamp.coverage(model, **case.batch)
    assert found_kinds(report) == expected(name)
    left = {kind: f for kind, f in expected(name).items() if kind.endswith("(left out)")}
    total = sum(expected(name).values())
    assert report.share == pytest.approx(1 - sum(left.values()) / total)
    named = sum(share for share, _ in report.left_out().values())
    assert named == pytest.approx(1 - report.share)
    assert all(why for _, why in report.left_out().values())
    assert report.share >= 0.95 or left  # and what is left is named with its share
    is_moe = any(kind.startswith("router") for kind in left)
    assert not is_moe or "router" in report.left_out()
    assert not is_moe or report.left_out()["router"][1].endswith("on purpose")
    assert report.unknown == ()
