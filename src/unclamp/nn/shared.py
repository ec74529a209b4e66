"""With whom a ledger's updates agree: one maximum a step over the ranks that hold its products.

A maximum has no order, so for equal tensors the histories of delayed, guarded and static scaling
are, bit for bit, those of one process that sees everything. What enters a history is the newest
amax of each row over all ranks, -1 where no rank measured any; a rank that saw nothing takes over
what the others saw.

Ranks that come by apart would wait for each other for ever, and vectors of different length end
the process. So every step of an optimizer that holds the model's parameters meets, whether or not
anything is pending, and each vector begins with a header:

    [pending, loaded, h, -h]      h: a digest of sites, scalings and updates, in parts of 24 bits

The maximum of h and that of -h tell whether all have the same h. Only then does the length of a
vector change, and only then are amaxes used; where a state was loaded since the last meeting,
histories and scales are compared too. Ranks that differ get one error, each of them.

On a CPU the header is read at once. On a GPU nobody waits for it: it is looked at one step late,
every followed step counts as an update, and an update that waits for a new length is made with the
next step. In a CUDA graph only amaxes meet.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unclamp.errors import ConvertError
from unclamp.names import ROLES
from unclamp.nn import first
from unclamp.nn.apart import Description, difference, tell_alone
from unclamp.nn.clock import Ticking
from unclamp.nn.groups import Finder, Groups, is_distributed, max_over, version
from unclamp.nn.layout import Layout
from unclamp.nn.ring import Ring
from unclamp.nn.turns import FRESH, NOTHING, Turn

DIGEST_PARTS = 2
DIGEST_BITS = 24
"""Whole numbers up to 2**24 are exact in float32."""
PENDING, LOADED, DIGEST = 0, 1, 2
HEADER = DIGEST + 2 * DIGEST_PARTS


class Meeting(Ticking, Protocol):
    """What meets: a ledger."""

    layout: Layout
    ring: Ring
    scale: Tensor
    observes: bool

    @property
    def updates(self) -> int:
        """Updates so far."""
        ...

    @property
    def is_warming(self) -> bool:
        """Whether casts are only counted."""
        ...


@dataclass
class Part:
    """The rows of a ledger that the same ranks hold.

    Attributes:
        groups: Whose maxima, one after the other, are those of all these ranks.
        sites: The numbers of its sites.
        rows: The numbers of its rows; None where that is all of them.
        length: How many rows it has.
        text: A digest of sites and scalings in words, the same on ranks that are alike.
    """

    groups: Groups
    sites: list[int]
    rows: Tensor | None
    length: int
    text: str


@dataclass
class Pact:
    """What ranks have agreed on so far.

    Attributes:
        length: Rows in a vector; None before they have met.
        header: That of the last meeting, on its way to the host; None where it was read.
        sent: The part's text in that meeting.
        arrived: When the header is there: a CUDA event.
    """

    length: int | None = None
    header: Tensor | None = None
    sent: str = ""
    arrived: Any = None


@dataclass
class Shared:
    """The meetings of one ledger.

    Attributes:
        parts: The rows that are agreed on; none where the process is alone.
        is_loaded: Whether state was loaded since the last meeting.
        is_late: Whether headers are read one step late; None: as the device wants it.
        is_off: Whether each rank goes by its own amaxes, as a replay asks; the same on all ranks.
        first: The products whose casts may agree on a first scale, and with whom (`nn.first`).
        within_ddp: Those of them that a DDP is around.
        unseeded: Sites of such products that have no scale; None until the ranks have met.
    """

    parts: list[Part] = field(default_factory=list)
    is_loaded: bool = False
    is_late: bool | None = None
    is_off: bool = False
    first: dict[int, Groups] = field(default_factory=dict)
    within_ddp: set[int] = field(default_factory=set)
    unseeded: set[int] | None = None
    _pacts: dict[Groups, Pact] = field(default_factory=dict)
    _looked: Any = None
    _made: int = -1
    _has_told: bool = False

    # ---- with whom -------------------------------------------------------------------------

    def look(self, ledger: Meeting) -> bool:
        """Look who holds the products, where that may have changed; return whether to meet.

        A model that is only observed stays as it is: each rank counts for itself.
        """
        self._made = ledger.turns.made
        if ledger.observes or self.is_off or not is_distributed():
            self.parts, self.first, self._looked = [], {}, None
            return False
        products = ledger.clock.products(ledger)
        found = [None if p.module is None else p.module() for p in products]
        # One that is reverted is nobody's, whether or not its ledger lives on some rank.
        modules = [m if m is not None and "sites" in m.__dict__ else None for m in found]
        kinds = [None if m is None else type(m._parameters.get("weight")) for m in modules]
        state = (version(), ledger.sites, ledger.layout, kinds)
        if self._looked is None or not _same(state, self._looked):
            self._looked = state
            self._find(ledger, modules)
        return bool(self.parts)

    def _find(self, ledger: Meeting, modules: Sequence[nn.Module | None]) -> None:
        finder = Finder(ledger.clock.model)
        by_groups: dict[Groups, list[int]] = {}
        unknown = []
        self.first, self.within_ddp = {}, set()
        for number, module in enumerate(modules):
            if module is None:
                continue
            found = finder.look(module)
            module.__dict__["sites"].is_gathered = found.is_gathered
            if not found.is_known:
                unknown.append(number)
            fqn = ledger.sites[number * len(ROLES)].fqn
            if found.groups and not (found.may_be_missed or first.is_routed(fqn)):
                self.first[number] = found.groups
                if found.is_within_ddp:
                    self.within_ddp.add(number)
            for index in range(number * len(ROLES), (number + 1) * len(ROLES)):
                whole = ledger.sites[index].remembers.is_whole
                groups = found.groups if whole else found.of_blocks
                if groups:
                    by_groups.setdefault(groups, []).append(index)
        # Where ranks are in several groups all of them go through these in one order.
        ordered = sorted(by_groups, key=lambda g: [dist.get_process_group_ranks(x) for x in g])
        self.parts = [self._part(ledger, groups, by_groups[groups]) for groups in ordered]
        self._pacts = {groups: self._pacts.get(groups, Pact()) for groups in ordered}
        if unknown and not self._has_told:
            self._has_told = True
            tell_alone([ledger.sites[n * len(ROLES)].fqn for n in unknown], ledger.clock.model)

    def _part(self, ledger: Meeting, groups: Groups, sites: list[int]) -> Part:
        rows, layout = ledger.layout.numbers_of(sites), ledger.layout
        return Part(
            groups=groups,
            sites=sites,
            rows=None if len(rows) == layout.rows else rows,
            length=len(rows),
            text=_hash("\n".join(f"{n}: {d}" for n, d in _describe(ledger, sites).items())),
        )

    # ---- before the first update -----------------------------------------------------------

    def first_groups(
        self, ledger: Meeting, number: int, *, commits: bool, training: bool
    ) -> Groups:
        """Return with whom the casts of a product's forward agree on a first scale.

        Looks who holds the products, once a step. At the first forward that trains the ranks
        meet: that they are alike is known before anything is shared.

        Args:
            ledger: Whose.
            number: The product's.
            commits: Whether what the casts see is to count.
            training: Whether the module is in training mode.
        """
        if self._made != ledger.turns.made:
            self.look(ledger)
        if not self.first or self.unseeded == set() or ledger.is_warming:
            return ()
        groups = self.first.get(number, ())
        if not groups or not first.trains(commits=commits, training=training):
            return ()
        is_in_ddp = first.is_in_backward() or first.is_in_ddp()
        if number in self.within_ddp and not is_in_ddp:
            return ()
        if self.unseeded is None:
            self._begin(ledger)
        return groups

    def _begin(self, ledger: Meeting) -> None:
        for part in self.parts:
            self._compare_contents(ledger, part)
            self._pacts[part.groups].length = part.length
        self.is_loaded = False
        wants = ~ledger.layout.settings.takes_own & (ledger.scale == 0)
        empty = set(ledger.layout.site_of_row[wants].tolist())
        self.unseeded = {i for i in empty if ledger.sites[i].remembers.is_whole}

    def _has_updated(self, turn: Turn) -> None:
        left = () if self.unseeded is None or turn is None else self.unseeded
        self.unseeded = {i for i in left if turn is not None and i // len(ROLES) not in turn}

    # ---- meeting ---------------------------------------------------------------------------

    def agree(
        self, ledger: Meeting, newest: Tensor, pending: int, turn: Turn, *, captured: bool
    ) -> tuple[Tensor, int]:
        """Return the newest amaxes of all ranks, float32 `[rows]`, and what is pending there.

        Args:
            ledger: Whose.
            newest: This rank's, -1 where nothing was measured.
            pending: What this rank has (`nn.turns`).
            turn: Which products the update is for.
            captured: Whether this becomes part of a CUDA graph.

        Raises:
            ConvertError: The ranks differ in sites, scalings, updates or loaded state.
        """
        is_late = newest.device.type != "cpu" if self.is_late is None else self.is_late
        agreed, found = newest.clone(), [FRESH if is_late or captured else pending]
        for part in self.parts:
            own = newest if part.rows is None else newest[part.rows]
            if captured:
                met = max_over(part.groups, own)
            elif is_late:
                met = self._meet_late(ledger, part, own)
            else:
                met, theirs = self._meet(ledger, part, own, pending)
                found.append(theirs)
            if met is None:
                found = [NOTHING]
                break
            if part.rows is None:
                agreed = met
            else:
                agreed[part.rows] = met
        if not captured:
            self.is_loaded = False
        if max(found) != NOTHING:
            self._has_updated(turn)
        return agreed, max(found)

    def _meet(self, ledger: Meeting, part: Part, own: Tensor, pending: int) -> tuple[Tensor, int]:
        """Meet and read the header at once."""
        pact = self._pacts[part.groups]
        fits = pact.length == part.length
        vector = self._reduced(ledger, part, own if fits else None, pending)
        self._check(ledger, part, vector)
        if pact.length is None or vector[LOADED] > 0:
            self._compare_contents(ledger, part)
        found = int(vector[PENDING])
        if not fits:
            pact.length = part.length
            vector = self._reduced(ledger, part, own, pending)
        return vector[HEADER:], found

    def _meet_late(self, ledger: Meeting, part: Part, own: Tensor) -> Tensor | None:
        """Meet, and read the header of the meeting before; None where no update can be made yet."""
        pact = self._pacts[part.groups]
        if pact.length is None:
            return self._meet(ledger, part, own, FRESH)[0]
        if pact.header is not None:
            if pact.arrived is not None:
                pact.arrived.synchronize()  # of the step before: it is there
            header, pact.header = pact.header, None
            self._check(ledger, part, header)
            if header[LOADED] > 0:
                self._compare_contents(ledger, part)
            if pact.sent == part.text:
                pact.length = part.length
        fits = pact.length == part.length
        vector = self._reduced(ledger, part, own if fits else None, FRESH)
        pact.header, pact.arrived = _on_its_way(vector[:HEADER])
        pact.sent = part.text
        return vector[HEADER:] if fits else None

    def _reduced(
        self,
        ledger: Meeting,
        part: Part,
        own: Tensor | None,
        pending: int,
        contents: bytes | None = None,
    ) -> Tensor:
        """Return header and amaxes over all ranks; without `own` a vector of the length agreed.

        With `contents` a header alone, whose digest is also of them.
        """
        told = f"{part.text}\n{ledger.updates} updates".encode()
        digest = _digest(told if contents is None else told + contents)
        header = [pending, int(self.is_loaded), *digest, *(-part for part in digest)]
        device = ledger.scale.device
        head = torch.tensor(header, dtype=torch.float32, pin_memory=device.type == "cuda")
        head = head.to(device, non_blocking=True)
        if contents is not None:
            return max_over(part.groups, head)
        if own is None:
            own = head.new_full((self._pacts[part.groups].length or 0,), -1.0)
        return max_over(part.groups, torch.cat([head, own]))

    def _compare_contents(self, ledger: Meeting, part: Part) -> None:
        vector = self._reduced(ledger, part, None, NOTHING, _contents(ledger, part))
        self._check(ledger, part, vector)

    def _check(self, ledger: Meeting, part: Part, vector: Tensor) -> None:
        """Raise, on all ranks alike, where one of them differs."""
        most, least = vector[DIGEST:HEADER].view(2, DIGEST_PARTS)
        if torch.equal(most, -least):
            return
        own = Description(
            rank=dist.get_rank(),
            updates=ledger.updates,
            sites=_describe(ledger, part.sites),
            contents=_digest(_contents(ledger, part)),
        )
        everyone = [own]
        for group in part.groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, everyone, group=group)
            everyone = list(itertools.chain(*gathered))
        raise ConvertError(difference(everyone))


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two states are: the ledger's parts by identity, the rest by value."""
    held = zip(one[1:3], other[1:3], strict=True)
    return all(a is b for a, b in held) and (one[0], one[3]) == (other[0], other[3])


def _describe(ledger: Meeting, sites: Sequence[int]) -> dict[str, str]:
    """Return each site by its name in the model as it is now, and how it is scaled.

    Not by the name that the ledger has: a recorder, maybe of one rank, may have it renamed.
    """
    names = {}
    model = ledger.clock.model
    for fqn, module in () if model is None else model.named_modules():
        own: Any = module.__dict__.get("sites")
        if getattr(own, "ledger", None) is ledger:
            names |= {index: f"{fqn} {role}".strip() for role, index in own.indices.items()}
    described = {}
    for index in sites:
        site = ledger.sites[index]
        grids = f" in {site.grids} blocks" if site.grids else ""
        scaling = f"{_worded(site.operand.scaling)} {site.operand.format.name}{grids}"
        described[names.get(index, f"site {index}")] = scaling
    return described


def _worded(scaling: Any) -> str:
    """Return a scaling in words that do not depend on where its function lies in memory."""
    reduce = getattr(scaling, "reduce", None)
    if not callable(reduce):
        return repr(scaling)
    name = getattr(reduce, "__qualname__", type(reduce).__qualname__)
    return repr(scaling).replace(repr(reduce), name)


def _contents(ledger: Meeting, part: Part) -> bytes:
    """Return histories and scales of a part; waits for the device."""
    rows = ledger.layout.numbers_of(part.sites)
    history = ledger.ring.newest(rows, ledger.layout.longest)
    kept = torch.cat([history.flatten(), ledger.scale[rows]])
    return kept.cpu().numpy().tobytes()


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(told: bytes) -> list[int]:
    size = DIGEST_BITS // 8
    raw = hashlib.blake2b(told, digest_size=size * DIGEST_PARTS).digest()
    whole = partial(int.from_bytes, byteorder="little")
    return [whole(raw[i * size : (i + 1) * size]) for i in range(DIGEST_PARTS)]


def _on_its_way(header: Tensor) -> tuple[Tensor, Any]:
    """Return a copy on the host, and when it is there; nobody waits for it."""
    if header.device.type != "cuda":
        return header.to("cpu", copy=True), None
    copied = torch.empty(header.shape, dtype=header.dtype, pin_memory=True)
    copied.copy_(header, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copied, arrived
