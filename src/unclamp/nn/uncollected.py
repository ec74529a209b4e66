"""Work during which Python's collector of garbage stands still.

A conversion makes some fifty objects a product, all of which stay: of a model with thousands of
experts the collector would go through them and everything else in the process again and again, and
take a third of the time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Have nothing collected while the context lasts, unless somebody asks; then as before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
