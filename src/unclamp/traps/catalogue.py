"""All traps, in the order in which they are told, and how one is found by its name."""

from fnmatch import fnmatchcase

from unclamp.errors import UnclampError, did_you_mean
from unclamp.traps import casts, compiled, gemms, ranks, scales, sums, training
from unclamp.traps.trap import Trap

TRAPS: tuple[Trap, ...] = (
    *casts.TRAPS,
    *scales.TRAPS,
    *gemms.TRAPS,
    *sums.TRAPS,
    *ranks.TRAPS,
    *training.TRAPS,
    *compiled.TRAPS,
)


def find(pattern: str) -> tuple[Trap, ...]:
    """Return the traps of a name or a glob, in their order.

    Raises:
        UnclampError: None has such a name.
    """
    found = tuple(trap for trap in TRAPS if fnmatchcase(trap.name, pattern))
    if not found:
        names = [trap.name for trap in TRAPS]
        raise UnclampError(
            f"no trap is called {pattern!r} (`unclamp traps --list` names all)"
            f"{did_you_mean(pattern, names)}"
        )
    return found
