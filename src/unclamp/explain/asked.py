"""Steps of a running training that somebody wants to ask about, and the state to ask from.

What keeps the states is `ring`; when they are written is for `snapshots`.
"""

from collections.abc import Iterator

from unclamp.errors import ReplayError
from unclamp.explain.ring import Ring


class Asked:
    """Steps to be asked about, and for those that have begun the state some steps before."""

    def __init__(self) -> None:
        """Start without any."""
        self._starts: dict[int, int | None] = {}

    @property
    def starts(self) -> set[int]:
        """The steps before which a state is needed."""
        return {start for start in self._starts.values() if start is not None}

    @staticmethod
    def checked(step: object) -> int:
        """Return a step's number.

        Raises:
            ReplayError: It is none.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ReplayError(f"expected the number of a step, 0 or above, got {step!r}")
        return step

    def add(self, step: int) -> None:
        """Want to ask about a step."""
        self._starts.setdefault(step, None)

    def begin(self, step: int, ring: Ring, *, lead: int) -> None:
        """Choose the states for the steps up to `step`, `lead` before them or more if they can."""
        for wanted, start in self._starts.items():
            if start is None and wanted <= step:
                self._starts[wanted] = ring.before(wanted, lead=lead)

    def done(self, last: int) -> Iterator[tuple[int, int | None]]:
        """Yield the steps up to `last` with their states, and want them no more."""
        for wanted in sorted(step for step in self._starts if step <= last):
            yield wanted, self._starts.pop(wanted)

    def again_from(self, step: int) -> None:
        """Choose anew for the steps from `step` on: they come again. Earlier ones are over."""
        self._starts = {wanted: None for wanted in self._starts if wanted >= step}
