"""`unclamp coverage`: from a config.json to a table, without weights; clear lines for others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patience import PATIENCE_S
from unclamp import HighPrecision, Recipe
from unclamp.blueprint import batch_of, model_of
from unclamp.cli import app
from unclamp.covered import CoverageReport
from unclamp.errors import UnclampError

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


def written(folder: Path, **config: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(LLAMA | config))
    return file


def asked(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["coverage", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    file = written(tmp_path)
    for name in (file, tmp_path):
        text = asked("--hf-model", name, "--tokens", 16, "--batch", 2)
        assert "LlamaForCausalLM, a step of input_ids 2 x 16, labels 2 x 16" in text
        assert "model.layers.*.mlp.down_proj x2" in text
        assert "of the FLOPs" in text


def test_its_json_is_the_report(tmp_path: Path) -> None:
    data = json.loads(asked("--hf-model", written(tmp_path), "--tokens", 16, "--json"))
    report = CoverageReport.from_dict(data)
    down = next(p for p in report.products if p.fqn == "model.layers.1.mlp.down_proj")
    assert (down.output, down.grad_input, down.grad_weight) == (2 * 16 * 32 * 64,) * 3
    assert data["flops"] == report.flops
    assert data["sentence"] == report.sentence()


def test_without_tokens_the_model_says_how_many(tmp_path: Path) -> None:
    assert "input_ids 1 x 64" in asked("--hf-model", written(tmp_path))


def test_a_recipe_decides_what_is_converted(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    high = HighPrecision()
    rule = Recipe().override("*.mlp.*", input=high, weight=high, grad_output=high)
    recipe.write_text(rule.to_toml())
    data = json.loads(
        asked("--hf-model", written(tmp_path), "--tokens", 16, "--recipe", recipe, "--json")
    )
    states = {p["fqn"]: p["state"] for p in data["products"]}
    assert states["model.layers.0.mlp.up_proj"] == "left out"
    assert states["model.layers.0.self_attn.q_proj"] == "converted"


BROKEN = {
    "no model_type": (lambda f: f.write_text("{}"), "names no model_type"),
    "no JSON": (lambda f: f.write_text("{"), "cannot read the config"),
    "unknown": (lambda f: f.write_text('{"model_type": "no-such"}'), "cannot read the config"),
    "sizes": (lambda f: f.write_text(json.dumps(LLAMA | {"hidden_size": "x"})), "config"),
    "missing": (lambda f: None, "there is no file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_config_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    write, words = BROKEN[case]
    write(tmp_path / "config.json")
    with pytest.raises(UnclampError, match=words) as raised:
        model_of(str(tmp_path / "config.json"))
    assert "\n" not in str(raised.value)


def test_a_model_that_transformers_does_not_know_may_be_misspelt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(UnclampError, match=r"no model_type 'lama'.*'llama'") as raised:
        model_of(str(tmp_path))
    assert len(str(raised.value)) < 300  # and does not list the hundreds that there are


def test_tokens_of_a_model_without_any_are_told_to_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KINDS["vit"][0]))
    given = ["coverage", "--hf-model", str(tmp_path)]
    with_tokens = CliRunner().invoke(app, [*given, "--tokens", "16"])
    assert "--tokens changes nothing" in with_tokens.stderr
    assert with_tokens.stdout == CliRunner().invoke(app, given).stdout
    written(tmp_path)
    assert not CliRunner().invoke(app, [*given, "--tokens", "16"]).stderr


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnclampError, match=r"has no config\.json"):
        model_of(str(tmp_path))


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    model = model_of(str(written(tmp_path)))
    with pytest.raises(UnclampError, match="64 positions, got 65 tokens"):
        batch_of(model, batch=1, tokens=65)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "unclamp", "coverage", "--hf-model", "no-such/model"],
        env=os.environ | hub | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "the hub cannot be reached" in line


PICTURES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": 32, "patch_size": 8}  # fmt: skip
TEXTS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 16,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KINDS = {
    "vit": ({"model_type": "vit", "architectures": ["ViTForImageClassification"], **PICTURES},
            {"pixel_values": (2, 3, 32, 32), "labels": (2,)}),
    "clip": ({"model_type": "clip", "text_config": TEXTS, "vision_config": PICTURES},
             {"pixel_values": (2, 3, 32, 32), "input_ids": (2, 16)}),
    "whisper": ({"model_type": "whisper", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8,
                 "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100,
                 "max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0,
                 "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
                 "architectures": ["WhisperForConditionalGeneration"]},
                {"input_features": (2, 8, 20), "labels": (2, 16)}),
    "t5": ({"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1,
            "num_heads": 4, "vocab_size": 100, "decoder_start_token_id": 0},
           {"input_ids": (2, 16), "labels": (2, 16)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_the_model_asks_for(tmp_path: Path, kind: str) -> None:
    config, shapes = KINDS[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = model_of(str(tmp_path))
    batch = batch_of(model, batch=2, tokens=16)
    assert {n: tuple(t.shape) for n, t in batch.items() if hasattr(t, "shape")} == shapes
    text = asked("--hf-model", tmp_path, "--batch", 2, "--tokens", 16)
    assert "would convert" in text
