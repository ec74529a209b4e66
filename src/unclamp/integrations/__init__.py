"""unclamp inside of other people's trainers: one module each, imported by whoever uses it.

Each module needs its own package (`pip install "unclamp[hf]"`, `[lightning]`, `[titan]`, ...), and
this one needs none.
"""
