"""Blocks of a matrix that share a scale: their amaxes, and scales spread over their elements.

A matrix enters a GEMM with one axis contracted. *Oriented*, it has the contracted axis last, and
a block is `across` rows by `along` columns (`unclamp.scaling`). The last blocks may be short.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from unclamp.scaling import Block


def orient(x: Tensor, axis: int) -> Tensor:
    """Return a view `[rows, columns]` of `x` with `axis` last; leading axes become rows.

    Raises:
        ValueError: An axis that a matrix does not have, one other than the last of a tensor that
            is no matrix, or a 0-d tensor.
    """
    if x.ndim == 2:
        if axis not in (-2, -1, 0, 1):
            raise ValueError(f"expected an axis of a matrix, 0 or 1, got {axis}")
        return x if axis in (-1, 1) else x.t()
    if x.ndim == 0 or axis not in (-1, x.ndim - 1):
        raise ValueError(
            "blocks of a tensor that is no matrix lie along its last axis: "
            f"got axis {axis} of {list(x.shape)}"
        )
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 fails for an empty axis


def block_count(size: int, block: int | None) -> int:
    """Return how many blocks an axis has; None is one block, also of an empty axis."""
    return 1 if block is None else -(-size // block)


def block_grid(rows: int, columns: int, block: Block) -> tuple[int, int]:
    """Return the shape of one value a block."""
    return block_count(rows, block[0]), block_count(columns, block[1])


def block_amax(magnitude: Tensor, block: Block) -> Tensor:
    """Return the largest element of each block of an oriented matrix, in the grid's shape.

    Numerics: 0 for a block without elements. `magnitude` is not negative.
    """
    rows, columns = magnitude.shape
    grid = block_grid(rows, columns, block)
    if magnitude.numel() == 0:
        return magnitude.new_zeros(grid)
    across, along = min(block[0] or rows, rows), min(block[1] or columns, columns)
    padding = (0, grid[1] * along - columns, 0, grid[0] * across - rows)
    padded = F.pad(magnitude, padding) if any(padding) else magnitude
    return padded.reshape(grid[0], across, grid[1], along).amax((1, 3))


def spread(values: Tensor, shape: Sequence[int], block: Block) -> Tensor:
    """Return a block's value at each element: it broadcasts against a matrix of this shape."""
    for axis, (size, length) in enumerate(zip(shape, block, strict=True)):
        if length is not None and length != 1:
            values = values.repeat_interleave(min(length, size), axis).narrow(axis, 0, size)
    return values
