"""The model of a study: where it comes from, what makes its tokens, and how an arm converts it.

A model from the hub is fetched once, by whoever asks first; after that its folder is read, and no
process asks the network again. A folder of which a part is missing, because fetching broke off or
something else fetched less, is not read: without its tokenizer a model would learn bytes.
"""

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from unclamp.errors import StudyError, UnclampWarning, first_line
from unclamp.nn import find_ledgers
from unclamp.nn.convert import ConvertReport, convert, revert
from unclamp.nn.coverage import coverage
from unclamp.nn.unmatched import any_in_fp8, reasons, unmatched_text
from unclamp.recipe import Recipe
from unclamp.study.config import ModelConfig, StudyConfig
from unclamp.study.data import check_length, read_text
from unclamp.study.planting import plant

HUB_WAIT_S = 5.0
"""How long the hub may take to say whether it has a model."""
BYTES = 256
CAUSAL_BITS = 1e-5
"""What a later token may change in the logits of a causal LM: the rounding of float32."""
LITTLE = 0.5
"""Share of the FLOPs below which a study says that FP8 covers little of a model."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers looks for them; shards have an index of the same name."""
_ASKED_FOR = "tokenizer_config.json"
"""A file that every tokenizer on the hub has."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "vocab.json",
    "vocab.txt", "tekken.json",
)  # fmt: skip


def check_study(config: StudyConfig) -> None:
    """Find out before anything trains that each arm, scenario and token is what it seems.

    Overrides and skip globs that match nothing are warned of.

    Raises:
        StudyError: The model or its tokens cannot be used; a scenario cannot be planted, or plants
            nothing; an arm with a recipe would have no layer in FP8.
        ConvertError: As `convert`.
    """
    config.check_marks()
    text = read_text(config.data.text, seq_len=config.data.seq_len)
    model = build_model(config.model)
    check_length(len(tokenize(config.model, model, text)), seq_len=config.data.seq_len)
    if is_on_bytes(config.model):
        warnings.warn(bytes_note(config.model), UnclampWarning, stacklevel=2)
    places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if config.model.hf_model and isinstance(places, int) and places < config.data.seq_len:
        raise StudyError(
            f"{config.model.hf_model!r} has {places} positions, and data.seq_len is "
            f"{config.data.seq_len}; set it to {places} or less"
        )
    if config.model.hf_model:
        _check_causal(config.model.hf_model, model)
        _say_if_little_is_covered(config, model)
    for name, arm in config.arms.items():
        if arm.recipe is not None:
            report = convert_arm(model, arm.recipe, config.model, arm=name)
            if report.unmatched:
                said = unmatched_text(report.unmatched, list(report.converted))
                warnings.warn(f"arm {name!r}: {said}", UnclampWarning, stacklevel=2)
            revert(model)
    if "outlier" in config.scenarios:
        plant(model, seed=config.seeds[0])


def _say_if_little_is_covered(config: StudyConfig, model: nn.Module) -> None:
    """Warn where most of the model's work stays out of FP8: a study of it says little of FP8."""
    tokens = torch.zeros(1, config.data.seq_len, dtype=torch.long)
    try:
        found = coverage(model, input_ids=tokens, labels=tokens)
    except Exception:  # the study itself says what is wrong with a model
        return
    share = found.share_of("would be converted")
    if share < LITTLE:
        warnings.warn(
            f"FP8 would cover little of {config.model.hf_model!r}: {found.sentence()}",
            UnclampWarning,
            stacklevel=3,
        )


@torch.no_grad()
def _check_causal(name: str, model: nn.Module) -> None:
    """Refuse a model that sees the tokens it is asked for, as an encoder does with a head for LMs.

    Transformers loads such a model without an error; its loss is that of copying.
    """
    model.eval()
    tokens = torch.arange(1, 9)[None]
    other = tokens.clone()
    other[0, -1] = 0
    first, second = (model(input_ids=ids).logits[0, 0] for ids in (tokens, other))
    model.train()
    # Experts multiply as many tokens as chose them, and how many may decide a last bit.
    if not torch.allclose(first, second, rtol=0, atol=CAUSAL_BITS * float(first.abs().max())):
        raise StudyError(
            f"expected a causal language model, got {name!r} ({type(model).__name__}): what it "
            "says at the first token depends on the last one, so it sees what it is asked for. It "
            "is an encoder; is_decoder=True in its config.json would make it causal"
        )


def convert_arm(
    model: nn.Module, recipe: Recipe, settings: ModelConfig, *, arm: str = ""
) -> ConvertReport:
    """Convert an arm's model without a warning: what matched nothing is in its runs' headers.

    Raises:
        StudyError: No layer is in FP8 then, so that the arm would be one in high precision.
        ConvertError: As `convert`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnclampWarning)
        report = convert(model, recipe, skip=settings.skip, strict=settings.strict)
    if any_in_fp8(find_ledgers(model)):
        return report
    why = reasons(report.skipped)
    if report.converted:
        why = "the recipe leaves each of them in high precision"
    called = f" {settings.hf_model!r}" if settings.hf_model else ""
    raise StudyError(
        f"{f'arm {arm!r}' if arm else 'an arm'} has a recipe, and no layer of the model{called} "
        f"({type(model).__name__}) would be in FP8: {why}. Change model.skip or the recipe, or "
        "leave the arm out: without FP8 it is an arm without a recipe"
    )


def build_model(settings: ModelConfig) -> nn.Module:
    """Return the model to train: a small Llama, with or without experts, or what the settings name.

    Raises:
        StudyError: The named model cannot be loaded, or the sizes do not fit.
    """
    if settings.hf_model:
        folder = _folder(settings.hf_model)
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise StudyError(
                f"cannot load the model {settings.hf_model!r}: {first_line(error)}"
            ) from error
    if settings.hidden_size % (2 * settings.heads):
        raise StudyError(
            "expected model.hidden_size to be a multiple of 2 * model.heads, "
            f"got {settings.hidden_size} and {settings.heads}"
        )
    sizes: dict[str, Any] = {
        "vocab_size": BYTES,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "tie_word_embeddings": False,
    }
    if settings.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return _mixture(settings, sizes)


def _mixture(settings: ModelConfig, sizes: dict[str, Any]) -> nn.Module:
    """Return a mixture of experts, those of a token together as wide as the Llama's MLP."""
    each = settings.intermediate_size // settings.experts_per_token
    if not each:
        raise StudyError(
            f"expected model.intermediate_size to be at least the {settings.experts_per_token} "
            f"experts of a token that share it, got {settings.intermediate_size}"
        )
    experts: dict[str, Any] = {
        "intermediate_size": each,
        "num_local_experts": settings.experts,
        "num_experts_per_tok": settings.experts_per_token,
    }
    return MixtralForCausalLM(MixtralConfig(**sizes | experts))


def tokenize(settings: ModelConfig, model: nn.Module, text: bytes) -> np.ndarray:
    """Return the text as tokens: its bytes, or what the named model's tokenizer makes of it.

    Raises:
        StudyError: The tokenizer cannot be loaded, or makes tokens that the model does not have;
            or there is none, and fewer than 256 tokens.
    """
    if not settings.hf_model:
        return np.frombuffer(text, dtype=np.uint8)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0)
    tokenizer = _tokenizer(settings.hf_model)
    if tokenizer is None:
        if vocabulary < BYTES:
            raise StudyError(
                f"{settings.hf_model!r} has no tokenizer, and bytes need a vocabulary of {BYTES}, "
                f"got {vocabulary}"
            )
        return np.frombuffer(text, dtype=np.uint8)
    decoded = text.decode("utf-8", errors="replace")
    ids = np.asarray(tokenizer(decoded, verbose=False)["input_ids"], dtype=np.int64)
    if ids.size and ids.max() >= vocabulary:
        raise StudyError(
            f"the tokenizer of {settings.hf_model!r} makes token {ids.max()}, and the model has "
            f"{vocabulary}: they do not belong together"
        )
    return ids


def is_on_bytes(settings: ModelConfig) -> bool:
    """Whether a named model is trained on bytes, because it has no tokenizer.

    Raises:
        StudyError: Its tokenizer cannot be loaded.
    """
    return bool(settings.hf_model) and _tokenizer(settings.hf_model) is None


def bytes_note(settings: ModelConfig) -> str:
    """Say of a named model that it learns bytes, for beside the figures."""
    return (
        f"{settings.hf_model!r} has no tokenizer: it is trained on bytes, which are not the tokens "
        "that it learnt."
    )


def _tokenizer(name: str) -> Any:
    """Return a model's tokenizer; None where it has none, and where that knows no token.

    Of a folder without any of its files transformers may make a tokenizer that knows nothing.
    """
    folder = Path(_folder(name))
    if not _has_tokenizer(folder):
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StudyError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from error
    return tokenizer if tokenizer.vocab_size else None


def _folder(name: str) -> str:
    """Return the folder of a model: the one that is named, or the hub's copy on this machine.

    Raises:
        StudyError: It is neither a folder nor wholly here nor on the hub, or the hub cannot be
            reached.
    """
    if Path(name).is_dir():
        return name
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError as error:  # no name that the hub could have
        raise StudyError(
            f"expected the folder of a model or its name on the hub, got {name!r}"
        ) from error
    where = "is not on this machine"
    if isinstance(config, str):
        lacking = _lacking(name, Path(config).parent)
        if not lacking:
            return str(Path(config).parent)
        where = f"is on this machine without {lacking}"
    try:  # transformers itself would try six times
        found = HfApi().model_info(name, timeout=HUB_WAIT_S)
        names = [file.rfilename for file in found.siblings or ()]
        weights = "*.safetensors" if any(n.endswith(".safetensors") for n in names) else "*.bin"
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "*.model", "*.txt", weights],
            ignore_patterns=["*/*"],
        )
        if not _has_tokenizer(Path(folder)):
            with suppress(EntryNotFoundError):  # and the cache keeps that there is none
                hf_hub_download(name, _ASKED_FOR)
        return folder
    except RepositoryNotFoundError as error:
        raise StudyError(
            f"{name!r} is no folder, and the hub has no such model for you; for a gated or private "
            "one log in with `hf auth login`"
        ) from error
    except Exception as error:  # whatever the hub's library and the one below it raise
        raise StudyError(
            f"{name!r} is no folder, {where}, and the hub cannot be reached "
            f"({first_line(error)}); name a folder that holds a model"
        ) from error


def _lacking(name: str, folder: Path) -> str:
    """Say what a model's copy on this machine lacks; "" if nothing."""
    if not _has_weights(folder):
        return "all of its weights"
    has_none = try_to_load_from_cache(name, _ASKED_FOR) is _CACHED_NO_EXIST
    return "" if _has_tokenizer(folder) or has_none else "a tokenizer, which the hub may have"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def _has_weights(folder: Path) -> bool:
    """Whether the weights that transformers would load are all there: one file, or each shard."""
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return True
        index = folder / f"{file}.index.json"
        if index.is_file():
            with suppress(OSError, ValueError, KeyError, AttributeError):
                shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
                return all((folder / shard).is_file() for shard in shards)
            return False
    return False
