"""Published models at their real sizes, on shapes alone: where their FLOPs are."""

import pytest
from bench.coverage import MODELS, covered

PERCENT = {
    "Llama-3-8B": (87, 0, 13),
    "Qwen3-30B-A3B": (26, 39, 35),
    "gpt-oss-120b": (24, 57, 19),
    "Mixtral-8x7B": (11, 82, 8),
    "DeepSeek-V3": (34, 44, 22),
}
"""Of linear layers, experts and causal attention at 8,192 tokens, computed from the configs."""
ALL_PAIRS = ("gpt-oss-120b",)
"""Those whose attention computes all pairs of positions in transformers, for its sinks."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PERCENT)
def test_the_flops_of_a_published_model_are_where_they_are_known_to_be(name: str) -> None:
    shares = covered(MODELS[name]).by_kind()
    found = [shares.get(kind, 0.0) for kind in ("linear", "experts", "attention")]
    if name in ALL_PAIRS:
        length = MODELS[name].tokens
        found[2] *= (length + 1) / (2 * length)
    whole = sum(found) + shares.get("router", 0.0)
    assert [100 * share / whole for share in found] == pytest.approx(PERCENT[name], abs=0.7)
