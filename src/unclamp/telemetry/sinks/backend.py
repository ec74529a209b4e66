"""What the sinks of TensorBoard, Weights & Biases and MLflow share.

Each of them is a service with its own package. The package is looked for when the sink is made,
so that a missing one is an error before the training begins, and imported when the run starts.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, TypeVar

from unclamp.errors import UnclampWarning, UnsupportedError
from unclamp.runlog import Columns, Header, Status
from unclamp.telemetry.sinks.numbers import (
    Histogram,
    SiteInfo,
    choose,
    histograms,
    per_site,
    summarise,
)

T = TypeVar("T")


class Backend(ABC):
    """A sink that sends named numbers, and the chosen sites' series, to a service.

    Args:
        sites: A glob or several: modules whose sites get series of their own; as in recipes.
        prefix: Before every name that does not begin with it, such as "fp8/".

    Raises:
        UnsupportedError: The service's package is not installed.
    """

    package: ClassVar[str]
    """What is imported, and the name of the extra that installs it."""

    def __init__(self, *, sites: str | Sequence[str] = (), prefix: str = "") -> None:
        self._globs = [sites] if isinstance(sites, str) else list(sites)
        self._prefix = prefix
        self._sites: Mapping[int, SiteInfo] = {}
        self._chosen: set[int] = set()
        if not _is_installed(self.package):
            raise UnsupportedError(
                f"{type(self).__name__}(...) needs the package {self.package}, which is not "
                f"installed: pip install 'unclamp[{self.package}]'"
            )

    def start(self, header: Header, sites: Mapping[int, SiteInfo]) -> None:
        """Open the service's run and describe it; warn of globs that match no site."""
        self._sites = sites
        self._chosen = choose(sites, self._globs)
        unmatched = [glob for glob in self._globs if not choose(sites, [glob])]
        self._open(header)
        if unmatched:
            warnings.warn(
                f"{type(self).__name__}(sites=...): {unmatched} match no converted module",
                UnclampWarning,
                stacklevel=2,
            )

    def step(self, step: int, steps: Columns, casts: Columns | None) -> None:
        """Send one step's numbers, and what is known of the chosen sites."""
        numbers = summarise(self._sites, steps, casts)
        numbers |= per_site(self._sites, casts, self._chosen)
        found = histograms(self._sites, casts, self._chosen)
        self._write(step, self._named(numbers), self._named(found))

    def event(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        """Mark the step with a 1 under `unclamp/events/<kind>`."""
        self._write(step, self._named({f"unclamp/events/{kind}": 1.0}), {})

    def _name(self, name: str) -> str:
        """Return a name with the prefix; "unclamp/" adds nothing to "unclamp/saturated"."""
        return name if name.startswith(self._prefix) else f"{self._prefix}{name}"

    def _named(self, values: Mapping[str, T]) -> dict[str, T]:
        return {self._name(name): value for name, value in values.items()}

    @abstractmethod
    def close(self, status: Status) -> None:
        """End the service's run, unless it was there before."""

    @abstractmethod
    def _open(self, header: Header) -> None: ...

    @abstractmethod
    def _write(
        self, step: int, numbers: Mapping[str, float], found: Mapping[str, Histogram]
    ) -> None: ...


def _is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of its name, as wandb leaves, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
