"""The text of a study and its batches: a step's batch depends on the seed and the step alone."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from torch import Tensor

from unclamp.errors import StudyError

IGNORED = -100
"""Label of a position that is no target, as in torch's cross entropy."""

Batch = tuple[Tensor, Tensor]


def read_text(paths: Sequence[str], *, seq_len: int) -> bytes:
    """Return the files' bytes in order; without files, Python's own language reference.

    Raises:
        StudyError: A file that cannot be read, is empty, or too little text in all.
    """
    parts = []
    for path in paths:
        try:
            parts.append(Path(path).read_bytes())
        except OSError as error:
            raise StudyError(f"cannot read the text {path!r}: {error.strerror}") from error
        if not parts[-1]:
            raise StudyError(f"the text {path!r} is empty")
    text = b"\n\n".join(parts) if paths else "\n\n".join(topics.topics.values()).encode()
    check_length(len(text), seq_len=seq_len, unit="bytes")
    return text


def check_length(length: int, *, seq_len: int, unit: str = "tokens") -> None:
    """Refuse a text that is too short to draw sequences from.

    Raises:
        StudyError: It has less than four sequences.
    """
    if length < 4 * seq_len:
        raise StudyError(
            f"the text is too short: expected at least {4 * seq_len} {unit} "
            f"(4 sequences of {seq_len}), got {length}; name more with --text, or set a smaller "
            "data.seq_len"
        )


def text_digest(text: bytes) -> str:
    """Return what identifies a text in a study's header."""
    return hashlib.sha256(text).hexdigest()[:16]


class Batches:
    """Random windows of a token stream; the same seed and step give the same batch.

    Shapes: `batch(step)` gives tokens and labels `[batch_size, seq_len]`, int64. Labels are the
    tokens themselves, as transformers' causal LMs expect them.

    Raises:
        StudyError: The tokens are too few.
    """

    def __init__(self, tokens: np.ndarray, *, batch_size: int, seq_len: int, seed: int) -> None:
        check_length(len(tokens), seq_len=seq_len)
        self._tokens = tokens
        self._shape = (batch_size, seq_len)
        self._seed = seed

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        batch_size, seq_len = self._shape
        generator = np.random.default_rng([self._seed, step])
        first = generator.integers(0, len(self._tokens) - seq_len + 1, size=batch_size)
        window = self._tokens[first[:, None] + np.arange(seq_len)]
        tokens = torch.from_numpy(window.astype(np.int64))
        return tokens, tokens.clone()
