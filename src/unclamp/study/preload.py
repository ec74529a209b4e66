"""What a worker needs, imported in the process that workers are forked from: see `forking`.

The CPU kernels are loaded where they are kept on disk. Where they are not, nothing is compiled
here, since every worker would wait for it, those of high precision too: `compiling` does it beside
the first runs.
"""

is_loaded = False
"""Whether all that was to be imported is there, and the kernels are kept on disk."""

try:
    import unclamp.study.worker  # noqa: F401
    from unclamp.numerics import compiled, cpu

    with compiled.only_loading():
        cpu.warm_up()
    is_loaded = True
except Exception:  # each worker meets it again, and says what it is
    pass
