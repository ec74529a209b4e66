"""Compare scaling strategies: the same model on the same batches, once per arm and seed."""

from unclamp.quiet import quiet_imports

quiet_imports()  # in its processes too
