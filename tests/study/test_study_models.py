"""Which models a study takes, what makes their tokens, and what is refused before training."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from patience import PATIENCE_S
from unclamp.errors import ConvertError, StudyError, UnclampWarning
from unclamp.runlog import RunLog
from unclamp.study.arms import run_study
from unclamp.study.config import ModelConfig, StudyConfig, default_toml
from unclamp.study.loop import RunPlan, train
from unclamp.study.models import build_model, check_study, tokenize

pytestmark = [
    pytest.mark.filterwarnings("ignore:arm 'smooth'"),  # which says so of GPT-2
    pytest.mark.filterwarnings("ignore:.*has no tokenizer"),
]

SMALL = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2}
TEXT = b"the cat sat on the mat " * 200


def config(**changes: Any) -> StudyConfig:
    base = StudyConfig.from_toml(default_toml()).to_dict()
    base |= {"scenarios": ["text"], "steps": 2, "seeds": [0], "model": SMALL}
    return StudyConfig.from_dict(base | {"data": {"batch_size": 2, "seq_len": 32}} | changes)


def gpt2(path: Path, *, vocabulary: int = 300) -> Path:
    shape: Any = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    ids: Any = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **ids)).save_pretrained(path)
    return path


def llama(path: Path) -> Path:
    shape: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape, **heads)).save_pretrained(path)
    return path


def add_tokenizer(path: Path) -> None:
    words = {word: i for i, word in enumerate(["?", "the", "cat", "sat", "on", "mat"])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(path)


def named(path: Path) -> ModelConfig:
    return ModelConfig(hf_model=str(path))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_folder_without_a_tokenizer_is_trained_on_bytes(make: Any, tmp_path: Path) -> None:
    settings = named(make(tmp_path / "model"))
    tokens = tokenize(settings, build_model(settings), TEXT)
    assert tokens.tolist() == list(TEXT)


def test_bytes_need_a_vocabulary_of_256(tmp_path: Path) -> None:
    settings = named(gpt2(tmp_path / "model", vocabulary=255))
    with pytest.raises(StudyError, match="no tokenizer, and bytes need a vocabulary of 256, got"):
        tokenize(settings, build_model(settings), TEXT)


def test_a_folder_with_a_tokenizer_is_trained_on_its_tokens(tmp_path: Path) -> None:
    settings = named(gpt2(tmp_path / "model"))
    add_tokenizer(tmp_path / "model")
    tokens = tokenize(settings, build_model(settings), TEXT)
    assert tokens.tolist() == [1, 2, 3, 4, 1, 5] * 200


def test_a_tokenizer_that_cannot_be_loaded_is_no_reason_to_train_on_bytes(tmp_path: Path) -> None:
    settings = named(gpt2(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(StudyError, match="cannot load the tokenizer"):
        tokenize(settings, build_model(settings), TEXT)


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    settings = named(gpt2(tmp_path / "model", vocabulary=3))
    add_tokenizer(tmp_path / "model")
    with pytest.raises(StudyError, match="makes token 5, and the model has 3"):
        tokenize(settings, build_model(settings), TEXT)


def test_tokens_are_counted_after_the_tokenizer(tmp_path: Path) -> None:
    model = gpt2(tmp_path / "model")
    add_tokenizer(model)
    text = tmp_path / "text"
    text.write_bytes(TEXT[: 23 * 6])  # 138 bytes, 36 tokens
    study = config(
        model={"hf_model": str(model), "skip": []},
        data={"text": [str(text)], "batch_size": 2, "seq_len": 32},
    )
    with pytest.raises(StudyError, match=r"at least 128 tokens \(4 sequences of 32\), got 36"):
        check_study(study)


def test_a_model_of_which_fp8_covers_little_is_told_of(tmp_path: Path) -> None:
    shape: Any = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 256}
    made = GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **shape)
    GPT2LMHeadModel(made).save_pretrained(tmp_path / "long")
    # Forward, a token: 2 * 12 * 64 a layer and 2 * 8 * 300 in layers, 4 * 8 * 128.5 in attention.
    study = config(
        model={"hf_model": str(tmp_path / "long"), "skip": []},
        data={"batch_size": 1, "seq_len": 256},
    )
    share = (2 * 12 * 64 * 2 + 2 * 8 * 300) / (2 * 12 * 64 * 2 + 2 * 8 * 300 + 2 * 4 * 8 * 128.5)
    assert 0.4 < share < 0.5
    said = rf"would cover little of .*would convert {100 * share:.1f} %"
    with pytest.warns(UnclampWarning, match=said):
        check_study(study)


def test_an_encoder_is_refused_and_a_decoder_of_the_same_kind_is_not(tmp_path: Path) -> None:
    shape: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    for is_decoder in (True, False):
        made = BertConfig(vocab_size=300, num_attention_heads=2, is_decoder=is_decoder, **shape)
        BertLMHeadModel(made).save_pretrained(tmp_path / "bert")
        study = config(model={"hf_model": str(tmp_path / "bert")}, arms={"hp": {}})
        if is_decoder:
            check_study(study)
        else:
            with pytest.raises(StudyError, match=r"expected a causal language model, got .*bert"):
                check_study(study)


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path) -> None:
    model = {"hf_model": str(gpt2(tmp_path / "model")), "skip": []}
    with pytest.raises(StudyError, match=r"has 64 positions, and data\.seq_len is 65"):
        check_study(config(model=model, data={"batch_size": 2, "seq_len": 65}))


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"config.json": "{"}])
def test_a_folder_without_a_model_is_one_line(content: dict[str, str], tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StudyError, match="cannot load the model") as raised:
        build_model(named(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a/b/c", "./nothing", "~x"])
def test_what_is_neither_a_folder_nor_a_name_is_refused_without_asking(name: str) -> None:
    with pytest.raises(StudyError, match="expected the folder of a model or its name on the hub"):
        build_model(ModelConfig(hf_model=name))


def refusing(tmp_path: Path) -> dict[str, str]:
    """A hub on this machine that takes no connection, and an empty cache."""
    endpoint = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "cache")}
    return os.environ | endpoint | {"HF_HUB_OFFLINE": "0"}


def test_a_hub_that_cannot_be_reached_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unclamp", "study", "--hf-model", "no-such/model"]
    command += ["--out", str(tmp_path / "out"), "--scenario", "text"]
    done = subprocess.run(
        command,
        env=refusing(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "'no-such/model' is no folder, is not on this machine" in line
    assert "cannot be reached" in line
    assert not (tmp_path / "out").exists()


LOST = ["tokenizer", "weights", "shard", "shard and index"]


def fetched(cache: Path, name: str) -> Path:
    """Put a model into the cache; return its folder."""
    held = cache / f"models--some--{name.replace(' ', '-')}"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("0123")
    return gpt2(held / "snapshots" / "0123")


def fetched_in_part(cache: Path, lost: str) -> None:
    folder = fetched(cache, lost)
    whole = folder / "model.safetensors"
    if lost != "tokenizer":
        add_tokenizer(folder)
    if lost == "weights":
        whole.unlink()
    if lost.startswith("shard"):
        whole.rename(folder / "model-00001-of-00002.safetensors")
    if lost == "shard":
        index = {f"weight {n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


LOAD = """
import json, sys
from unclamp.study.config import ModelConfig
from unclamp.study.models import build_model, tokenize
for name in sys.argv[1:]:
    settings = ModelConfig(hf_model="some/" + name.replace(" ", "-"))
    try:
        model = build_model(settings)
        said = [model.config.vocab_size, len(tokenize(settings, model, b"abc"))]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said]))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What loading each of some models gives where no hub answers, in one process for all."""
    folder = tmp_path_factory.mktemp("hub")
    cache = folder / "cache"
    add_tokenizer(fetched(cache, "whole"))
    known = fetched(cache, "without").parents[1] / ".no_exist" / "0123"
    known.mkdir(parents=True)
    (known / "tokenizer_config.json").touch()
    for lost in LOST:
        fetched_in_part(cache, lost)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "whole", "without", *LOST],
        env=refusing(folder),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    return said | {"stderr": done.stderr}


def test_a_model_that_was_fetched_is_loaded_without_the_hub(loaded: dict[str, Any]) -> None:
    assert loaded["whole"] == [300, 1]
    assert "Retrying" not in loaded["stderr"]


def test_a_model_of_which_the_hub_said_that_it_has_no_tokenizer_is_trained_on_bytes(
    loaded: dict[str, Any],
) -> None:
    assert loaded["without"] == [300, 3]


@pytest.mark.parametrize("lost", LOST)
def test_a_model_that_was_fetched_in_part_is_not_taken_for_whole(
    lost: str, loaded: dict[str, Any]
) -> None:
    lacking = "a tokenizer, which the hub may have" if lost == "tokenizer" else "all of its weights"
    name = f"some/{lost.replace(' ', '-')}"
    said = f"{name!r} is no folder, is on this machine without {lacking}, and the hub cannot"
    assert loaded[lost].startswith(f"StudyError: {said}")


@pytest.mark.parametrize("tokenizer", [True, False])
def test_bytes_are_warned_of_once_before_anything_trains(tokenizer: bool, tmp_path: Path) -> None:
    model = {"hf_model": str(gpt2(tmp_path / "model")), "skip": []}
    if tokenizer:
        add_tokenizer(tmp_path / "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_study(config(model=model, arms={"dynamic": {"recipe": "dynamic"}}))
    found = [str(w.message) for w in caught if "trained on bytes" in str(w.message)]
    assert len(found) == (not tokenizer)


# Nothing false


def test_an_arm_without_a_layer_in_fp8_is_refused_before_anything_trains(tmp_path: Path) -> None:
    study = config(model={**SMALL, "skip": ["*"]})
    with pytest.raises(StudyError, match=r"arm 'dynamic' has a recipe.*matches skip '\*'"):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_in_high_precision_is_refused_as_an_arm(tmp_path: Path) -> None:
    study = config(arms={"plain": {"recipe": "high_precision"}})
    with pytest.raises(StudyError, match="the recipe leaves each of them in high precision"):
        run_study(study, tmp_path / "out")


def test_a_single_run_without_a_layer_in_fp8_is_refused_too(tmp_path: Path) -> None:
    study = config(model={**SMALL, "skip": ["*"]})
    recipe = study.arms["delayed"].recipe
    run = RunPlan(
        config=study, scenario="text", arm="delayed", seed=0, recipe=recipe, path=tmp_path / "run"
    )
    with pytest.raises(StudyError, match="no layer of the model"):
        train(run)
    assert not (tmp_path / "run").exists()


def test_strict_refuses_a_glob_without_a_match_before_anything_trains(tmp_path: Path) -> None:
    model = {"hf_model": str(gpt2(tmp_path / "model")), "skip": ["nothing"], "strict": True}
    with pytest.raises(ConvertError, match="skip glob matches no linear layer"):
        run_study(config(model=model), tmp_path / "out")


def test_a_model_that_cannot_be_planted_is_refused_before_anything_trains(tmp_path: Path) -> None:
    model = {"hf_model": str(gpt2(tmp_path / "model")), "skip": []}
    with pytest.raises(StudyError, match="plants in a Llama-like model"):
        run_study(config(model=model, scenarios=["outlier"], steps=50), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "is_refused"), [(3, True), (40, True), (41, False)])
def test_a_scenario_that_plants_nothing_is_refused_with_a_way_out(
    steps: int, is_refused: bool, tmp_path: Path
) -> None:
    study = config(scenarios=["outlier"], steps=steps)
    if not is_refused:
        return check_study(study)
    with pytest.raises(StudyError, match=f"plants nothing in {steps} steps.*--steps 41 or more"):
        run_study(study, tmp_path / "out")


def test_gpt2_is_in_fp8_and_its_runs_say_which_globs_matched_nothing(tmp_path: Path) -> None:
    model = gpt2(tmp_path / "model")
    study = config(model={"hf_model": str(model), "skip": ["down_proj"]})
    found = {}
    for arm in ("hp", "delayed", "smooth"):
        run = RunPlan(
            config=study, scenario="text", arm=arm, seed=0, recipe=study.arms[arm].recipe,
            path=tmp_path / arm,
        )  # fmt: skip
        assert train(run) == "finished"
        with RunLog.open(run.path) as log:
            found[arm] = (log.sql("SELECT count(*) AS n FROM casts")["n"][0].as_py(),
                          log.header.notes)  # fmt: skip
    skip = "The skip glob 'down_proj' matched no layer: nothing was left out for it."
    smooth = "The override 'mlp.down_proj' matched no layer: this run is plain delayed."
    on_bytes = (
        f"{str(model)!r} has no tokenizer: it is trained on bytes, which are not the tokens that "
        "it learnt."
    )
    assert found["hp"] == (0, [on_bytes])
    assert found["delayed"][0] > 0
    assert found["delayed"][1] == [on_bytes, skip]
    assert found["smooth"][1] == [on_bytes, skip, smooth]


def test_globs_without_a_match_are_told_of_before_anything_trains(tmp_path: Path) -> None:
    model = {"hf_model": str(gpt2(tmp_path / "model")), "skip": []}
    add_tokenizer(tmp_path / "model")
    with pytest.warns(UnclampWarning) as caught:
        check_study(config(model=model))
    (text,) = [str(w.message) for w in caught]
    assert text.startswith("arm 'smooth': 'mlp.down_proj': override matches no linear layer. ")
    assert "transformer.h.0.mlp.c_proj" in text


def test_a_finished_study_is_not_checked_again(tmp_path: Path) -> None:
    model = gpt2(tmp_path / "model")
    study = config(
        model={"hf_model": str(model), "skip": []},
        arms={"hp": {}, "dynamic": {"recipe": "dynamic"}},
    )
    run_study(study, tmp_path / "out", jobs=1)
    model.rename(tmp_path / "moved")
    run_study(study, tmp_path / "out", jobs=1)
    assert json.loads((tmp_path / "out" / "study.json").read_text())["status"] == "finished"
