"""Loads the kernels, for the server that ranks are forked from: each would need a second for it."""

import torch

from unclamp.numerics.fused import fused

torch.set_num_threads(1)  # a pool of threads would not outlive the fork
fused()
