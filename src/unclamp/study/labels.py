"""The scenario of few labels: now and then a batch in which only some positions are targets.

Nothing is planted, neither in the weights nor in the tokens. It is what masked labels do in
fine-tuning: the loss is the mean over the labels of a batch, so with 8 of them in place of 512
each one's gradient is 64 times as large, and so is what `grad_output` sees, while the history of
its amaxes comes from batches with many labels.
"""

from unclamp.study.data import IGNORED, Batch


def with_few_labels(batch: Batch, *, labels: int) -> Batch:
    """Return a batch with the same tokens, of which only the last of each sequence are targets.

    Args:
        batch: Tokens and labels, `[batch_size, seq_len]`.
        labels: Targets in the whole batch, count; spread evenly over the sequences, and what is
            left over goes to the first ones. A sequence's first token is never a target of a
            causal LM, so at most `batch_size * (seq_len - 1)`.
    """
    tokens, before = batch
    rows, length = before.shape
    masked = before.clone()
    for row in range(rows):
        kept = labels // rows + (row < labels % rows)
        masked[row, : length - kept] = IGNORED
    return tokens, masked
