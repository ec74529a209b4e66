"""What a ledger tells those who listen to it, and what they ask it to look at."""

import weakref
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, get_args

from torch import Tensor, nn

from unclamp.scaling import Scaling

Inspection = Literal["never", "gradients", "clamped", "always", "priced"]
"""Which casts get a closer look: none, those that clamped, or all.

"gradients" takes none, and tells only of clamped gradients what that did to the weight's gradient,
where few tokens clamped; "clamped" and "always" tell it of all. Off the CPU "gradients" is "never",
for the host would have to wait. What clamping did to the loss each of them tells, and "priced" what
rounding did, too: for that it keeps the operands themselves for backward, beside their codes."""
LOOKS_AT_ALL: frozenset[Inspection] = frozenset(["always", "priced"])
INSPECTIONS: tuple[Inspection, ...] = get_args(Inspection)


class Asked:
    """Who asks for closer looks, and what each of them wants."""

    def __init__(self) -> None:
        # With the one who asked: the id alone could soon be that of somebody else.
        self._wants: dict[int, tuple[object, Inspection]] = {}

    def note(self, inspection: Inspection, by: object) -> Inspection:
        """Take down what one wants now; return what the one who wants most does."""
        self._wants.pop(id(by), None)
        if inspection != "never":
            self._wants[id(by)] = (by, inspection)
        return max(["never", *(want for _, want in self._wants.values())], key=INSPECTIONS.index)


class Update(NamedTuple):
    """What an update tells its listeners, in copies of their own; a row a site.

    Attributes:
        stats: Statistics since the last update, float64 `[sites, len(Stat)]`.
        details: Closer looks since the last update, float64 `[sites, DETAILS]`; None where no
            cast was inspected.
        scale_age: Updates since the amax that the scale came from, int64 `[sites]`; -1 where
            there is none. None together with `details`.
        newest: Amax of each row of the ledger, over all ranks that share it, float32; below 0
            where no rank measured any. What enters the histories; not to be written.
    """

    stats: Tensor
    details: Tensor | None = None
    scale_age: Tensor | None = None
    newest: Tensor | None = None


Listener = Callable[[Update], None]
SwitchListener = Callable[[Mapping[int, tuple[Scaling, Scaling]]], None]


class Bound(Protocol):
    """A layer's views of the ledger's tensors."""

    inspection: Inspection
    is_plain: bool
    only_observed: bool
    number: int
    silent_forwards: int
    is_saved: bool
    module: "weakref.ref[nn.Module] | None"

    @property
    def fqn(self) -> str:
        """Dotted name of the layer."""
        ...

    def bind(self) -> None:
        """Take the plan and the views anew."""
        ...


class Told:
    """Those who listen to a ledger."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._switch_listeners: list[SwitchListener] = []

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(Update(...))` at each update; return what ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def subscribe_to_switches(self, listener: SwitchListener) -> Callable[[], None]:
        """Call `listener({site: (before, after)})` at each switch; return what ends it."""
        self._switch_listeners.append(listener)
        return lambda: self._switch_listeners.remove(listener)
