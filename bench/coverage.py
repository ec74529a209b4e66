"""What FP8 covers of well-known models: the table of docs/coverage.md.

Run: `python -m bench.coverage`, in some minutes. Models lie on the meta device, made from the
numbers of their published configs; a step runs on shapes alone.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import unclamp
from unclamp.blueprint import batch_of, model_of
from unclamp.covered import CoverageReport, short

SHOWN = ("linear", "experts", "attention")
"""Kinds of products that have a column."""


class Known(NamedTuple):
    """A model that is published: its config, and the tokens of a sequence."""

    config: dict[str, Any]
    tokens: int


def causal(kind: str, architecture: str, **numbers: Any) -> dict[str, Any]:
    """Return the config of a causal language model."""
    return {"model_type": kind, "architectures": [architecture], **numbers}


MODELS: dict[str, Known] = {
    "Llama-3-8B": Known(
        causal(
            "llama", "LlamaForCausalLM", hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
        ), 8192,
    ),
    "Qwen3-30B-A3B": Known(
        causal(
            "qwen3_moe", "Qwen3MoeForCausalLM", hidden_size=2048, intermediate_size=6144,
            num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
            max_position_embeddings=40960, norm_topk_prob=True, tie_word_embeddings=False,
        ), 8192,
    ),
    "gpt-oss-120b": Known(
        causal(
            "gpt_oss", "GptOssForCausalLM", hidden_size=2880, intermediate_size=2880,
            num_hidden_layers=36, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
            num_local_experts=128, num_experts_per_tok=4, vocab_size=201088, sliding_window=128,
            max_position_embeddings=131072, tie_word_embeddings=False,
        ), 8192,
    ),
    "Mixtral-8x7B": Known(
        causal(
            "mixtral", "MixtralForCausalLM", hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            num_local_experts=8, num_experts_per_tok=2, vocab_size=32000,
            max_position_embeddings=32768, tie_word_embeddings=False,
        ), 8192,
    ),
    "DeepSeek-V3": Known(
        causal(
            "deepseek_v3", "DeepseekV3ForCausalLM", hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
            num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64,
            qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=256, n_shared_experts=1,
            num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=3,
            vocab_size=129280, max_position_embeddings=163840, tie_word_embeddings=False,
        ), 8192,
    ),
    "GPT-2": Known(causal("gpt2", "GPT2LMHeadModel"), 1024),
    "BERT-base": Known(causal("bert", "BertForMaskedLM"), 512),
    "T5-base": Known(
        causal("t5", "T5ForConditionalGeneration", d_model=768, d_ff=3072, num_layers=12,
               num_heads=12, decoder_start_token_id=0), 512,
    ),
    "Gemma-2B": Known(
        causal("gemma", "GemmaForCausalLM", hidden_size=2048, intermediate_size=16384,
               num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
               vocab_size=256000, max_position_embeddings=8192), 8192,
    ),
    "Mamba-130M": Known(causal("mamba", "MambaForCausalLM", num_hidden_layers=24), 16),
    "ViT-B/16": Known(causal("vit", "ViTForImageClassification"), 197),
    "Whisper-small": Known(
        causal("whisper", "WhisperForConditionalGeneration", d_model=768, encoder_layers=12,
               decoder_layers=12, encoder_attention_heads=12, decoder_attention_heads=12,
               encoder_ffn_dim=3072, decoder_ffn_dim=3072, vocab_size=51865), 448,
    ),
    "CLIP ViT-B/32": Known(causal("clip", "CLIPModel"), 77),
}  # fmt: skip


def covered(known: Known) -> CoverageReport:
    """Return the coverage of a model by the default recipe."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(known.config))
        model = model_of(str(file))
        return unclamp.coverage(model, **batch_of(model, batch=1, tokens=known.tokens))


def row(name: str, report: CoverageReport) -> str:
    """Return a model's line of the table."""
    kinds = report.by_kind()
    cells = [short(kinds.get(kind, 0.0)) for kind in SHOWN]
    rest = {kind: share for kind, share in kinds.items() if kind not in SHOWN}
    cells.append(short(sum(rest.values())))
    states = [short(report.share_of(s)) for s in ("would be converted", "would be observed")]
    left = "; ".join(
        f"{kind.rpartition('.')[2]} {short(share)}"
        for kind, (share, _) in report.left_out().items()
    )
    tokens = f"{MODELS[name].tokens}"
    return f"| {' | '.join([name, tokens, *cells, *states, left or 'nothing'])} |"


def main() -> None:
    """Print the table, a row when it is known."""
    print(
        "| model | tokens | linear | experts | attention | rest | converted | observed | left out |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, known in MODELS.items():
        line = row(name, covered(known))
        print(line, flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__).parse_args()
    main()
