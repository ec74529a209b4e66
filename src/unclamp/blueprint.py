"""A model of transformers from its config alone, without weights, and a batch for it.

What `coverage` needs of a model that is not on this machine: its shapes. Its weights lie on the
meta device, and of a model on the hub nothing but its config.json is fetched.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from torch import Tensor, nn

from unclamp.errors import UnclampError, did_you_mean, first_line

HUB_WAIT_S = 5.0
"""How long the hub may take to say whether it has a model."""
MOST_TOKENS = 8192
"""Length of a sequence where nobody says one and the model has as many positions."""
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM",
                "AutoModelForSpeechSeq2Seq", "AutoModelForZeroShotImageClassification",
                "AutoModelForImageClassification", "AutoModel")  # fmt: skip


def model_of(name: str) -> nn.Module:
    """Return a model without weights: of a config.json, a folder with one, or a name on the hub.

    Raises:
        UnclampError: There is no such config, or transformers cannot make a model of it.
    """
    file = config_file(name)
    try:
        data = json.loads(file.read_text("utf-8"))
        data.pop("quantization_config", None)  # of how its weights are stored
        kind = data.pop("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise ValueError(_unknown(kind))  # that of transformers lists all that it knows
        config = transformers.AutoConfig.for_model(kind, **data)
    except KeyError as error:
        raise UnclampError(
            f"{file} names no model_type: expected the config.json of a model of transformers"
        ) from error
    except Exception as error:  # whatever transformers raises of what it cannot use
        raise UnclampError(f"cannot read the config {file}: {first_line(error)}") from error
    try:
        with torch.device("meta"):
            return _class_for(config)(config)
    except Exception as error:
        raise UnclampError(
            f"cannot make the model of {file} ({kind}): {first_line(error)}"
        ) from error


def config_file(name: str) -> Path:
    """Return the config.json of a model: a file, one in a folder, or the hub's.

    Raises:
        UnclampError: It is none of them, or the hub cannot be reached.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnclampError(f"the folder {name} has no config.json")
        return path / "config.json"
    if path.suffix == ".json":
        raise UnclampError(f"there is no file {name}")
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError as error:  # no name that the hub could have
        raise UnclampError(
            f"expected a config.json, the folder of a model or its name on the hub, got {name!r}"
        ) from error
    if isinstance(cached, str):
        return Path(cached)
    try:  # the download alone would try six times
        HfApi().model_info(name, timeout=HUB_WAIT_S)
        return Path(hf_hub_download(name, "config.json"))
    except RepositoryNotFoundError as error:
        raise UnclampError(
            f"{name!r} is no file or folder, and the hub has no such model for you; for a gated or "
            "private one log in with `hf auth login`"
        ) from error
    except Exception as error:  # whatever the hub's library and the one below it raise
        raise UnclampError(
            f"{name!r} is no file or folder, and the hub cannot be reached "
            f"({first_line(error)}); name a config.json"
        ) from error


def batch_of(model: nn.Module, *, batch: int, tokens: int | None = None) -> dict[str, Any]:
    """Return inputs that a model trains on: token ids, pixels, sound, whatever it asks for.

    Args:
        model: One of transformers.
        batch: Sequences, or pictures.
        tokens: Tokens of each sequence; by default as many as the model has positions, at most
            `MOST_TOKENS`.

    Raises:
        UnclampError: The model has fewer positions, or wants inputs of another kind.
    """
    config: Any = model.config
    wanted = inspect.signature(model.forward).parameters
    length = _length(config, tokens)
    ids = torch.zeros(batch, length, dtype=torch.long)
    made: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    sees = main == "pixel_values" or (main == "input_ids" and hasattr(config, "vision_config"))
    if sees and "pixel_values" in wanted:
        made["pixel_values"] = _pixels(config, batch)
    if "input_features" in wanted and main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        made["input_features"] = torch.zeros(batch, getattr(config, "num_mel_bins", 80), frames)
    if main == "input_ids" and "input_ids" in wanted:
        made["input_ids"] = ids
    if not made:
        raise UnclampError(
            f"expected a model of text, pictures or sound, got {type(model).__name__}, whose input "
            f"is {main!r}: call unclamp.coverage(model, ...) with inputs of your own"
        )
    if "labels" in wanted:
        made["labels"] = ids[:, 0] if "Classification" in type(model).__name__ else ids
    if "return_loss" in wanted:
        made["return_loss"] = True
    return made


def _length(config: Any, tokens: int | None) -> int:
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    places = next((getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)), 0)
    if tokens is None:
        return min(places or MOST_TOKENS, MOST_TOKENS)
    if places and tokens > places:
        raise UnclampError(f"the model has {places} positions, got {tokens} tokens")
    return tokens


def _pixels(config: Any, batch: int) -> Tensor:
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    return torch.zeros(batch, getattr(vision, "num_channels", 3), height, width)


def _class_for(config: Any) -> Any:
    """Return the class that a config names, or the first of the usual ones that knows it."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto.from_config
    raise ValueError("transformers has no model of this config")


def _unknown(kind: str) -> str:
    near = did_you_mean(kind, list(transformers.CONFIG_MAPPING))
    return f"transformers {transformers.__version__} knows no model_type {kind!r}{near}"
