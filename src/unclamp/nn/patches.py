"""A convolution whose patches do not overlap as a product: a linear layer on the patches.

    output [B, ..., N] = patches [B, ..., C * taps] @ weight [N, C * taps] + bias

So it is where the kernel is the stride: the patch embedding of a vision model, and a convolution
of one tap. Where casts are only counted, torch's own convolution computes.
"""

import math

import torch
from torch import Tensor, nn

from unclamp.nn.converted import Converted
from unclamp.nn.product import multiply


class Fp8Patches(Converted):
    """An `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` whose operands go through FP8.

    Shapes: input `[B, C, ...]` or `[C, ...]`, as torch's.
    """

    kernel_size: tuple[int, ...]
    bias: Tensor | None

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """Return outputs by inputs of all taps."""
        assert isinstance(module, nn.modules.conv._ConvNd)
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)

    @classmethod
    def product_shape(cls, shape: tuple[int, ...]) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the shape of a weight as the product has it."""
        return (shape[0], math.prod(shape[1:])) if shape else ()

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution with the operands cast as the recipe says."""
        axes = len(self.kernel_size)
        if self.sites.is_plain or input.ndim not in (axes + 1, axes + 2):
            return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        x = input if input.ndim == axes + 2 else input.unsqueeze(0)

        def plain() -> Tensor:
            made = super(Fp8Patches, self).forward(x)  # pyright: ignore[reportAttributeAccessIssue]
            return made.movedim(1, -1)

        made = multiply(
            self.sites,
            patches(x, self.kernel_size),
            self.weight.flatten(1),
            self.bias,
            training=self.training,
            plain=plain,
        ).movedim(-1, 1)
        form = torch.contiguous_format
        if axes == 2 and _is_channels_last(x):
            form = torch.channels_last
        made = made.contiguous(memory_format=form)  # as torch's convolution gives it
        return made if input.ndim == axes + 2 else made.squeeze(0)


def patches(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return the patches of `[B, C, S, ...]` as `[B, S / kernel, ..., C * taps]`.

    What does not fill a patch at the end of an axis is left out, as by a convolution.
    """
    axes = len(kernel)
    counts = [size // taps for size, taps in zip(x.shape[2:], kernel, strict=True)]
    for axis, (count, taps) in enumerate(zip(counts, kernel, strict=True)):
        x = x.narrow(2 + axis, 0, count * taps)
    split = [size for pair in zip(counts, kernel, strict=True) for size in pair]
    x = x.reshape(*x.shape[:2], *split)
    places, taps = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return x.permute(0, *places, 1, *taps).flatten(1 + axes)


def are_patches(module: nn.Module) -> bool:
    """Whether a convolution's patches do not overlap, and nothing is added around them."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    return (
        not module.transposed
        and module.kernel_size == module.stride
        and module.groups == 1
        and module.padding in ("valid", (0,) * len(module.kernel_size))
        and all(
            step == 1 or taps == 1
            for step, taps in zip(module.dilation, module.kernel_size, strict=True)
        )
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
