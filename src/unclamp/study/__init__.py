"""Compare scaling strategies: the same model on the same batches, once per arm and seed."""
