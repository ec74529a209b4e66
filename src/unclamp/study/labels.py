"""The scenario of few labels: now and then a batch in which only some positions are targets.

Nothing is planted into the weights, and no token is rare. It is what fine-tuning does that mixes
long texts with short answers. The loss is the mean over the labels of a batch, so with 8 of them
in place of 512 each one's gradient is 64 times as large, and so is what `grad_output` sees, while
the history of its amaxes comes from batches with many labels.

With a question, each sequence ends with it and with its answer: how many words the text before it
has. Only answers are labels. Nothing but these batches teaches them, so whatever is taken from
their gradients is missed; without a question the labels are the text's own last bytes, which every
other batch teaches as well.
"""

import torch
from torch import Tensor

from unclamp.study.data import IGNORED, Batch


def with_few_labels(batch: Batch, *, labels: int, question: str = "") -> Batch:
    """Return a batch of which only the last tokens of each sequence are targets.

    Args:
        batch: Tokens and labels, `[batch_size, seq_len]`.
        labels: Targets in the whole batch, count; spread evenly over the sequences, and what is
            left over goes to the first ones. A sequence's first token is never a target of a
            causal LM, so at most `batch_size * (seq_len - 1)`.
        question: What each sequence asks before its targets, in ASCII; the targets are then the
            last decimal digits of the number of words before it. "" leaves the tokens as they are.
    """
    tokens, masked = batch[0].clone(), batch[1].clone()
    rows, length = masked.shape
    for row in range(rows):
        kept = labels // rows + (row < labels % rows)
        if question and kept:
            tokens[row] = _asking(tokens[row], question.encode("ascii"), digits=kept)
            masked[row] = tokens[row]
        masked[row, : length - kept] = IGNORED
    return tokens, masked


def _asking(sequence: Tensor, question: bytes, *, digits: int) -> Tensor:
    """Return a sequence of bytes whose end is replaced by a question and its answer."""
    text = bytes(sequence[: len(sequence) - len(question) - digits].tolist())
    answer = f"{len(text.split()):0{digits}d}"[-digits:].encode("ascii")
    return torch.tensor(list(text + question + answer), dtype=sequence.dtype)
