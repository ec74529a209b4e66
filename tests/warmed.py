"""Loads the kernels, for the server that ranks are forked from: each would need a second for it.

What is there by then is left out of every collection of garbage: each rank would walk through half
a million objects, and have their pages copied for it.
"""

import gc

import torch

from unclamp.numerics.fused import fused

torch.set_num_threads(1)  # a pool of threads would not outlive the fork
fused()
gc.collect()
gc.freeze()
