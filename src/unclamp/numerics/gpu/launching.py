"""Launches of a kernel whose arguments never change in kind, past Triton's search for its code.

At every launch Triton's launcher looks for the code that serves the arguments. It is chosen by
their types; by whether a whole number is 1, a multiple of 16, or large; by whether an address is a
multiple of 16; by constants, options and device. In Python that takes the host longer than the
launch itself. A `Direct` stands for one choice of all of it but the device and the addresses: it
keeps what Triton launched by device, and where each address is a multiple of 16 launches it again.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

KNOWN = ("3.6",)
"""Versions of Triton whose choice is the one above; others' launchers are asked every time."""
IS_KNOWN = triton.__version__.rpartition(".")[0] in KNOWN and torch.version.hip is None
"""On AMD's devices the size of a tensor's storage matters as well."""


class Direct:
    """A kernel's launches with these constants and options; see the module.

    Whoever calls it gives tensors and whole numbers that are of the same dtypes and of the same
    values at each call.
    """

    def __init__(self, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self._named = constants | options
        self._constants = constants
        self._compiled: dict[int | None, tuple[Any, Any, tuple[Any, ...]]] = {}

    def __call__(
        self, kernel: Any, programs: int, device: torch.device, tensors: tuple[Tensor, ...],
        *others: Any,
    ) -> None:  # fmt: skip
        """Launch a kernel on the current stream of a device, which is the current one.

        Args:
            kernel: Which; a `Direct` serves one.
            programs: How many programs.
            device: Where; of a type with an index, if there are several.
            tensors: The kernel's first arguments, as long as their addresses matter to its code.
            others: The kernel's further arguments.
        """
        known = self._compiled.get(device.index)
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        is_aligned = addresses % 16 == 0
        if known is not None and known[0] is kernel and is_aligned and not kernel.pre_run_hooks:
            _, compiled, constants = known
            compiled[(programs, 1, 1)](*tensors, *others, *constants)
            return
        made = kernel[(programs,)](*tensors, *others, **self._named)
        if (
            IS_KNOWN
            and is_aligned
            and isinstance(kernel, JITFunction)
            and isinstance(made, CompiledKernel)
        ):
            names = kernel.arg_names[len(tensors) + len(others) :]
            values = tuple(self._constants[name] for name in names)
            self._compiled[device.index] = kernel, made, values
